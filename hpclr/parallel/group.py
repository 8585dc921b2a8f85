"""The processes of a job once they have met: the few collectives that hpclr uses, for one process and for many.

Everything that is not a tensor travels as JSON; nothing is unpickled. Every method is collective: all processes
call it, in the same order.
"""

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from hpclr.errors import HpclrError, error_of, exit_code_of, message_of
from hpclr.parallel.wire import pack, unpack

_LARGEST_MESSAGE = 1 << 29  # bytes; gloo counts in 32 bits

T = TypeVar("T")


class Group:
    """All processes of the default process group of torch.distributed; this one alone where there is none.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        device: where tensors must be to be sent.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1
        nccl_only = together and dist.get_backend() == "nccl"
        self._by_gloo_alone = together and dist.get_backend() == "gloo"
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl_only else torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Whether this is the process that decides, writes and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all processes.

        Without a tensor of Python's, which gloo's threads may give back when Python is no longer there, and abort.
        """
        if self.size > 1 and self._by_gloo_alone:
            dist.barrier()
        else:
            self.sum(torch.zeros(1))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes of tensors of one shape and type, on the device of the argument."""
        if self.size == 1:
            return tensor
        result = tensor.detach().clone() if self._can_send(tensor) else tensor.detach().to(self.device, copy=True)
        dist.all_reduce(result)
        return result.to(tensor.device)

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all processes, in the order of their ranks, on every process."""
        if self.size == 1:
            return [value]
        buffer = pack(value, (), self.device)
        lengths = self._lengths(buffer.numel())
        padded = torch.cat([buffer, buffer.new_zeros(max(lengths) - buffer.numel())])
        received = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(received, padded)
        return [unpack(one)[0] for one in received]

    def broadcast(self, value: Any, tensors: Sequence[Tensor] = (), *, source: int = 0) -> tuple[Any, list[Tensor]]:
        """One process's JSON value and tensors, to the bit, on every process; in two messages however many there are.

        Args:
            value: counts on the source only.
            tensors: likewise; any shapes and types.
            source: the rank of the one whose they are.

        Returns:
            The value and the tensors, on the group's device; on the source too they are copies, so that their strides,
            on which the rounding of products depends, are the same everywhere.
        """
        if self.size == 1:
            return value, list(tensors)
        buffer = pack(value, tensors, self.device) if self.rank == source else None
        length = torch.tensor([0 if buffer is None else buffer.numel()], device=self.device)
        dist.broadcast(length, source)
        received = self._broadcast_bytes(buffer, int(length), source)
        return unpack(received)

    def exchange(self, value: Any, tensors: Sequence[Tensor]) -> Iterator[tuple[Any, list[Tensor]]]:
        """What each process has to say, as `broadcast`, from every process to every process, by rank.

        Each is sent when the one before it has been dealt with, so that one at a time is held; all must be asked for.
        """
        if self.size == 1:
            yield value, list(tensors)
            return
        buffer = pack(value, tensors, self.device)
        for source, length in enumerate(self._lengths(buffer.numel())):
            yield unpack(self._broadcast_bytes(buffer if source == self.rank else None, length, source))

    def move(self, value: Any, tensors: Sequence[Tensor], source: int, target: int) -> tuple[Any, list[Tensor]] | None:
        """Sends from one process to another, both of which call this; the target gets it, all others None."""
        if self.rank == source:
            buffer = pack(value, tensors, self.device)
            dist.send(torch.tensor([buffer.numel()], device=self.device), target)
            for piece in buffer.split(_LARGEST_MESSAGE):
                dist.send(piece, target)
        if self.rank != target:
            return None
        length = torch.zeros(1, dtype=torch.int64, device=self.device)
        dist.recv(length, source)
        buffer = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        for piece in buffer.split(_LARGEST_MESSAGE):
            dist.recv(piece, source)
        return unpack(buffer)

    def on_first(self, action: Callable[[], T]) -> T:
        """Does something on the first process alone; every process gets its JSON result, or raises its error.

        Raises:
            HpclrError: with the exit code and the message of the one that `action` raised on the first process.
        """
        if self.size == 1:
            return action()
        result: Any = None
        error: Exception | None = None
        if self.is_first:
            try:
                result = action()
            except Exception as caught:  # whatever it is, the others wait for an answer
                error = caught
        (described, result), _ = self.broadcast((_described(error), result))
        if described is not None:
            raise error or self._error(*described)
        return result  # type: ignore[no-any-return]

    def together(self, action: Callable[[], T]) -> T:
        """Does something on every process; if it fails on any, all raise the error of the first of them.

        Raises:
            HpclrError: with the exit code of that one; names the rank where only some processes failed.
        """
        if self.size == 1:
            return action()
        error: Exception | None = None
        result: Any = None
        try:
            result = action()
        except Exception as caught:  # whatever it is, the others wait for an answer
            error = caught
        described = self.gather(_described(error))
        failed = [rank for rank, one in enumerate(described) if one is not None]
        if not failed:
            return result  # type: ignore[no-any-return]
        code, message = described[failed[0]]
        where = "" if len(failed) == self.size else f"rank {', '.join(map(str, failed))} of {self.size}: "
        raise self._error(code, where + message) from error

    def _error(self, code: int, message: str) -> HpclrError:
        error = error_of(code, message)
        error.shared = not self.is_first
        return error

    def _lengths(self, mine: int) -> list[int]:
        lengths = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        lengths[self.rank] = mine
        dist.all_reduce(lengths)
        return [int(length) for length in lengths.tolist()]

    def _broadcast_bytes(self, buffer: Tensor | None, length: int, source: int) -> Tensor:
        received = torch.empty(length, dtype=torch.uint8, device=self.device) if buffer is None else buffer
        for piece in received.split(_LARGEST_MESSAGE):
            dist.broadcast(piece, source)
        return received

    def _can_send(self, tensor: Tensor) -> bool:
        return tensor.device == self.device or (tensor.is_cuda and "nccl" in str(dist.get_backend_config()))


def join(store: Store, rank: int, size: int, *, backend: str, timeout: float, device: torch.device) -> Group:
    """Makes the default process group of processes that have met.

    Args:
        store: the store in which they met.
        rank: of this process.
        size: number of processes.
        backend: "gloo", or "nccl", which is for tensors on CUDA devices; the others then go by gloo as well.
        timeout: seconds that a collective may take.
        device: this process's.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    name = "cpu:gloo,cuda:nccl" if backend == "nccl" else backend
    dist.init_process_group(
        name, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout), group_name=""
    )
    return Group()


def _described(error: Exception | None) -> tuple[int, str] | None:
    return None if error is None else (exit_code_of(error), message_of(error))
