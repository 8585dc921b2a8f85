"""How far a run has come, by the files in its directory alone."""

import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from hpclr.cluster.record import SUBMISSION
from hpclr.config import RunFile, load_run_file
from hpclr.errors import UsageError
from hpclr.files import open_regular
from hpclr.parallel.watch.attempt import attempt_directory, attempts, heartbeat_path
from hpclr.parallel.watch.outcome import EXIT_FILE, Outcome, read_outcome
from hpclr.training.run_directory import RunDirectory

LOCAL_LOG = Path("logs", "local.log")  # what a run says that a sweep trains here, from before its first attempt on
_JOB_LOG = re.compile(r"(\d+)_0_log\.(out|err)")
_SAYS, _WARNS = "hpclr: ", "hpclr: warning: "  # how a command begins what it ends with, and what it goes on after
_LAST_WORDS = 10_000  # bytes of a log that are looked at for them
_TAIL = 4 << 20  # bytes of the metrics that are looked at: some 40 000 steps
_SAVE = re.compile(r"step-(\d{8,18})\.h5\.sha256")


@dataclass(frozen=True)
class Progress:
    """What the files tell; None for what they do not.

    Attributes:
        attempt: the newest one's number.
        outcome: how that has ended.
        complaint: before there is an attempt, what the last start, here or as a job, has said last.
        finished: whether the run has come to its end.
        silence: seconds since a process has last shown that it has the run directory, or trains.
        step: optimiser steps done.
        steps: how many there are to be, if nothing ends the run before.
        loss: of the last step.
        rank_share: mean over the low-rank layers of rank to full rank.
        trained_share: trainable parameters as a share of the dense model's.
        saved_step: of the newest checkpoint.
        save_age: seconds since then.
        speed: steps a second, over this attempt or the last few checkpoints.
    """

    attempt: int | None
    outcome: Outcome | None
    complaint: str | None
    finished: bool
    silence: float | None
    step: int | None
    steps: int | None
    loss: float | None
    rank_share: float | None
    trained_share: float | None
    saved_step: int | None
    save_age: float | None
    speed: float | None


_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]  # others are none, and cannot be divided by one another


class _Metric(msgspec.Struct):
    """A line of metrics.jsonl, as far as it matters here."""

    kind: str
    step: _Count
    loss: float | None = None
    rank_share: float | None = None
    trainable: _Count = 0
    dense: _Count = 0


def progress_of(run: Path) -> Progress:
    """Reads a run directory; what is not there, or damaged, is not known."""
    directory = RunDirectory(run)
    number = max(attempts(run), default=None)
    here = None if number is None else attempt_directory(run, number)
    lines = _tail(directory.metrics)
    last, check, saves = _latest(lines, "train"), _latest(lines, "check"), _saves(directory.checkpoints)
    step = last.step if last is not None else max(saves, default=None)
    saved = max(saves, default=None)
    return Progress(
        attempt=number,
        outcome=read_outcome(here) if here is not None and (here / EXIT_FILE).is_file() else None,
        complaint=_complaint(run) if here is None else None,
        finished=directory.summary.exists(),
        silence=_silence(run, here),
        step=step,
        steps=_steps(directory),
        loss=None if last is None else last.loss,
        rank_share=None if check is None else check.rank_share,
        trained_share=check.trainable / check.dense if check is not None and check.dense else None,
        saved_step=saved,
        save_age=None if saved is None else _age(saves[saved]),
        speed=None if step is None else _speed(directory, step, saves),
    )


def run_file_of(run: Path) -> RunFile | None:
    """What the run is, or is to be once its first job begins; None if that cannot be read."""
    for file in (run / "run.yaml", run / SUBMISSION / "run.yaml"):
        with suppress(UsageError):
            if file.is_file():  # a pipe would hold up whoever looks
                return load_run_file(file)
    return None


def job_logs(run: Path) -> list[tuple[int, Path]]:
    """The logs of jobs with the jobs' numbers, in the order of these."""
    named = [(_JOB_LOG.fullmatch(path.name), path) for path in (run / "logs").glob("*_0_log.*")]
    return sorted((int(found[1]), path) for found, path in named if found is not None)


def last_words(log: Path, since: int = 0) -> str | None:
    """The last line of a log that says anything, among those after the byte `since`; None if there is none."""
    try:
        with open_regular(log) as file:
            file.seek(max(since, file.seek(0, os.SEEK_END) - _LAST_WORDS))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    return next((line.strip() for line in reversed(lines) if line.strip()), None)


def _complaint(run: Path) -> str | None:
    errors = [path for _, path in job_logs(run) if path.suffix == ".err"]
    said = [(_modified(path) or 0.0, words) for path in (run / LOCAL_LOG, *errors) if (words := last_words(path))]
    last = max(said)[1] if said else _WARNS
    return None if last.startswith(_WARNS) else last.removeprefix(_SAYS)


def _tail(path: Path) -> list[bytes]:
    """The last lines of a file; the first of them may be cut, and is then none."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            return file.read(_TAIL).splitlines()
    except OSError:
        return []


def _latest(lines: list[bytes], kind: str) -> _Metric | None:
    named = b'"%s"' % kind.encode()  # most lines need not be decoded
    found = (_metric(line) for line in reversed(lines) if named in line)
    return next((metric for metric in found if metric is not None and metric.kind == kind), None)


def _metric(line: bytes) -> _Metric | None:
    try:
        return msgspec.json.decode(line, type=_Metric)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):  # cut short by a crash, or not ours
        return None


def _steps(directory: RunDirectory) -> int | None:
    """As the newest attempt has recorded it; before there is one, what the run file says, if it says steps."""
    attempts = directory.attempts() if directory.environment.is_file() else []
    recorded = [attempt.get("total_steps") for attempt in attempts[-1:]]
    if recorded:
        return recorded[0] if isinstance(recorded[0], int) else None
    run = run_file_of(directory.path)
    return None if run is None else run.train.steps


def _saves(checkpoints: Path) -> dict[int, float]:
    """Step → when it was saved, of the checkpoints that are whole."""
    try:
        found = {int(match[1]): path for path in checkpoints.iterdir() if (match := _SAVE.fullmatch(path.name))}
    except OSError:
        return {}
    return {step: time_ for step, path in found.items() if (time_ := _modified(path)) is not None}


def _speed(directory: RunDirectory, step: int, saves: dict[int, float]) -> float | None:
    """All times are those of one file server, since the clocks of hosts differ.

    Of this attempt's checkpoints the oldest that has been kept tells how fast it is. Before there are two, the newest
    one before is where the attempt began, just when the records of its environment were written.
    """
    now, began = _modified(directory.metrics), _modified(directory.environment)
    if now is None or began is None:
        return None
    own = [saved for saved, when in saves.items() if when >= began]
    before = max((saved for saved in saves if saved not in own), default=None)
    if before is not None and len(own) < 2:
        start, since = before, began
    elif own:
        start, since = min(own), saves[min(own)]
    else:
        start, since = 0, began
    return (step - start) / (now - since) if step > start and now > since else None


def _silence(run: Path, attempt: Path | None) -> float | None:
    """The record of who has the directory is renewed like a heartbeat, from before there is an attempt."""
    signs = [*(run / ".locks").glob("*"), *([] if attempt is None else [heartbeat_path(attempt, 0)])]
    times = [time_ for path in signs if (time_ := _modified(path)) is not None]
    return _age(max(times)) if times else None


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _age(when: float) -> float:
    return max(0.0, time.time() - when)
