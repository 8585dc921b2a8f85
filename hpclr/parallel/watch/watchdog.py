"""The thread that beats for a process, and ends it when the processes of the attempt cannot go on.

It must work while the main thread is blocked in a collective operation: it looks at the attempt's directory, at the
table of processes and at its own monotonic clock, and at nothing that needs another process.
"""

import faulthandler
import os
import threading
import time
from pathlib import Path

from hpclr.errors import EXIT_RETRY
from hpclr.parallel.watch.attempt import heartbeat_path
from hpclr.parallel.watch.diagnosis import diagnose, obvious
from hpclr.parallel.watch.heartbeat import Heartbeat, Record, pid_namespace, process_state, read_heartbeat
from hpclr.parallel.watch.logs import Log
from hpclr.parallel.watch.outcome import Outcome, read_outcome, record_outcome

_LONGEST_INTERVAL = 1.0  # seconds
_LONGEST_TICK = 0.25  # seconds; a death on the same machine is seen within it
_GRACE = 3  # beats in which the main thread may come out of a collective operation by itself
_RESERVE = 5  # beats from giving up to the end of the process, diagnosis included
_LAUNCHER = os.getppid()  # when this is imported: a launcher may be gone before the watch begins


def beat_interval(timeout: float) -> float:
    """Seconds between two beats, for a timeout in seconds."""
    return min(_LONGEST_INTERVAL, timeout / 20)


class Watchdog:
    """Beats and watches while a process takes part in an attempt; a context manager.

    It ends the process, with the stacks of all threads in its log, if its launcher is gone, if its main thread makes
    no progress, or if another process has failed and the main thread waits for it all the same. Every process also
    keeps an eye on the one of the next rank where that is on the same machine, so that a death there is noticed
    before any collective operation gives up, and before a launcher has ended the witnesses.

    Args:
        beat: of this process.
        directory: of the attempt.
        timeout: seconds within which this process ends after its progress has; math.inf: it waits for ever.
        log: where stacks go, and the console.
    """

    def __init__(self, beat: Heartbeat, directory: Path, timeout: float, log: Log) -> None:
        self._beat, self._directory, self._log = beat, directory, log
        self.interval = beat_interval(timeout)
        self._threshold = timeout - _RESERVE * self.interval
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hpclr watchdog", daemon=True)
        self._next_path = heartbeat_path(directory, (beat.rank + 1) % beat.world_size)
        self._next: Record | None = None
        self._failure: Outcome | None = None
        self._stalled = 0.0  # seconds without progress, of those in which this thread could run
        self._failing = 0.0  # likewise, since a failure was noticed
        self._seen = beat.now

    def __enter__(self) -> "Watchdog":
        self._beat.write()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        tick = min(self.interval, _LONGEST_TICK)
        last, due = time.monotonic(), 0.0
        while not self._over.wait(tick):
            now = time.monotonic()
            awake = min(now - last, self.interval)  # a job that was suspended for an hour has not stalled for one
            last, due = now, due - awake
            self._count(awake)
            if due <= 0:
                due = self.interval
                self._beat.write()
                self._read_files()
            self._look_around()
            self._judge()

    def _count(self, seconds: float) -> None:
        now = self._beat.now
        self._stalled = self._stalled + seconds if now is self._seen else 0.0
        self._failing = self._failing + seconds if self._failure is not None else 0.0
        self._seen = now

    def _read_files(self) -> None:
        """What other processes have written; a failure is only looked for where there is reason to."""
        if self._next is None:
            self._next = read_heartbeat(self._next_path)
        if self._failure is None and self._stalled >= self.interval:
            found = read_outcome(self._directory)
            self._failure = found if found is not None and found.is_failure else None

    def _look_around(self) -> None:
        """What this machine says of the launcher and of the process of the next rank."""
        if self._beat.world_size == 1:
            return
        if os.getppid() != _LAUNCHER:
            beat = self._beat
            message = f"{beat.record().who} has lost its launcher (pid {_LAUNCHER}), and with it the other processes"
            self._leave(Outcome(EXIT_RETRY, message, beat.rank, beat.host, beat.now.step))
        if self._failure is None and self._next is not None and not self._next.ending:
            self._failure = self._death_of(self._next)

    def _death_of(self, peer: Record) -> Outcome | None:
        """Records the death of a peer of this machine that left no last word."""
        if peer.pid_namespace != pid_namespace() or process_state(peer.pid):
            return None
        self._next = read_heartbeat(self._next_path) or peer  # it may have had a last word by now
        found = obvious(self._directory, {peer.rank: self._next})
        if found is None:
            return None
        self._record(found.outcome())
        return found.outcome()

    def _judge(self) -> None:
        """Ends the process if there is reason to."""
        if self._failure is not None and self._seen.waiting:
            if min(self._failing, self._stalled) >= _GRACE * self.interval:
                self._leave(self._failure)
        elif self._stalled >= self._threshold:
            found = diagnose(self._directory, self._beat.world_size, self.interval, self._beat.write)
            busy = found.record.seconds if found.state == "hanging" and found.record is not None else self._threshold
            if busy < self._threshold:
                self._stalled = busy  # the others wait as long as one is at work and comes on
            elif self._beat.now is self._seen:  # it may have come round meanwhile
                self._leave(found.outcome())

    def _record(self, outcome: Outcome) -> None:
        """The first to know writes it down and speaks."""
        if record_outcome(self._directory, outcome):
            self._log.speak(f"hpclr: {outcome.message}")

    def _leave(self, outcome: Outcome) -> None:
        if self._over.is_set():
            return
        self._record(outcome)
        agreed = read_outcome(self._directory) or outcome
        self._beat.last_word("failed" if agreed.rank == self._beat.rank else "left", agreed.code, agreed.message)
        self._log.write(f"hpclr: {agreed.message}\nWhat each thread of this process was doing:")
        faulthandler.dump_traceback(self._log.file)
        os._exit(agreed.code)
