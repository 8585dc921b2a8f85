"""Who is to blame when processes stand still or are gone: read from their heartbeats, without their help."""

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import msgspec

from hpclr.errors import EXIT_RETRY, HpclrError
from hpclr.parallel.watch.attempt import heartbeat_path, log_path
from hpclr.parallel.watch.heartbeat import Record, pid_namespace, process_state, read_heartbeat
from hpclr.parallel.watch.outcome import Outcome, outcome_of, read_outcome, record_outcome

State = Literal["failed", "dead", "missing", "silent", "hanging", "waiting"]
PATIENCE = 2.5  # beats after which a process that shows none counts as silent
SEARCH = 2.0  # seconds in which a failed process leaves its record, once its peers have noticed
_PEERS = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|timed? ?out|caused pair closure|end of file"
    r"|ncclRemoteError|remote process|communicator was aborted|failed to (recv|send)",
    re.IGNORECASE,
)


class Diagnosis(msgspec.Struct, frozen=True):
    """The process to blame, and why, in a sentence."""

    state: State
    rank: int
    message: str
    record: Record | None = None  # None: it never wrote one

    def outcome(self) -> Outcome:
        """What this means for the attempt: the process's own error, else a fault worth retrying."""
        record = self.record
        code = record.code if record is not None and self.state == "failed" else EXIT_RETRY
        place = (None, None) if record is None else (record.host, record.step)
        return Outcome(code, self.message, self.rank, *place)


def diagnose(
    directory: Path, world_size: int, interval: float, meanwhile: Callable[[], None] = lambda: None
) -> Diagnosis:
    """Finds the process that the others wait for; takes at most a few beats.

    Args:
        directory: of the attempt.
        world_size: number of processes.
        interval: seconds between two beats.
        meanwhile: called again and again; a process that diagnoses goes on beating with it, lest others blame it.
    """
    first = read_all(directory, world_size)
    found = obvious(directory, first)
    if found is not None:
        return found
    silent, now = _silent(directory, first, interval, meanwhile)
    return obvious(directory, now) or _slow(directory, now, silent)


def obvious(directory: Path, records: dict[int, Record | None]) -> Diagnosis | None:
    """A process whose own words or whose absence from this machine say enough; None if there is none."""
    present = [record for record in records.values() if record is not None]
    for record in present:
        if record.ending == "failed":
            return Diagnosis("failed", record.rank, record.message, record)
    here = pid_namespace()
    dead = [r for r in present if not r.ending and r.pid_namespace == here and here and not process_state(r.pid)]
    return _dead(directory, dead) if dead else None


def explain(error: BaseException, directory: Path, rank: int, world_size: int, interval: float) -> Outcome:
    """What an error of this process means: a collective that broke is the fault of another process.

    Looks often, as launchers give the survivors of a death about a second, but no longer than a few beats.
    """
    own, shared = outcome_of(error), getattr(error, "shared", False)
    if world_size == 1 or not (shared or is_of_peers(error)):
        return own
    deadline = time.monotonic() + SEARCH
    while time.monotonic() < deadline:
        found = read_outcome(directory)
        if found is not None and found.is_failure:
            return found
        others = {r: record for r, record in read_all(directory, world_size).items() if r != rank}
        seen = obvious(directory, others)
        if seen is not None:
            return seen.outcome()
        time.sleep(0.02)
    if shared:
        return msgspec.structs.replace(own, rank=0)
    seen = diagnose(directory, world_size, interval)
    return Outcome(
        EXIT_RETRY, f"{seen.message}; seen by rank {rank}, whose collective operation failed: {error}", seen.rank
    )


def is_of_peers(error: BaseException) -> bool:
    """Whether an error may come of another process: of torch.distributed, MPI or a connection."""
    if isinstance(error, HpclrError):
        return False
    if isinstance(error, ConnectionError) or type(error).__name__ in ("DistNetworkError", "DistStoreError"):
        return True
    from_mpi = type(error).__module__.startswith("mpi4py")
    return from_mpi or (isinstance(error, RuntimeError) and _PEERS.search(str(error)) is not None)


def post_mortem(directory: Path) -> Outcome:
    """How an attempt ended whose processes are all gone; writes `exit.json` if they could not.

    Args:
        directory: of the attempt.
    """
    known = read_outcome(directory)
    if known is not None:
        return known
    outcome = _from_what_is_left(directory)
    record_outcome(directory, outcome)
    return outcome


def read_all(directory: Path, world_size: int) -> dict[int, Record | None]:
    """The heartbeats of all ranks."""
    return {rank: read_heartbeat(heartbeat_path(directory, rank)) for rank in range(world_size)}


def _from_what_is_left(directory: Path) -> Outcome:
    records = [r for path in directory.glob("rank-*.heartbeat") if (r := read_heartbeat(path)) is not None]
    if not records:
        return Outcome(EXIT_RETRY, f"the processes ended before they left a sign of life in {directory}")
    for record in records:
        if record.ending == "failed":
            return Outcome(record.code, record.message, record.rank, record.host, record.step)
    silent = [record for record in records if not record.ending]
    if silent:
        return _dead(directory, silent).outcome()
    first = min(records, key=lambda record: record.rank)
    if first.ending == "left":
        return Outcome(first.code, first.message)
    return Outcome(first.code, first.message, first.rank, first.host, first.step)


def _silent(
    directory: Path, first: dict[int, Record | None], interval: float, meanwhile: Callable[[], None]
) -> tuple[set[int], dict[int, Record | None]]:
    """The ranks that show no beat for a while, and the last records of all; looks no longer than it must."""
    silent = {rank for rank, record in first.items() if record is None or not record.ending}
    now = dict(first)
    deadline = time.monotonic() + PATIENCE * interval
    while silent and time.monotonic() < deadline:
        meanwhile()
        time.sleep(interval / 5)
        for rank in list(silent):
            before, now[rank] = first[rank], read_heartbeat(heartbeat_path(directory, rank)) or now[rank]
            if _differ(before, now[rank]):
                silent.discard(rank)
    return silent, now


def _differ(before: Record | None, now: Record | None) -> bool:
    return now is not None and (before is None or now.beat != before.beat)


def _slow(directory: Path, records: dict[int, Record | None], silent: set[int]) -> Diagnosis:
    """The culprit among processes of which none has failed or died in sight."""
    missing = [rank for rank in silent if records[rank] is None]
    if missing:
        rank = min(missing)
        return Diagnosis(
            "missing", rank, f"rank {rank} never started: it left no sign of life in {directory}{_also(missing)}"
        )
    present = [record for record in records.values() if record is not None and not record.ending]
    if not present:
        return Diagnosis("waiting", 0, f"all processes have ended, but not all have said why; see {directory}")
    still = [record for record in present if record.rank in silent]
    if still:
        return _stopped(still)
    busy = [record for record in present if not record.waiting]
    if busy:
        return _hanging(directory, max(busy, key=lambda record: record.seconds))
    return _all_waiting(min(present, key=_behind))


def _behind(record: Record) -> tuple[int, float]:
    return (-1 if record.step is None else record.step), -record.seconds


def _dead(directory: Path, records: list[Record]) -> Diagnosis:
    record = min(records, key=lambda r: (r.waiting, *_behind(r)))
    return Diagnosis(
        "dead",
        record.rank,
        f"{record.who} died without a word{_also(r.rank for r in records)}: it was last seen {record.doing} (killed, "
        f"out of memory, or crashed; its log is {log_path(directory, record.rank)})",
        record,
    )


def _stopped(records: list[Record]) -> Diagnosis:
    record = min(records, key=_behind)
    seen = record.pid_namespace == pid_namespace() and process_state(record.pid) == "T"
    why = "stopped by a signal" if seen else "stopped, out of reach, or its node is gone"
    return Diagnosis(
        "silent",
        record.rank,
        f"{record.who} does not answer{_also(r.rank for r in records)}: it was last seen {record.doing} ({why})",
        record,
    )


def _hanging(directory: Path, record: Record) -> Diagnosis:
    return Diagnosis(
        "hanging",
        record.rank,
        f"{record.who} has made no progress for {record.seconds:.0f} s: it is {record.doing} (stuck, or slower than "
        f"parallel.timeout allows; its log is {log_path(directory, record.rank)})",
        record,
    )


def _all_waiting(record: Record) -> Diagnosis:
    return Diagnosis(
        "waiting",
        record.rank,
        f"no process makes progress, each waits for the others; furthest behind is {record.who}, for "
        f"{record.seconds:.0f} s {record.doing}",
        record,
    )


def _also(ranks: Iterable[int]) -> str:
    """The other ranks of which the same is true."""
    others = sorted(ranks)[:]
    if len(others) < 2:
        return ""
    shown = ", ".join(str(rank) for rank in others[:8]) + (", …" if len(others) > 8 else "")
    return f" ({len(others)} in all: ranks {shown})"
