"""Requests to stop: a signal only sets a flag, and the loop saves and leaves at a step's end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hpclr.parallel.launch import SIGNALS


class StopRequests:
    """Remembers that somebody asked the run to stop."""

    def __init__(self) -> None:
        self.reason: str | None = None  # of a request to this process
        self.agreed = False  # all processes know of a request to one of them

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes signals while the run trains; a second Ctrl-C interrupts at once, as it does elsewhere."""
        wanted = [number for number in SIGNALS if not _is_ignored_hangup(number)]
        previous = {number: signal.signal(number, self._take) for number in wanted}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name


def _is_ignored_hangup(number: int) -> bool:
    """Under nohup a run goes on when its terminal closes."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
