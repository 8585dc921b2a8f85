"""Worker processes that read and augment ahead of training.

Not torch's DataLoader, for three things that a long run on many nodes needs: a worker's death is seen at once where
batches are taken (its pipe closes), not within five seconds or out of a signal handler in the middle of a training
step; shared memory is allocated once, so that it is too small at the start or never, and is not mapped anew for every
batch; and workers take no notice of the signals by which batch systems ask a whole job to stop.
"""

import atexit
import contextlib
import math
import multiprocessing
import shutil
import signal
import traceback
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hpclr.data.batches import Batch, BatchLoader, Form, empty
from hpclr.errors import RetryableError

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps what processes share
_INDEX = Form((), torch.int64)
_ADVICE = "Set data.workers=0, or fewer workers,"
_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


class Workers:
    """Processes that each make one piece of every batch, several batches ahead.

    Worker w always makes piece w, which comes from the same chunks in every batch of a window, so that no
    worker reads all chunks.

    Args:
        loader: what makes the batches; its split, where it is in memory, moves to memory that all share.
        count: how many workers.
        prefetch: how many batches they may be ahead.
        pinned: whether x of a batch is to be in page-locked memory.

    Raises:
        RetryableError: if they cannot be started.
    """

    def __init__(self, loader: BatchLoader, count: int, prefetch: int, *, pinned: bool = False) -> None:
        self._loader, self._pinned = loader, pinned
        self._workers: list[_Worker] = []
        atexit.register(self.close)  # multiprocessing would wait at exit for workers that do not end by themselves
        try:
            _share_split(loader)
            with _stop_signals_blocked():
                for number in range(count):
                    self._workers.append(_Worker(loader, (number, count), prefetch))
        except BaseException:
            self.close()
            raise

    def request(self, epoch: int, index: int, slot: int) -> None:
        """Asks for a batch; of those asked for and not yet taken each needs a slot of its own, below `prefetch`."""
        for worker in self._workers:
            worker.request(epoch, index, slot)

    def take(self) -> Batch:
        """The batch that was asked for first.

        Raises:
            RetryableError: if a worker has died.
            Exception: whatever went wrong in a worker, as it was raised there.
        """
        pieces = [worker.take() for worker in self._workers]
        samples = sum(len(piece.y) for piece in pieces)
        x = empty((samples, *self._loader.x_form.shape), self._loader.x_form.dtype, pinned=self._pinned)
        torch.cat([piece.x for piece in pieces], out=x)
        y, indices = (torch.cat([getattr(piece, name) for piece in pieces]) for name in ("y", "indices"))
        mixed = [piece.y_mixed for piece in pieces if piece.y_mixed is not None]
        return Batch(x, y, indices, torch.cat(mixed) if mixed else None, pieces[0].lam, pieces[0].weight)

    def close(self) -> None:
        """Ends the workers; they hold nothing that could be lost."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()


class _Slots(NamedTuple):
    """Shared memory for pieces: of each field as many as a worker may be ahead, (prefetch, samples, …)."""

    x: Tensor
    y: Tensor
    indices: Tensor
    y_mixed: Tensor  # for no samples where nothing is mixed


class _Worker:
    """One process, the pipe to it, and the shared memory in which it leaves its pieces."""

    def __init__(self, loader: BatchLoader, piece: tuple[int, int], prefetch: int) -> None:
        self._name = f"worker {piece[0]} of {piece[1]} (data.workers)"
        self._slots = _allocate(loader, piece[1], prefetch)
        self._connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(  # MPI and threads forbid fork
            target=_work, args=(loader, piece, self._slots, theirs), daemon=True, name=self._name
        )
        try:
            self._process.start()
        except OSError as error:
            raise RetryableError(f"{self._name} cannot be started: {error}. {_ADVICE} or free memory.") from error
        finally:
            theirs.close()  # so that the pipe ends when the worker does

    def request(self, epoch: int, index: int, slot: int) -> None:
        try:
            self._connection.send((epoch, index, slot))
        except OSError as error:
            raise self._death() from error

    def take(self) -> Batch:
        """The next piece, in memory that the worker will write to again after the next request."""
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(answer, _Failure):
            raise answer.error from _Remote(f"in {self._name}:\n{answer.text}")
        slot, count, mixed, lam, weight = answer
        x, y, indices, y_mixed = (field[slot, :count] for field in self._slots)
        return Batch(x, y, indices, y_mixed if mixed else None, lam, weight)

    def kill(self) -> None:
        self._connection.close()
        if self._process.pid is not None:
            self._process.kill()

    def join(self) -> None:
        if self._process.pid is not None:
            self._process.join()

    def _death(self) -> RetryableError:
        self._process.join(5)
        code = self._process.exitcode
        how = f"was ended by signal {-code} ({signal.strsignal(-code)})" if code and code < 0 else f"ended with {code}"
        why = {
            -signal.SIGBUS: f"{_SHARED_MEMORY} is probably full: make it larger (docker: --shm-size), or free it.",
            -signal.SIGKILL: "Probably memory ran out: ask for more, or lower data.window or data.prefetch.",
        }.get(code or 0, "What it wrote to the log says more.")
        return RetryableError(f"{self._name}, process {self._process.pid}, {how}. {why} Or set data.workers=0.")


class _Remote(Exception):  # noqa: N818 - not raised, only shown as the cause
    """Where in a worker an error was raised."""


class _Failure:
    """An error on its way from a worker."""

    def __init__(self, error: Exception) -> None:
        self.error, self.text = error, traceback.format_exc()


def _work(loader: BatchLoader, piece: tuple[int, int], slots: _Slots, connection: Connection) -> None:
    """What a worker does until its parent closes the pipe, or ends in whatever way."""
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            epoch, index, slot = connection.recv()
            connection.send(_answer(loader, piece, (epoch, index), slots, slot))


def _answer(
    loader: BatchLoader, piece: tuple[int, int], place: tuple[int, int], slots: _Slots, slot: int
) -> tuple[int, int, bool, float, float] | _Failure:
    """Makes a piece and leaves it in a slot; returns what else belongs to it, or what went wrong."""
    try:
        batch = loader.batch(*place, piece)
    except Exception as error:
        return _Failure(error)
    count, mixed = len(batch.y), batch.y_mixed is not None
    for field, values in zip(slots, (batch.x, batch.y, batch.indices, batch.y_mixed), strict=True):
        if values is not None:
            field[slot, :count].copy_(values)
    return slot, count, mixed, batch.lam, batch.weight


def _allocate(loader: BatchLoader, pieces: int, prefetch: int) -> _Slots:
    """Shared memory for `prefetch` pieces."""
    samples, y = loader.most_samples(pieces), loader.y_form
    mixed = y if loader.mixup else Form((0,), y.dtype)
    forms = [Form((prefetch, samples, *form.shape), form.dtype) for form in (loader.x_form, y, _INDEX, mixed)]
    needed = sum(math.prod(form.shape) * form.dtype.itemsize for form in forms)
    with _sharing(needed, f"{prefetch} batches prefetched by one of {pieces} workers"):
        return _Slots(*(torch.empty(form.shape, dtype=form.dtype).share_memory_() for form in forms))


def _share_split(loader: BatchLoader) -> None:
    """Moves a split that is in memory to where one copy serves all workers."""
    if loader.kept is not None and not all(tensor.is_shared() for tensor in loader.kept.values()):
        needed = sum(tensor.numel() * tensor.element_size() for tensor in loader.kept.values())
        with _sharing(needed, f"the {loader.split} split, which is kept in memory (data.in_memory),"):
            for tensor in loader.kept.values():
                tensor.share_memory_()


@contextlib.contextmanager
def _sharing(needed: int, what: str) -> Iterator[None]:
    """Names what does not fit into shared memory; written to beyond what there is, it would end the process."""
    free = shutil.disk_usage(_SHARED_MEMORY).free
    message = (
        f"{what} needs {needed / 1e6:.0f} MB of {_SHARED_MEMORY}, which has {free / 1e6:.0f} MB free. {_ADVICE} or "
        f"make {_SHARED_MEMORY} larger (docker: --shm-size; Apptainer takes the host's)."
    )
    if needed > free:
        raise RetryableError(message)
    try:
        yield
    except RuntimeError as error:  # others were quicker
        raise RetryableError(f"{message} ({error})") from error


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Processes started within never see these signals: the parent decides when they end.

    Batch systems and launchers signal all processes of a job, and training goes on for a while after that to save.
    What comes in the meantime reaches the parent when the block ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # multiprocessing's own helper; starting it unblocks some of them again
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
