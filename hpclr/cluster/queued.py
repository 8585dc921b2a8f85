"""The jobs of runs, as Slurm knows them now."""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpclr.cluster.record import submitted
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


def queued(numbers: Mapping[Path, Sequence[str]], *, everyone: bool = False) -> dict[Path, Jobs]:
    """The jobs of each run that Slurm still knows, in the order of their numbers; asks it once for all of them.

    A second question is needed where there are elements of arrays, for the numbers that these have for themselves.

    Raises:
        SlurmError: if it does not answer.
        UsageError: if there is none here.
    """
    asked = dict.fromkeys(number for several in numbers.values() for number in several)
    if not asked:
        return {run: {} for run in numbers}
    own = _own_numbers([number for number in asked if "_" in number])
    plain = {number: own.get(number, number) for number in asked}
    known = {job.id: job for job in client.queue(list(dict.fromkeys(plain.values())), everyone=everyone)}
    return {run: _of_run(several, plain, known) for run, several in numbers.items()}


def is_over(job: QueuedJob) -> bool:
    """Whether the job has ended, and will not be started again."""
    return job.state in _OVER


def current(jobs: Jobs) -> str | None:
    """Of a run's jobs the number of that which runs, else of the next to run, else of the last."""
    ahead = [number for number, job in jobs.items() if not is_over(job)]
    begun = [number for number in ahead if jobs[number].state != "PENDING"]
    return next(iter([*begun, *ahead, *reversed(jobs)]), None)


def _of_run(numbers: Sequence[str], plain: Mapping[str, str], known: Mapping[str, QueuedJob]) -> Jobs:
    """An element of an array may come by both of its numbers."""
    first = {plain[number]: number for number in reversed(numbers)}
    return {number: known[plain[number]] for number in numbers if plain[number] in known and number in first.values()}


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
