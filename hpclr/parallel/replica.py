"""Data parallelism: torch's own DistributedDataParallel around a model whose parameters change shape."""

import gc
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpclr.lowrank.layers import is_sharded
from hpclr.methods.placement import Here, Placement
from hpclr.parallel.group import Group
from hpclr.parallel.placement import AllTogether, Doing, Rank0, Spread

Svd = Literal["rank0", "spread", "heat"]

_PARCEL = 256 << 20  # bytes that are broadcast at a time

# the option's name in this torch
_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


def _unheard(what: str, *, waiting: bool) -> None:
    """Nobody asks what this process does."""


class Replica(nn.Module):
    """A model of which every process holds a copy; gradients are averaged over the processes.

        replica = Replica(model)
        oialr = OIALR(replica, optimizer, delay=1000, every=500)
        ...
        loss = criterion(replica(x), y)
        loss.backward()
        optimizer.step()

    DistributedDataParallel fixes the shapes of parameters when it is made, so it is made anew when they have changed.
    Frozen factors take no part in it: what is reduced is Σ and whatever else is trained. Without a process
    group this is the model itself, so that one script serves one process and many. Everything but the forward
    pass is the model's own: `replica.module`.

    Args:
        module: the model, on this process's device; all processes begin with the parameters and buffers of the first.
        svd: who decomposes the layers at a check: "rank0", the first process; "spread", all of them, each its share by
            cost (`method.state_dict()` is then collective); "heat", all together on every dense layer (approximate).
        heat_rank: for "heat", the share of a layer's smaller side that is found.
        broadcast_buffers: whether buffers, such as running statistics, are those of the first process in each forward.
        unused_parameters: look in every step for parameters that the loss does not depend on.
        doing: told at checks what this process does, and whether that takes the others.

    Attributes:
        module: the model.
        placement: what a method needs to know of the other processes.

    Raises:
        TypeError: for a model that is wrapped already.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        svd: Svd = "rank0",
        heat_rank: float = 0.5,
        broadcast_buffers: bool = True,
        unused_parameters: bool = False,
        doing: Doing = _unheard,
    ) -> None:
        super().__init__()
        if isinstance(module, (DistributedDataParallel, nn.DataParallel, Replica)):
            raise TypeError(
                f"the model is already wrapped in {type(module).__name__}; Replica(model) takes its place: pass the "
                "module inside"
            )
        if any(is_sharded(parameter) for parameter in module.parameters()):
            raise TypeError(
                "each process holds but a part of this model (fully_shard, Sharded), of which there is nothing to "
                "average: train the Sharded itself, or give Replica the model before it is shared out"
            )
        self.module = module
        self.group = Group()
        self.placement = _placement(self.group, svd, heat_rank, doing)
        look = unused_parameters or (self.group.size > 2 and _is_on_cpu(module))
        self._options = {_BUFFERS: broadcast_buffers, "find_unused_parameters": look}
        self._synchronise = True
        self._ddp: tuple[DistributedDataParallel] | None = None  # in a tuple: no submodule of this one
        self._reduced: list[nn.Parameter] = []
        self._shapes: list[torch.Size] = []
        self.synchronise(module.state_dict(keep_vars=True).values())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass; the backward pass averages the gradients over all processes.

        Under `torch.no_grad()` it is the model's own, for one process or all; else all must call it.

        Raises:
            RuntimeError: if the processes were joined only after this object was made.
        """
        if not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        if self.group.size == 1:
            _refuse_late_group()
            return self.module(*args, **kwargs)
        ddp = self._current()
        if self._synchronise:
            return ddp(*args, **kwargs)
        with ddp.no_sync():
            return ddp(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ddp": None, "_reduced": [], "_shapes": []}  # a copy makes its own

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Forward and backward passes in the block only accumulate gradients here, as DDP's `no_sync`."""
        before, self._synchronise = self._synchronise, False
        try:
            yield
        finally:
            self._synchronise = before

    def synchronise(self, tensors: Iterable[Any]) -> None:
        """Gives all processes the first one's contents of these tensors, which must be the same ones everywhere."""
        if self.group.size == 1:
            return
        for mine in _parcels([t.detach() for t in tensors if isinstance(t, Tensor)]):
            for tensor, content in zip(mine, self.group.broadcast(None, mine)[1], strict=True):
                tensor.copy_(content)

    def synchronise_buffers(self) -> None:
        """Gives all processes the first one's buffers, such as running statistics."""
        self.synchronise(self.module.buffers())

    @property
    def gradient_bytes(self) -> int:
        """Bytes of gradients that every step reduces over the processes."""
        return sum(_size(p) for p in self.module.parameters() if p.requires_grad)

    def prepare(self) -> None:
        """Makes DDP anew now, if that is due, rather than in the next forward pass of training; collective."""
        if self.group.size > 1:
            self._current()

    def _current(self) -> DistributedDataParallel:
        """DDP for the shapes that the parameters have now."""
        if self._ddp is None or [p.shape for p in self._reduced] != self._shapes:
            self.renew()
            self._reduced = [p for p in self.module.parameters() if p.requires_grad]
            self._shapes = [p.shape for p in self._reduced]
            ddp = DistributedDataParallel(
                self.module,
                init_sync=False,
                gradient_as_bucket_view=True,
                **self._options,  # type: ignore[arg-type]
            )
            self._ddp = (ddp,)
        return self._ddp[0]

    def renew(self) -> None:
        """Lets go of DDP, of its hooks and its buckets, as large as the gradients; the next step has a new one.

        Happens by itself when parameters have changed their shapes; to be called where others have begun or
        ceased to require gradients.
        """
        if self._ddp is not None:
            self._ddp = None
            gc.collect()


def _parcels(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in runs of up to `_PARCEL` bytes, of which a broadcast makes two copies; a larger one by itself."""
    parcel: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if parcel and held + _size(tensor) > _PARCEL:
            yield parcel
            parcel, held = [], 0
        parcel.append(tensor)
        held += _size(tensor)
    if parcel:
        yield parcel


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _refuse_late_group() -> None:
    size = Group().size
    if size > 1:
        raise RuntimeError(
            f"this Replica was made before init_process_group joined {size} processes, so it would train alone; make "
            "it after that"
        )


def _is_on_cpu(module: nn.Module) -> bool:
    """Whether runs are to repeat to the bit.

    DDP packs gradients into its messages anew after its first step, in the order in which they came. The rounding of a
    sum of three or more depends on the place in a message, so that a run that is resumed would differ by a step
    in the old order. DDP does not do so where it looks for unused parameters.
    """
    return all(parameter.device.type == "cpu" for parameter in module.parameters())


def _placement(group: Group, svd: Svd, heat_rank: float, doing: Doing) -> Placement:
    if svd not in ("rank0", "spread", "heat"):
        raise ValueError(f"svd must be 'rank0', 'spread' or 'heat', found {svd!r}")
    if svd == "heat":
        return AllTogether(group, doing, heat_rank)
    if group.size == 1:
        return Here()
    return Spread(group, doing) if svd == "spread" else Rank0(group, doing)
