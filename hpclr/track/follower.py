"""Hands the records of a run to programs that show them, such that none of these can harm or delay the training.

Nothing is handed over in memory: each sink has a thread that reads metrics.jsonl behind the training. A sink that is
slow or hangs falls behind; one that fails is told of once, opened anew after a while, and given all it missed.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

from hpclr.output import say
from hpclr.track.records import Record, Tail, record_of

LAST_WAIT = 10.0  # seconds that the end of a run waits for all sinks together
LATER_WAIT = 600.0  # likewise if nobody trains: a finished run that is started once more
_INTERVAL = 2.0  # seconds from one look at the file to the next
_FIRST_PAUSE, _LONGEST_PAUSE = 30.0, 900.0  # seconds from a failure to the next try; each time twice as long
_AT_ONCE = 100  # records
_REST = 4.0  # seconds of rest for one of work: what is caught up on must not take the interpreter from the training


class Sink(Protocol):
    """Shows records somewhere.

    One that is opened is given all records of the run so far, in order, then those that come; what it or one before
    it has of them already must not appear twice. It may raise anything.
    """

    def write(self, records: Sequence[Record]) -> None:
        """Takes the next records."""

    def close(self) -> None:
        """Ends it; it may have been given all, or not."""


@contextmanager
def followed(metrics: Path, sinks: Mapping[str, Callable[[], Sink]], *, finished: bool = False) -> Iterator[None]:
    """Has sinks follow a metrics file while the block goes on, and for a moment after it.

    Args:
        metrics: the file; it is only added to in the meantime.
        sinks: what people call each, and what opens it; called in the sink's own thread.
        finished: whether nobody trains any more, so that there is time for what the sinks have missed.
    """
    followers = [_Follower(metrics, name, sink) for name, sink in sinks.items()]
    try:
        yield
    finally:
        end = time.monotonic() + (LATER_WAIT if finished else LAST_WAIT)
        for follower in followers:
            follower.ending.set()
        for follower in followers:
            follower.wait(end)


class _Follower:
    """One sink and its thread."""

    def __init__(self, metrics: Path, name: str, opened: Callable[[], Sink]) -> None:
        self._metrics, self._name, self._open = metrics, name, opened
        self._warned = False
        self.ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"hpclr-{name}", daemon=True)
        self._thread.start()

    def wait(self, end: float) -> None:
        """Waits until the sink has taken all, or this time (monotonic seconds) has come."""
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            self._warn("it does not take the last records in time", "Starting the run again gives it what it lacks")

    def _work(self) -> None:
        pause = _FIRST_PAUSE
        while not self._try():
            if self.ending.is_set():
                return
            self.ending.wait(pause)  # at the end it is tried once more
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _try(self) -> bool:
        """Follows to the end; False if the sink has failed."""
        try:
            with closing(self._open()) as sink:
                self._feed(sink)
        except Exception as error:  # whatever a sink does, it is not the training's concern
            self._warn(f"{type(error).__name__}: {error}")
            return False
        return True

    def _feed(self, sink: Sink) -> None:
        tail, ending = Tail(self._metrics), False
        while not ending:
            ending = self.ending.is_set()  # what is in the file by now is read after this
            while lines := tail.read():
                if tail.restarts:
                    raise RuntimeError(f"{self._metrics} was replaced while it was read")
                self._hand_over(lines, sink)
            if not ending:
                self.ending.wait(_INTERVAL)

    def _hand_over(self, lines: list[bytes], sink: Sink) -> None:
        for first in range(0, len(lines), _AT_ONCE):
            began = time.thread_time()  # waiting for a server takes nothing from the training
            found = map(record_of, lines[first : first + _AT_ONCE])
            sink.write([record for record in found if record is not None])
            self.ending.wait(_REST * (time.thread_time() - began))

    def _warn(self, what: str, then: str = "Training goes on") -> None:
        """Once."""
        if not self._warned:
            self._warned = True
            what, records = what.rstrip("."), self._metrics.name
            say(f"hpclr: warning: {self._name}: {what}. {then}, and {records} has all records.")
