"""Requests to stop: they only set a flag, and the loop saves and leaves at a step's end.

No signal reaches the processes through every launcher, and a job's end is not always announced by one. So the first
process also looks for a file in the run directory, and at the clock.
"""

import math
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from hpclr.errors import UsageError
from hpclr.output import printable
from hpclr.parallel.launch import SIGNALS

DEADLINE_VARIABLE = "HPCLR_DEADLINE"
_POLL = 1.0  # seconds from one look at the file to the next
_SLACK = 60.0  # seconds by which Slurm may be early, clocks may differ and other things take longer
_SHOWN = 200  # bytes of the file


class StopRequests:
    """Remembers that somebody asked the run to stop.

    Args:
        file: is a request if it is there; None: no file is.
        deadline: when the job's time is up, by `time.monotonic()`.
        margin: seconds before that in which the run is to leave; None: two of the longest saves, the longest step and
            a minute.
        earlier: what of `file` was there before this start, if not what is there now.

    Attributes:
        reason: why this process wants to stop, if it does; completes "…: the run is saved".
        agreed: whether all processes know that one of them wants to.
    """

    def __init__(
        self,
        file: Path | None = None,
        deadline: float = math.inf,
        margin: float | None = None,
        earlier: Path | None = None,
    ) -> None:
        self.reason: str | None = None
        self.agreed = False
        self._file, self._deadline, self._margin = file, deadline, margin
        self._earlier = _identity(earlier or file)
        self._signalled = False
        self._poll_at = -math.inf
        self._looked_at: float | None = None
        self._longest_step = 0.0

    def forget_earlier(self) -> None:
        """Removes the request that was there before this start; to be called by whoever holds the run directory.

        Raises:
            OSError: if it cannot be removed.
        """
        if self._file is not None and self._earlier is not None and _identity(self._file) == self._earlier:
            self._file.unlink(missing_ok=True)

    def look(self, longest_save: float = 0.0) -> bool:
        """Whether this process wants to stop; to be called before the first step and whenever processes may agree.

        Args:
            longest_save: seconds that saving has taken at most.
        """
        now = time.monotonic()
        if self._looked_at is not None:
            self._longest_step = max(self._longest_step, now - self._looked_at)
        self._looked_at = now
        found = self._found_on_disk(now) or self._found_by_clock(now, longest_save)
        if self.reason is None and found is not None:
            self.reason = found
        return self.reason is not None

    def _found_on_disk(self, now: float) -> str | None:
        if self._file is None or now < self._poll_at:
            return None
        self._poll_at = now + _POLL
        line = _first_line(self._file)
        if line is None:
            return None
        return f"STOP ({': '.join(line.split(maxsplit=1))})" if line else "STOP"

    def _found_by_clock(self, now: float, longest_save: float) -> str | None:
        left = self._deadline - now
        measured = 2 * longest_save + self._longest_step + _SLACK
        if left > (measured if self._margin is None else self._margin):
            return None
        when = f"near (in {left:.0f} s)" if left > 0 else f"over (for {-left:.0f} s)"
        return f"the time limit of the job is {when}"

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
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True
        self.reason = self.reason or f"{signal.Signals(number).name} received"


def deadline_of(environ: Mapping[str, str]) -> float:
    """When the job's time is up, by `time.monotonic()`; infinite where nothing says so.

    Raises:
        UsageError: if HPCLR_DEADLINE is no time.
    """
    value = environ.get(DEADLINE_VARIABLE)
    if not value:
        return math.inf
    if re.fullmatch(r"[0-9]{10,11}(\.[0-9]*)?", value) is None:  # from 2001 on, and no milliseconds
        raise UsageError(  # in the same words at any time: processes whose words differ would all be heard
            f"{DEADLINE_VARIABLE} is {printable(value[:40])!r}; expected the time at which the job ends, in seconds "
            "since 1970, such as `date -d '+1 hour' +%s` prints for in an hour. Correct it in the batch script, or "
            "unset it."
        )
    return time.monotonic() + float(value) - time.time()


def _identity(path: Path | None) -> tuple[int, int, int] | None:
    """What tells a file from one that takes its place; None if there is none."""
    try:
        found = None if path is None else path.stat()
    except OSError:
        return None
    return found and (found.st_dev, found.st_ino, found.st_mtime_ns)


def _first_line(path: Path) -> str | None:
    """The beginning of a file by anybody, as text to show; None if it is not there, or cannot be read now."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe of that name must not hold up the run
        try:
            content = os.read(descriptor, _SHOWN)
        finally:
            os.close(descriptor)
    except OSError:
        return None
    return printable(content.decode(errors="replace").partition("\n")[0].strip())


def _is_ignored_hangup(number: int) -> bool:
    """Under nohup a run goes on when its terminal closes."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
