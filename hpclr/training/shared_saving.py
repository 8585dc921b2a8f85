"""Saving a run whose weights are shared out over its processes: each writes its part, then the first one the index."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import msgspec

from hpclr.checkpoint import PartReport, SaveReport, TreeLike
from hpclr.errors import HpclrError, RetryableError
from hpclr.training.saving import FIRST_PAUSE, Saving, numbers


class SharedSaving(Saving):
    """As `Saving`, by all processes at the same time; training goes on when a checkpoint is whole.

    What goes wrong on one process is told to all, and has the same consequences as there.
    """

    def save(
        self,
        step: int,
        tree: TreeLike,
        *,
        metric: float | None = None,
        best: bool = False,
        pauses: Sequence[float] | None = None,
    ) -> None:
        """As `Saving.save`; of what is shared out, `tree` holds this process's rows."""
        self._due = False
        self._group.on_first(self._begin)
        if pauses is None:
            fault = self._try(step, tree, metric, best)
            if fault is not None and self._group.is_first:
                self._failed(fault)
            return
        self._fault = None  # of a save before, which this one makes good
        for pause in (*pauses, None):
            fault = self._try(step, tree, metric, best)
            if fault is None:
                return
            self._rest_before_next(fault, pause)

    def _try(self, step: int, tree: TreeLike, metric: float | None, best: bool) -> HpclrError | None:
        """A checkpoint, or why there is none; the same on all processes."""
        start = time.monotonic()
        try:
            part = self._group.together(lambda: self._write_part(step, tree))
            plain = self._group.gather(msgspec.to_builtins(part))
            parts = [msgspec.convert(one, PartReport) for one in plain]
            self._group.on_first(lambda: self._write_index(step, parts, metric, best, start))
        except HpclrError as error:
            self._group.on_first(lambda: self._discard(step))
            return error
        return None

    def _write_part(self, step: int, tree: TreeLike) -> PartReport:
        self._saver.write_part(step, tree, self._group.rank, self._group.size, copy=False)
        part = self._done().part
        assert part is not None
        self._doing("waiting for the others to save", step, waiting=True)
        return part

    def _write_index(
        self, step: int, parts: Sequence[PartReport], metric: float | None, best: bool, start: float
    ) -> None:
        self._doing("saving", step)
        self._saver.write_index(step, parts, metric=metric, best=best)
        report = self._done()
        seconds = time.monotonic() - start  # of the parts as well, in all of which training waits
        self.longest = max(self.longest, seconds)
        self._pause = FIRST_PAUSE
        self._record("save", step, **numbers(replace(report, blocked=seconds, seconds=seconds)))

    def _done(self) -> SaveReport:
        """What the saver has to report, once it has done its work."""
        self.wait()
        report = self._saver.finished()
        assert report is not None
        if report.error is not None:
            raise report.error
        return report

    def _discard(self, step: int) -> None:
        with suppress(HpclrError, OSError):
            self._saver.store.discard_parts(step)

    def _rest_before_next(self, fault: HpclrError, pause: float | None) -> None:
        if not isinstance(fault, RetryableError):
            raise fault
        if pause is None:
            raise RetryableError(f"{fault} Then the same command goes on from there.") from fault
        if self._group.is_first:
            self._note(f"{fault} Trying again in {pause:g} s.")
        self._rest(pause)
