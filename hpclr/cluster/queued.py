"""The jobs of runs, as Slurm knows them now."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpclr.cluster.record import JOB_SCRIPT, SUBMISSION, Submitted, submitted
from hpclr.errors import HpclrError
from hpclr.slurm import client
from hpclr.slurm.client import QueuedJob
from hpclr.training.lock import holder
from hpclr.training.owner import Owner

Jobs = dict[str, QueuedJob]
"""Jobs by the numbers that they were noted under: `12`, or `12_3`, an element of an array. The number in the job itself
is that of the whole array while the element waits."""

_OVER = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "REVOKED", "TIMEOUT"),
}


def owner_of(run: Path) -> Owner | None:
    """Whose a run directory is by the records, dead or alive; None also if that cannot be read now."""
    try:
        return holder(run)
    except HpclrError:
        return None


def job_numbers(run: Path, owner: Owner | None) -> list[str]:
    """The jobs that matter: those of the last submission in their order, and that which has the directory."""
    last = [job for entry in submitted(run)[-1:] for job in entry.jobs]
    own = [] if owner is None or owner.job is None else [owner.job.id]
    return list(dict.fromkeys(last + own))


def queued(numbers: Mapping[Path, Sequence[str]], *, everyone: bool = False, surely: bool = False) -> dict[Path, Jobs]:
    """The jobs of each run that Slurm still knows; asks it once for all of them.

    Numbers alone do not make a job that of a run: Slurm gives them again some day, and of a job whose submission was
    cut short none was noted. A job counts if its batch script is that of the run, or that with which it was noted.
    Those with numbers come first, in their order.

    A second question is needed where there are elements of arrays, for the numbers that these have for themselves, and
    another for the runs of other users.

    Args:
        numbers: for each run what `job_numbers` says.
        everyone: other users' jobs too.
        surely: ask even if nothing in the directories tells of a job.

    Raises:
        SlurmError: if it does not answer.
        UsageError: if there is none here.
    """
    asked = dict.fromkeys(number for several in numbers.values() for number in several)
    if not surely and not asked and not any(script_of(run).exists() for run in numbers):
        return {run: {} for run in numbers}
    own = _own_numbers([number for number in asked if "_" in number])
    plain = {number: own.get(number, number) for number in asked}
    known = {job.id: job for job in client.queue()}
    if everyone and (others := [plain[number] for run in numbers if _is_others(run) for number in numbers[run]]):
        known |= {job.id: job for job in client.queue(list(dict.fromkeys(others)), everyone=True)}
    return {run: _of_run(run, several, plain, known) for run, several in numbers.items()}


def script_of(run: Path) -> Path:
    """The batch script of a run."""
    return run / SUBMISSION / JOB_SCRIPT


def runs_script(job: QueuedJob, script: Path | str) -> bool:
    """Whether the job's batch script is this file, by whichever path it was named."""
    if not job.command.startswith("/"):
        return False
    if job.command == str(script) or job.command.startswith(f"{script} "):  # it was given arguments
        return True
    return Path(job.command).name == Path(script).name and os.path.realpath(job.command) == os.path.realpath(script)


def is_over(job: QueuedJob) -> bool:
    """Whether the job has ended, and will not be started again."""
    return job.state in _OVER


def current(jobs: Jobs) -> str | None:
    """Of a run's jobs the number of that which runs, else of the next to run, else of the last."""
    ahead = [number for number, job in jobs.items() if not is_over(job)]
    begun = [number for number in ahead if jobs[number].state != "PENDING"]
    return next(iter([*begun, *ahead, *reversed(jobs)]), None)


def _is_others(run: Path) -> bool:
    try:
        return run.stat().st_uid != os.geteuid()
    except OSError:
        return False


def _of_run(run: Path, numbers: Sequence[str], plain: Mapping[str, str], known: Mapping[str, QueuedJob]) -> Jobs:
    """An element of an array may come by both of its numbers."""
    noted = {job: entry for entry in submitted(run) for job in entry.jobs}
    first = {plain[number]: number for number in reversed(numbers)}.values()
    mine = {number: known[plain[number]] for number in numbers if plain[number] in known and number in first}
    mine = {number: job for number, job in mine.items() if _belongs(job, run, noted.get(number))}
    taken = {job.id for job in mine.values()}
    by_script = [job for job in known.values() if job.id not in taken and runs_script(job, script_of(run))]
    return mine | {job.id: job for job in by_script if not is_over(job) or job.id not in noted}


def _belongs(job: QueuedJob, run: Path, noted: Submitted | None) -> bool:
    """Whether a job that has a number of this run's is the one that was meant."""
    if noted is None:  # it has, or had, the directory; then it runs any script but that of another run
        return not job.command.endswith(f"/{SUBMISSION}/{JOB_SCRIPT}") or runs_script(job, script_of(run))
    if noted.by == "sweep" and not noted.script:
        return True
    return runs_script(job, noted.script or script_of(run))


def _own_numbers(elements: list[str]) -> dict[str, str]:
    """`12_3` → the number of that element; while it waits with others, that of the array."""
    if not elements:
        return {}
    names = f"--jobs={','.join(elements)}"
    try:
        answer = client.ask("squeue", "--array", "--noheader", "--states=all", names, "--Format=JobArrayID:40,JobID:20")
    except (OSError, subprocess.TimeoutExpired):
        return {}  # the other question fails as well, and says why
    rows = [line.split() for line in answer.stdout.splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 2}
