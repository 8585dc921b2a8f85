"""How runs are: what their directories tell and what Slurm knows, put together."""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from hpclr.cluster.progress import Progress, progress_of
from hpclr.cluster.queued import Jobs, current, is_over, job_numbers, owner_of, queued
from hpclr.cluster.record import SUBMISSION
from hpclr.errors import HpclrError, UsageError
from hpclr.output import say
from hpclr.parallel.watch.attempt import attempts
from hpclr.slurm import client
from hpclr.slurm.client import QueuedJob
from hpclr.training.owner import Owner

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
            without a word), or new.
        reason: why it is so, as far as there is more to say; "" if not.
        live: whether something is, or will be, at work without the user doing anything.
        job: its number.
        starts: when Slurm means to start a job that waits.
        time_left: seconds to the job's limit.
        ends: when the run will have taken its last step, at the speed that it has.
        progress: how far it has come.
    """

    run: Path
    state: str
    reason: str
    live: bool
    job: str | None
    starts: datetime | None
    time_left: int | None
    ends: datetime | None
    progress: Progress

    @property
    def summary(self) -> str:
        """State and reason."""
        return f"{self.state} ({self.reason})" if self.reason else self.state


def runs_in(directory: Path) -> list[Path]:
    """The runs in a directory, without those that `--fresh` has set aside, in the order of their names."""
    found = sorted(directory.iterdir()) if directory.is_dir() else []
    return [path for path in found if _is_run(path) and not _SET_ASIDE.fullmatch(path.name)]


def statuses(runs: Sequence[Path]) -> list[Status]:
    """How these runs are; Slurm is asked once for all of them, and not at all if none has a job.

    Raises:
        UsageError: if one of them is no run directory.
    """
    for run in runs:
        if not _is_run(run):
            raise UsageError(f"{run}: there is no run; expected the directory of one, such as runs/digits")
    owners = {run: owner_of(run) for run in runs}
    jobs = _jobs({run: job_numbers(run, owner) for run, owner in owners.items()})
    return [_status(run, progress_of(run), owner, jobs.get(run)) for run, owner in owners.items()]


def _is_run(path: Path) -> bool:
    return (path / "run.yaml").exists() or (path / SUBMISSION).is_dir() or bool(attempts(path))


def _jobs(numbers: dict[Path, list[str]]) -> dict[Path, Jobs]:
    """What is known without Slurm is worth showing when it is away, or on another machine; nothing is in here then."""
    if not client.is_installed():
        return {}
    try:
        return queued(numbers, everyone=True)
    except HpclrError as error:
        say(f"hpclr: warning: the states of jobs are not known: {error}")
        return {}


def _status(run: Path, progress: Progress, owner: Owner | None, jobs: Jobs | None) -> Status:
    number, own = current(jobs or {}), _own_job(owner)
    job = None if jobs is None or number is None else jobs[number]
    if job is not None and not is_over(job):
        state, reason, live = job.state, _reason_of(job, progress, owner), True
    elif owner is not None and (job is None or job.id != own):
        forgotten = jobs is not None and own is not None
        state, reason, live = _state_of_owner(owner, progress, "killed" if forgotten else "silent")
    else:
        state, reason, live = _word(progress, job), _ending(job), False
    at_work = state in ("RUNNING", "training")
    return Status(
        run=run,
        state=state,
        reason=reason,
        live=live,
        job=number or own,
        starts=job.start if job is not None and state == "PENDING" else None,
        time_left=job.time_left if job is not None and at_work else None,
        ends=_end(progress) if at_work else None,
        progress=progress,
    )


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
    return "failed" if _ending(job) not in ("", "CANCELLED") else "new"


def _ending(job: QueuedJob | None) -> str:
    """How a job has ended that did not just end well."""
    return "" if job is None or job.state == "COMPLETED" else job.state


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
