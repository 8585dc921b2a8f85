"""When a run is saved, and what follows if it cannot be."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from hpclr.checkpoint import BackgroundSaver, SaveReport, TreeLike
from hpclr.checkpoint.store import CheckpointStore
from hpclr.config.schema import Checkpoint
from hpclr.errors import HpclrError, RetryableError, message_of
from hpclr.parallel.group import Group
from hpclr.training.metrics import read_metrics

_LONGEST_SAVE = 3600.0  # seconds; a save that takes longer hangs, and the watch over the processes may say so
FIRST_PAUSE, _LONGEST_PAUSE = 30.0, 900.0  # seconds from a save that failed to the next try; each time twice as long
LAST_PAUSES = (3.0, 15.0)  # seconds between tries of the save with which a run ends


class Saving:
    """Saves a run on its first process, while training goes on; all processes hear of what goes wrong.

    A save that fails for a reason that may pass, such as a full disk, does not end the run: the checkpoints before it
    are as they were, and another is tried after a while. All processes call `save` and `settle`, in step; between
    them, `signals` of the first process reach all by way of `hear`.

    Args:
        store: the run's checkpoints.
        settings: when to save, and whether in the background.
        group: all processes.
        check: raises if a tree must not be saved; called in the background as well.
        note: says a line to the user.
        record: keeps a record of a save: its kind, its step, numbers.
        own: raises if the run directory is no longer this job's.
        doing: says what this process does.
        longest: seconds that a save takes, as far as is known.

    Attributes:
        longest: seconds that saves have taken at most.
    """

    def __init__(
        self,
        store: CheckpointStore,
        settings: Checkpoint,
        group: Group,
        *,
        check: Callable[[TreeLike], None],
        note: Callable[[str], None],
        record: Callable[..., None],
        own: Callable[[], None],
        doing: Callable[..., None],
        longest: float = 0.0,
    ) -> None:
        self.longest = longest
        self._settings, self._group, self._own, self._doing = settings, group, own, doing
        self._note, self._record = note, record

        store.guard = own
        self._saver = BackgroundSaver(store, check=check)
        self._interval = math.inf if settings.minutes is None else 60.0 * settings.minutes
        self._next = time.monotonic() + self._interval
        self._pause = FIRST_PAUSE
        self._fault: Exception | None = None
        self._due = self._troubled = False  # as all processes have heard

    def __enter__(self) -> "Saving":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait()  # what is being saved is saved, also if training ends with an error
        self._look()
        if error is not None and self._fault is not None and self._fault is not error:
            self._note(message_of(self._fault))

    def wait(self) -> None:
        """Waits until nothing is being saved, and shows meanwhile that this process lives."""
        end = time.monotonic() + _LONGEST_SAVE
        while not self._saver.wait(1.0):
            if time.monotonic() < end:
                self._doing("waiting for a checkpoint to be written")

    def is_done(self) -> bool:
        """Whether what was last saved is safe; waits for it."""

        def on_first() -> bool:
            self.wait()
            self._look()
            return self._fault is None

        return self._group.on_first(on_first)

    def signals(self) -> list[bool]:
        """What the first process has to tell all: that it is time to save, and that something is wrong with saving."""
        if not self._group.is_first:
            return [False, False]
        self._look()
        return [time.monotonic() >= self._next and not self._saver.in_flight, self._fault is not None]

    def hear(self, signals: Tensor) -> None:
        """Takes the sum of the signals of all processes."""
        due, troubled = signals.tolist()
        self._due |= due > 0
        self._troubled |= troubled > 0

    def due(self, step: int) -> bool:
        """Whether it is time to save."""
        every = self._settings.every
        return self._due or (every is not None and step % every == 0)

    def save(
        self,
        step: int,
        tree: TreeLike,
        *,
        metric: float | None = None,
        best: bool = False,
        pauses: Sequence[float] | None = None,
    ) -> None:
        """Saves a tree.

        Args:
            step: optimiser steps done.
            tree: what to save; counts on the first process only.
            metric: what the model is judged by.
            best: whether no checkpoint before is better.
            pauses: None: while training goes on. Else it is saved when this returns, and tried once more after each
                of these pauses (seconds).

        Raises:
            HpclrError: with `pauses`, on all processes: if it cannot be saved.
        """
        self._due = False

        def on_first() -> None:
            self._begin()
            if pauses is None:
                self._start(step, tree, metric, best, wait=not self._settings.background)
            else:
                self._insist(step, tree, metric, best, pauses)

        self._group.on_first(on_first)

    def _begin(self) -> None:
        """Waits for the save before; from here on the clock counts anew."""
        self.wait()
        self._look()
        self._next = time.monotonic() + self._interval

    def settle(self) -> None:
        """Tells all processes what is wrong with saving, if anything is.

        Raises:
            HpclrError: on all processes: if it will not pass.
        """
        if self._troubled:
            self._troubled = False
            if text := self._group.on_first(self._tell):
                self._note(text)

    # On the first process

    def _start(self, step: int, tree: TreeLike, metric: float | None, best: bool, *, wait: bool) -> None:
        try:
            self._saver.save(step, tree, metric=metric, best=best, copy=not wait)
        except Exception as error:  # whatever it is, all processes hear of it after this step
            self._failed(error)
        if wait:
            self.wait()
            self._look()

    def _insist(self, step: int, tree: TreeLike, metric: float | None, best: bool, pauses: Sequence[float]) -> None:
        if isinstance(self._fault, RetryableError):
            self._fault = None  # of a save before, which this one makes good
        for pause in (*pauses, None):
            self._start(step, tree, metric, best, wait=True)
            fault = self._taken()
            if fault is None:
                return
            if not isinstance(fault, RetryableError):
                raise fault
            if pause is None:
                raise RetryableError(f"{fault} Then the same command goes on from there.") from fault
            self._note(f"{fault} Trying again in {pause:g} s.")
            self._rest(pause)

    def _rest(self, seconds: float) -> None:
        """Waits, and shows meanwhile that this process lives."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._doing("waiting to save once more")
            time.sleep(min(left, 1.0))

    def _look(self) -> None:
        """Takes note of a save that has ended."""
        try:
            self._own()
        except HpclrError as error:
            self._fault = error
        report = self._saver.finished()
        if report is None:
            return
        self.longest = max(self.longest, report.seconds)
        if report.error is not None:
            self._failed(report.error)
        else:
            self._pause = FIRST_PAUSE
            self._record("save", report.step, **numbers(report))

    def _failed(self, error: Exception) -> None:
        if self._fault is None or isinstance(self._fault, RetryableError):
            self._fault = error  # of faults that do not pass, the first is the cause
        self._next = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _tell(self) -> str | None:
        fault = self._taken()
        if isinstance(fault, RetryableError):
            wait = max(0.0, self._next - time.monotonic())
            return f"{fault} Training goes on; another save is tried when one is due, and after {wait:.0f} s."
        if fault is not None:
            raise fault
        return None  # a later save has made it good

    def _taken(self) -> HpclrError | None:
        """What is wrong, as an error for people; it then counts as told."""
        error, self._fault = self._fault, None
        if error is None or isinstance(error, HpclrError):
            return error
        if isinstance(error, MemoryError):
            return RetryableError(
                f"there is no memory for the copy of the state that is saved while training goes on ({error}); set "
                "checkpoint.background=false, which stops training while it is saved, or ask for more memory."
            )
        return HpclrError(f"the run cannot be saved: unexpected {type(error).__name__}: {error}")


def usual_seconds(metrics: Path) -> float:
    """Seconds that most saves of a run took, by its records; 0 if there are none.

    Not the longest: a disk that hung once must not take the time from all later attempts.
    """
    seconds = [record["seconds"] for record in read_metrics(metrics) if record["kind"] == "save"]
    return statistics.median(seconds) if seconds else 0.0


def numbers(report: SaveReport) -> dict[str, Any]:
    """Of a save that is done: seconds in which training stood still, seconds in all, bytes written."""
    return {"blocked": round(report.blocked, 4), "seconds": round(report.seconds, 4), "bytes": report.bytes}
