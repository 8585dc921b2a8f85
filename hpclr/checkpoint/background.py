"""Saving while training goes on: it stops only while its state is copied to host memory."""

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from hpclr.checkpoint.parts import PartReport
from hpclr.checkpoint.store import CheckpointStore
from hpclr.checkpoint.tree import Json, Piece, TreeLike
from hpclr.checkpoint.writer import size_of_part, size_on_disk

_Buffers: TypeAlias = dict[tuple[str, ...], torch.Tensor]
_Done: TypeAlias = tuple[int, PartReport | None]


@dataclass(frozen=True)
class SaveReport:
    """How a save has gone.

    Attributes:
        step: optimiser steps done.
        blocked: seconds in which the caller was held up: by the copy, or without one until all was over.
        seconds: seconds from the call of `save` until all was over.
        bytes: size of what was written, the parts of an index included; 0 if nothing was.
        error: why nothing was saved, or None.
        part: what the first process needs to know of a part that was written; None if it was none.
    """

    step: int
    blocked: float
    seconds: float
    bytes: int = 0
    error: Exception | None = None
    part: PartReport | None = None


class BackgroundSaver:
    """Saves trees by a thread, one at a time, from a copy in host memory.

    The copy's memory is kept and used again for the next tree. As a context manager it waits at the
    end, so that a save in flight is completed also if the block raises.

    Where tensors are sharded, every process calls `write_part`; once the reports of all are there and good, the first
    process calls `write_index` with them.

    Args:
        store: where to save.
        check: called with the tree before anything is written; what it raises is the save's failure.
    """

    def __init__(self, store: CheckpointStore, *, check: Callable[[Any], None] | None = None) -> None:
        self.store, self._check = store, check
        self._host = HostCopy()
        self._of_part: TreeLike = {}
        self._thread: threading.Thread | None = None
        self._reports: deque[SaveReport] = deque()

    def __enter__(self) -> "BackgroundSaver":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    @property
    def in_flight(self) -> bool:
        """Whether a tree is being saved."""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self, step: int, tree: TreeLike, *, metric: float | None = None, best: bool = False, copy: bool = True
    ) -> None:
        """Copy a tree and save the copy in the background; a save in flight is waited for first.

        Args:
            step: optimiser steps done.
            tree: as for `write_tree`; it may change as soon as this returns.
            metric: as for `CheckpointStore.save`.
            best: as for `CheckpointStore.save`.
            copy: false saves the tree itself, which must not change until nothing is in flight.

        Raises:
            TypeError, ValueError: the tree cannot be stored.
            MemoryError: there is no memory for the copy.
        """
        start = time.monotonic()
        self.wait()
        size_on_disk(tree)  # a wrong tree is the caller's mistake: it is raised here
        ours = self._host.take(tree) if copy else tree
        self._start(step, lambda: self._saved(step, ours, metric, best), start, blocks=not copy)

    def write_part(self, step: int, tree: TreeLike, process: int, processes: int, *, copy: bool = True) -> None:
        """Copy a tree and write this process's part of the copy in the background; a save in flight is waited for.

        Args:
            step: optimiser steps done.
            tree: as for `CheckpointStore.write_part`; it may change as soon as this returns.
            process: number of this process.
            processes: how many write a part.
            copy: false uses the tree itself, which must not change until the index is written.

        Raises:
            TypeError, ValueError: the tree cannot be stored.
            MemoryError: there is no memory for the copy.
        """
        start = time.monotonic()
        self.wait()
        size_of_part(tree)
        self._of_part = ours = self._host.take(tree) if copy else tree
        self._start(step, lambda: self._part_written(step, ours, process, processes), start, blocks=not copy)

    def write_index(
        self, step: int, parts: Sequence[PartReport], *, metric: float | None = None, best: bool = False
    ) -> None:
        """Save, in the background, the rest of the tree that `write_part` had, on the first process.

        Args:
            step: the same as there.
            parts: the reports of all processes, in their order.
            metric: as for `CheckpointStore.save`.
            best: as for `CheckpointStore.save`.
        """
        start = time.monotonic()
        self.wait()
        self._start(step, lambda: self._index_written(step, parts, metric, best), start, blocks=False)

    def finished(self) -> SaveReport | None:
        """The report of a save that has ended, each once, the oldest first; None if there is none. Does not wait."""
        return self._reports.popleft() if self._reports else None

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until no save is in flight, or for so many seconds; returns whether none is."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def _start(self, step: int, work: Callable[[], _Done], start: float, *, blocks: bool) -> None:
        """Starts the thread; a caller that says so counts as held up until it ends."""
        blocked = None if blocks else time.monotonic() - start
        thread = threading.Thread(target=self._run, args=(step, work, start, blocked), name="hpclr-save", daemon=False)
        thread.start()
        self._thread = thread

    def _run(self, step: int, work: Callable[[], _Done], start: float, blocked: float | None) -> None:
        """The thread."""
        done: _Done = 0, None
        fault = None
        try:
            done = work()
        except Exception as error:  # whatever it is, it must reach the one who asks for the report
            fault = error
        seconds = time.monotonic() - start
        self._reports.append(
            SaveReport(step, seconds if blocked is None else blocked, seconds, done[0], fault, done[1])
        )

    def _saved(self, step: int, tree: TreeLike, metric: float | None, best: bool) -> _Done:
        if self._check is not None:
            self._check(tree)
        path = self.store.save(step, tree, metric=metric, best=best)
        try:
            return path.stat().st_size, None
        except OSError:  # it is saved, whatever the file system says now
            return size_on_disk(tree), None

    def _part_written(self, step: int, tree: TreeLike, process: int, processes: int) -> _Done:
        if self._check is not None:
            self._check(tree)
        report = self.store.write_part(step, tree, process, processes)
        return report.part.bytes, report

    def _index_written(self, step: int, parts: Sequence[PartReport], metric: float | None, best: bool) -> _Done:
        path, size = self.store.save(step, self._of_part, parts=parts, metric=metric, best=best), 0
        with suppress(OSError):
            size = path.stat().st_size
        return size + sum(report.part.bytes for report in parts), None


class HostCopy:
    """Copies of trees in host memory, each in the memory of the one before as far as it fits."""

    def __init__(self) -> None:
        self._buffers: _Buffers = {}

    def take(self, tree: TreeLike) -> TreeLike:
        """A copy of a tree; it ends the life of the copy taken before.

        Raises:
            MemoryError: there is no memory for it.
        """
        before, self._buffers = self._buffers, {}
        devices: set[torch.device] = set()
        copied = self._copy(tree, (), before, devices)
        for device in devices:
            torch.accelerator.synchronize(device)
        return copied

    def _copy(self, tree: TreeLike, path: tuple[str, ...], before: _Buffers, devices: set[torch.device]) -> TreeLike:
        copied: dict[str, Any] = {}
        for key, node in tree.items():
            here = (*path, key)
            if isinstance(node, Mapping):
                copied[key] = self._copy(node, here, before, devices)
            elif isinstance(node, Json):
                copied[key] = copy.deepcopy(node)
            else:
                tensor = node.tensor if isinstance(node, Piece) else node
                ours = self._buffers[here] = _filled(before.pop(here, None), tensor.detach())
                copied[key] = replace(node, tensor=ours) if isinstance(node, Piece) else ours
                if not tensor.is_cpu:
                    devices.add(tensor.device)
        return copied


def _filled(buffer: torch.Tensor | None, tensor: torch.Tensor) -> torch.Tensor:
    """The buffer, or a new one if it does not fit, with a tensor's values; from a device they may still be coming."""
    if buffer is None or (buffer.dtype, buffer.shape) != (tensor.dtype, tensor.shape):
        buffer = _new_buffer(tensor)
    return buffer.copy_(tensor, non_blocking=True)


def _new_buffer(tensor: torch.Tensor) -> torch.Tensor:
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    except RuntimeError as error:  # torch's way to say that memory is out
        raise MemoryError(f"no memory for a copy of shape {tuple(tensor.shape)}, {tensor.dtype}: {error}") from error
