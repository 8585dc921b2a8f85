"""A process's part in an attempt: its log, its heartbeat, the watch over the others, and how it ended."""

import contextlib
import faulthandler
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import msgspec

from hpclr.errors import StopRequestedError
from hpclr.output import printable
from hpclr.parallel.watch.attempt import heartbeat_path, log_path
from hpclr.parallel.watch.diagnosis import explain
from hpclr.parallel.watch.heartbeat import Heartbeat
from hpclr.parallel.watch.logs import Log, logged
from hpclr.parallel.watch.outcome import AttemptFailedError, Outcome, outcome_of, record_outcome
from hpclr.parallel.watch.watchdog import Watchdog, beat_interval


@contextmanager
def take_part(directory: Path, *, rank: int, world_size: int, host: str, timeout: float) -> Iterator[Heartbeat]:
    """Surrounds all that a process does in an attempt, from the moment that it knows the attempt's directory.

    What the processes of higher ranks write goes to their logs, also afterwards. After a failure only the process
    that noticed first gets its console back, to report it.

    Args:
        directory: of the attempt; exists.
        rank: of this process.
        world_size: number of processes.
        host: name of this node, for messages.
        timeout: seconds after which processes that make no progress are ended.

    Yields:
        The heartbeat, whose `phase` the caller calls wherever the process begins something else.

    Raises:
        AttemptFailedError: where processes work together and this or another one has failed; says which, and has
            the exit code that the failed one had. A process alone raises what was raised in it.
        StopRequestedError: as raised inside.
    """
    beat = Heartbeat(heartbeat_path(directory, rank), rank, world_size, host)
    with (
        logged(log_path(directory, rank), console=rank == 0) as log,
        _crashes_in(log.file),
        Watchdog(beat, directory, timeout, log),
    ):
        try:
            yield beat
        except StopRequestedError as stop:
            stop.shared = not _end(beat, directory, log, outcome_of(stop))
            raise
        except BaseException as error:  # SystemExit in the user's code is a failure, too
            _fail(error, beat, directory, log, beat_interval(timeout))
        else:
            _end(beat, directory, log, Outcome(0, "the run is finished"))


def _end(beat: Heartbeat, directory: Path, log: Log, outcome: Outcome) -> bool:
    """The end that was meant to be; the first process records it and speaks for all. Returns whether this is it."""
    speaks = beat.rank == 0 and record_outcome(directory, _placed(outcome, beat))
    if not speaks:
        log.silence()
    beat.last_word("saved" if outcome.code else "done", outcome.code, outcome.message)
    return speaks


def _fail(error: BaseException, beat: Heartbeat, directory: Path, log: Log, interval: float) -> None:
    """Finds out whose fault an error is, records it, and raises it in a form that says so."""
    if beat.world_size > 1:
        _let_finish()
    doing = beat.record().doing
    beat.phase(f"giving up {beat.now.phase}")  # in which it waits for nobody
    log.write("".join(traceback.format_exception(error)))
    outcome = explain(error, directory, beat.rank, beat.world_size, interval)
    own = outcome.rank is None
    if own:
        where = f"{beat.record().who}, {doing}: " if beat.world_size > 1 else ""
        outcome = _placed(msgspec.structs.replace(outcome, message=f"{where}{outcome.message}"), beat)
    first = record_outcome(directory, outcome)
    beat.last_word("failed" if own else "left", outcome.code, outcome.message)
    log.write(f"hpclr: {outcome.message}")
    if beat.world_size == 1:
        raise error
    if first:
        log.speak(f"hpclr: {printable(outcome.message)}")  # now: there may be no later
    log.silence()
    failed = AttemptFailedError(outcome)
    failed.shared = True
    raise failed from error


def _let_finish() -> None:
    """Launchers end the survivors of a death at once; this one has a report to write, and ends by itself."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)


def _placed(outcome: Outcome, beat: Heartbeat) -> Outcome:
    return msgspec.structs.replace(outcome, rank=beat.rank, host=beat.host, step=beat.now.step)


@contextmanager
def _crashes_in(log: TextIO) -> Iterator[None]:
    """A crash of native code leaves the stacks of all threads in the log."""
    was = faulthandler.is_enabled()
    faulthandler.enable(log)
    try:
        yield
    finally:
        faulthandler.disable()
        if was:
            with contextlib.suppress(OSError, ValueError, AttributeError):  # a process may be without standard error
                faulthandler.enable()
