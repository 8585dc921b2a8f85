"""Where the time of training goes, recorded about as often as a progress line is due."""

import time
from collections.abc import Callable

from hpclr.training import progress


class Stopwatch:
    """Adds up the seconds of `with` blocks as the host sees them; nothing waits for a device.

    Attributes:
        seconds: so far.
    """

    __slots__ = ("_began", "seconds")

    def __init__(self) -> None:
        self.seconds = self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self._began


class Pace:
    """Measures the steps of this process.

    Args:
        record: keeps a record: its kind, its step, numbers.
        memory: the most bytes held so far.
        step: optimiser steps done.

    Attributes:
        data: runs while training waits for a batch.
        check: while the method has its turn.
        save: while training stands still for a checkpoint.
        valid: while it validates.
    """

    def __init__(self, record: Callable[..., None], memory: Callable[[], int], step: int) -> None:
        self._record, self._memory = record, memory
        self._begin(step)

    def _begin(self, step: int) -> None:
        self.data, self.check, self.save, self.valid = Stopwatch(), Stopwatch(), Stopwatch(), Stopwatch()
        self._step, self._since = step, time.perf_counter()

    def look(self, step: int) -> None:
        """After every step: makes a record if the last one is some time ago."""
        if time.perf_counter() - self._since >= progress.SECONDS_BETWEEN_LINES:
            self.settle(step)

    def settle(self, step: int) -> None:
        """Makes a record of the steps since the last one, if there are any."""
        if step == self._step:
            return
        watches = {name: getattr(self, name).seconds for name in ("data", "check", "save", "valid")}
        spent = {name: round(seconds, 4) for name, seconds in watches.items()}
        seconds = round(time.perf_counter() - self._since, 4)
        self._record("pace", step, steps=step - self._step, seconds=seconds, **spent, memory=self._memory())
        self._begin(step)
