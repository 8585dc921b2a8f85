"""Which job of Slurm's this is, and whether another one has ended."""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from hpclr.slurm.client import ask

_PATIENCE = 10.0  # seconds for an answer
_COLUMNS = "JobID:20,State:30,RestartCnt:12"
_NO_SUCH_JOB = "Invalid job id specified"
_ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "PREEMPTED", "REVOKED"),
    *("NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY"),
}
# A job that had been running and is in one of these waits to be started anew; its processes are no more.
_AGAIN = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_RUNNING = {"CONFIGURING", "RESIZING", "RUNNING", "SIGNALING", "STOPPED", "SUSPENDED"}


@dataclass(frozen=True)
class Job:
    """A start of a job.

    Attributes:
        id: the number, which an element of an array has for itself too; of a heterogeneous job, its first part's.
        restarts: how often the job had been requeued before.
        cluster: other clusters have jobs of the same number, and may share the file system.
    """

    id: str
    restarts: int
    cluster: str

    def __str__(self) -> str:
        return f"job {self.id} (restart {self.restarts})"


def this_job(environ: Mapping[str, str]) -> Job | None:
    """The job that a process belongs to, by its environment; None outside Slurm."""
    number = environ.get("SLURM_JOB_ID_HET_GROUP_0") or environ.get("SLURM_JOB_ID", "")
    restarts = environ.get("SLURM_RESTART_COUNT", "")
    if not _is_number(number):
        return None
    return Job(number, int(restarts) if _is_number(restarts) else 0, environ.get("SLURM_CLUSTER_NAME", ""))


def has_ended(job: Job, *, own: bool) -> bool | None:
    """Asks Slurm whether this start of a job is over; takes up to 20 s if Slurm does not answer.

    Args:
        job: the job.
        own: whether it is this user's. Of other people's jobs Slurm may be set up to deny all knowledge; of one's own
            it does so only once they have ended (by default, five minutes after that).

    Returns:
        None if that cannot be told: no Slurm is here, or another cluster's, or its answer is not understood.
    """
    if not _is_number(job.id) or not job.cluster or job.cluster != _cluster():
        return None
    answer = _ask("squeue", "--all", "--states=all", "--noheader", f"--jobs={job.id}", f"--Format={_COLUMNS}")
    if answer is None:
        return None
    if answer.returncode:
        return True if own and _NO_SUCH_JOB in answer.stderr else None
    return _verdict(job, answer.stdout)


def _verdict(job: Job, listing: str) -> bool | None:
    """What a listing of jobs says of one; an array's number may bring its other elements with it."""
    found = re.search(rf"^\s*{job.id}\s+([A-Z_]+)\s+([0-9]+)\s*$", listing, re.MULTILINE)
    if found is None:
        return None
    state, restarts = found[1], int(found[2])
    if state in _ENDED | _AGAIN:
        return True
    if state == "COMPLETING":  # the processes are being ended; the number of restarts has risen already
        return False
    return restarts > job.restarts if state in _RUNNING else None


def _cluster() -> str | None:
    answer = _ask("scontrol", "show", "config")
    found = re.search(r"^ClusterName\s*=\s*(\S+)", answer.stdout, re.MULTILINE) if answer is not None else None
    return found[1] if found is not None else None


def _ask(*command: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return ask(*command, patience=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return None


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,18}", text) is not None
