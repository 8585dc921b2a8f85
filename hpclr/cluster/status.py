"""How runs are: what their directories tell and what Slurm knows, put together."""

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from hpclr.cluster.progress import LOCAL_LOG, Progress, progress_of
from hpclr.cluster.queued import Jobs, current, is_over, job_numbers, owner_of, queued
from hpclr.cluster.record import SUBMISSION, submitted
from hpclr.errors import HpclrError, UsageError
from hpclr.output import say
from hpclr.parallel.watch.attempt import attempts
from hpclr.parallel.watch.record import read_record
from hpclr.slurm import client
from hpclr.slurm.client import QueuedJob
from hpclr.training.owner import Owner, decode

SILENT = 120.0  # seconds; heartbeats come every few, but a network file system may show them a minute later
_SET_ASIDE = re.compile(r".*\.old-\d+")
_WORDS = {"done": "finished", "saved": "stopped", "retry": "failed", "failed": "failed", "usage": "failed"}


@dataclass(frozen=True)
class Status:
    """How a run is; None for what is not known.

    Attributes:
        run: its directory.
        state: of its job, in Slurm's word, while that waits or runs. Else training, silent (it should be training, but
            has given no sign of life for two minutes), finished, stopped (saved, and can go on), failed, killed (ended
            without a word), cancelled (its job was, before it began), new; or unknown (it has a job, and Slurm does
            not say what that does).
        reason: why it is so, as far as there is more to say; "" if not.
        live: whether something is, or will be, at work without the user doing anything; None: that depends on a job
            of which nothing is known.
        job: its number.
        starts: when Slurm means to start a job that waits.
        time_left: seconds to the job's limit.
        ends: when the run will have taken its last step, at the speed that it has.
        progress: how far it has come.
    """

    run: Path
    state: str
    reason: str
    live: bool | None
    job: str | None
    starts: datetime | None
    time_left: int | None
    ends: datetime | None
    progress: Progress

    @property
    def summary(self) -> str:
        """State and reason."""
        return f"{self.state} ({self.reason})" if self.reason else self.state

    @property
    def complaint(self) -> str | None:
        """What a run that has failed has said last; None of others, and if it has said nothing."""
        outcome = self.progress.outcome
        if self.state not in ("failed", "killed", "silent", "unknown"):
            return None
        if outcome is not None:
            return outcome.message if outcome.is_failure else None
        return self.progress.complaint


def runs_in(directory: Path) -> list[Path]:
    """The runs in a directory, without those that `--fresh` has set aside, in the order of their names."""
    found = sorted(directory.iterdir()) if directory.is_dir() else []
    return [path for path in found if _is_run(path) and not _SET_ASIDE.fullmatch(path.name)]


def statuses(runs: Sequence[Path], warn: Callable[[str], None] = say) -> list[Status]:
    """How these runs are; Slurm is asked once for all of them, and not at all if none has a job.

    Args:
        runs: their directories.
        warn: is told if Slurm does not answer.

    Raises:
        UsageError: if one of them is no run directory.
    """
    for run in runs:
        if not _is_run(run):
            raise UsageError(f"{run}: there is no run; expected the directory of one, such as runs/digits")
    owners = {run: owner_of(run) for run in runs}
    numbers = {run: job_numbers(run, owner) for run, owner in owners.items()}
    jobs = _jobs(numbers, warn)
    return [_status(run, owner, numbers[run], jobs.get(run)) for run, owner in owners.items()]


def _is_run(path: Path) -> bool:
    marks = ((path / "run.yaml").exists(), (path / SUBMISSION).is_dir(), (path / LOCAL_LOG).exists())
    return any(marks) or bool(attempts(path))


def _jobs(numbers: dict[Path, list[str]], warn: Callable[[str], None]) -> dict[Path, Jobs]:
    """What is known without Slurm is worth showing when it is away, or on another machine; nothing is in here then."""
    if not client.is_installed():
        return {}
    try:
        return queued(numbers, everyone=True)
    except HpclrError as error:
        warn(f"hpclr: warning: the states of jobs are not known: {error}")
        return {}


def _status(run: Path, owner: Owner | None, numbers: Sequence[str], jobs: Jobs | None) -> Status:
    progress, own = progress_of(run), _own_job(owner)
    number, job = _job(run, owner, jobs or {})
    state, reason, live = _state(progress, owner, job, asked=jobs is not None, forgotten=bool(numbers) and jobs == {})
    if jobs is None and numbers and not live and state != "finished":
        state, reason, live = _unknown(state, reason)
    at_work = state in ("RUNNING", "training")
    return Status(
        run=run,
        state=state,
        reason=reason,
        live=live,
        job=number or own or (numbers[0] if numbers and (live is None or progress.attempt is None) else None),
        starts=job.start if job is not None and state == "PENDING" else None,
        time_left=job.time_left if job is not None and at_work else None,
        ends=_end(progress) if at_work else None,
        progress=progress,
    )


def _state(
    progress: Progress, owner: Owner | None, job: QueuedJob | None, *, asked: bool, forgotten: bool
) -> tuple[str, str, bool | None]:
    """State, reason and whether it goes on.

    Args:
        progress: how far the run has come.
        owner: who has its directory.
        job: the one that matters.
        asked: whether Slurm has answered.
        forgotten: whether it knows none of the jobs that there were; an element of an array that is cancelled while it
            waits it forgets at once.
    """
    own = _own_job(owner)
    if job is not None and not is_over(job):
        return job.state, _reason_of(job, progress, owner), True
    if owner is not None and (job is None or job.id != own):
        return _state_of_owner(owner, progress, "killed" if asked and own is not None else "silent")
    word = _word(progress, job)
    if word == "new" and forgotten:
        return "cancelled", "Slurm no longer knows its job", False
    return word, _ending(job, word), False


def _job(run: Path, owner: Owner | None, jobs: Jobs) -> tuple[str | None, QueuedJob | None]:
    """The job that matters, with the number that it was noted under; none if it is over and others came after it."""
    number = current(jobs)
    if number is None:
        return None, None
    return (None, None) if is_over(jobs[number]) and _are_outdated(jobs, run, owner) else (number, jobs[number])


def _are_outdated(jobs: Jobs, run: Path, owner: Owner | None) -> bool:
    """Whether somebody else has had the run directory since jobs were submitted that are over, or has it now."""
    last = owner or _last_owner(run)
    if last is None or _own_job(last) in {job.id for job in jobs.values()}:
        return False
    noted = [entry.time for entry in submitted(run)[-1:]]
    return owner is not None or not noted or noted[0][:19] <= last.since[:19].replace(" ", "T")  # both are in UTC


def _last_owner(run: Path) -> Owner | None:
    """Who has had the run directory last, and may have given it back."""
    with suppress(OSError):
        numbers = [name for name in os.listdir(run / ".locks") if name.isdecimal()]
        return decode(read_record(run / ".locks" / max(numbers, key=int))) if numbers else None
    return None


def _unknown(state: str, reason: str) -> tuple[str, str, None]:
    """What the files say of a run whose job nobody can be asked for."""
    if state == "silent":
        return state, reason, None
    return "unknown", f"Slurm does not say; by its files {state}", None


def _own_job(owner: Owner | None) -> str | None:
    return owner.job.id if owner is not None and owner.job is not None else None


def _reason_of(job: QueuedJob, progress: Progress, owner: Owner | None) -> str:
    """Why a job waits; or that the run in it does not move."""
    if job.state != "RUNNING":
        return "" if job.reason == "None" else job.reason
    begun = owner is not None and owner.job is not None and (owner.job.id, owner.job.restarts) == (job.id, job.restarts)
    return _silence(progress) if begun and _is_silent(progress) else ""


def _state_of_owner(owner: Owner, progress: Progress, otherwise: str) -> tuple[str, str, bool]:
    """State, reason and whether it goes on, of a run that somebody has taken and not given back.

    Args:
        owner: who has.
        progress: how far the run has come.
        otherwise: what a run is that does not move, if nothing else tells.
    """
    alive = owner.is_alive()
    if alive or (alive is None and not _is_silent(progress)):
        return "training", f"on {owner.host}", True
    if alive is None and progress.outcome is None:
        return otherwise, _silence(progress), False
    return _word(progress), "", False


def _word(progress: Progress, job: QueuedJob | None = None) -> str:
    """What a run is in which nobody trains, and whose last job is over."""
    if progress.finished:
        return "finished"
    if progress.outcome is not None:
        return _WORDS[progress.outcome.name]
    if progress.attempt is not None:
        return "killed"
    if job is not None and job.state == "CANCELLED":
        return "cancelled"
    failed = progress.complaint is not None if job is None else job.state != "COMPLETED"
    return "failed" if failed else "new"


def _ending(job: QueuedJob | None, word: str) -> str:
    """How a job has ended that did not just end well, where that is not said already."""
    return "" if job is None or job.state == "COMPLETED" or word == "cancelled" else job.state


def _is_silent(progress: Progress) -> bool:
    return progress.silence is not None and progress.silence > SILENT


def _silence(progress: Progress) -> str:
    return f"no sign of life for {(progress.silence or 0) / 60:.0f} min"


def _end(progress: Progress) -> datetime | None:
    if progress.speed is None or progress.step is None or progress.steps is None:
        return None
    with suppress(OverflowError):
        return datetime.now() + timedelta(seconds=max(0, progress.steps - progress.step) / progress.speed)
    return None
