"""Slurm's commands: asked with lists of arguments, never through a shell, and their answers as typed objects.

The answers of Slurm 22.05 to 25 are understood. What is not (a state that is not known here, a time that is not one)
stays text, or None.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hpclr.errors import EXIT_ERROR, EXIT_RETRY, HpclrError, UsageError

PATIENCE = 60.0  # seconds for an answer: the commands themselves try again for a while
_PATIENCE_OF_SBATCH = 180.0
_SEPARATOR = "\x1f"  # in no name
_NO_SUCH_JOB = "Invalid job id specified"
_NOTHING = ("(null)", "N/A")
_AWAY = re.compile(
    r"Unable to contact slurm controller|Socket timed out|Connection (refused|timed out)|Communication connection "
    r"failure|Zero Bytes were transmitted|DNS SRV lookup failed|try again",
    re.IGNORECASE,
)
_DURATION = re.compile("(?:({0})-)?({0})(?::({0}))?(?::({0}))?".format("[0-9]{1,9}"))
# The user's settings would change what is printed, what is asked for, and who is asked.
_SETTINGS = ("SBATCH_", "SQUEUE_", "SINFO_", "SCONTROL_", "SCANCEL_")
_SETTING_NAMES = ("SLURM_CLUSTERS", "SLURM_TIME_FORMAT", "SLURM_BITSTR_LEN")
_LISTED = ("JobID", "Name", "Partition", "State", "Reason", "NumNodes", "NodeList", "TimeUsed", "TimeLeft")
_LISTED_LAST = ("RestartCnt", "StartTime", "Dependency", "Command")


class SlurmError(HpclrError):
    """A command of Slurm's has failed; the message has its own words.

    Attributes:
        exit_code: 75 if Slurm did not answer, which may pass; 1 if it refused.
    """

    def __init__(self, message: str, *, away: bool = False) -> None:
        super().__init__(message)
        self.exit_code = EXIT_RETRY if away else EXIT_ERROR


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue lists it, also for some minutes after its end.

    Attributes:
        id: its number.
        name: as given, or the script's name.
        partition: where it runs or waits; several, with commas, while it waits.
        state: PENDING, RUNNING, COMPLETING, COMPLETED, FAILED and so on.
        reason: why it waits or has ended; "None" if there is none.
        nodes: how many.
        node_list: their names in Slurm's short form; "" while it waits.
        time_used: seconds.
        time_left: seconds to its limit; None if it has none.
        restarts: how often it was requeued.
        start: when it started, or, by Slurm's estimate, will; in local time.
        dependency: what it waits for; "" if for nothing.
        command: the batch script's path, with the arguments that it was given; "" if it came from no file.
    """

    id: str
    name: str
    partition: str
    state: str
    reason: str
    nodes: int | None
    node_list: str
    time_used: int | None
    time_left: int | None
    restarts: int
    start: datetime | None
    dependency: str
    command: str = ""


@dataclass(frozen=True)
class JobDetails:
    """What `scontrol show job` tells.

    Attributes:
        id: its number.
        state: as in `QueuedJob`.
        reason: why it waits or has ended.
        exit_code: of the batch script, 0 before it has ended; if a signal has ended it, 128 and the signal's number.
        restarts: how often it was requeued.
        start: when it started or will.
        end: when it ended, or will at its limit.
        time_limit: seconds; None if it has none.
        node_list: names in Slurm's short form.
        fields: all of it that is not free text, by Slurm's names.
    """

    id: str
    state: str
    reason: str
    exit_code: int
    restarts: int
    start: datetime | None
    end: datetime | None
    time_limit: int | None
    node_list: str
    fields: Mapping[str, str]


@dataclass(frozen=True)
class Partition:
    """A partition and what its nodes have; of unequal nodes, the most of each.

    Attributes:
        name: of the partition.
        default: whether jobs go there that name none.
        up: whether it takes and starts jobs.
        max_time: seconds; None if it has no limit.
        max_nodes: for one job; None if it has no limit.
        nodes: how many it has.
        cpus: of a node.
        memory: of a node, in MB.
        gpus: of a node.
    """

    name: str
    default: bool
    up: bool
    max_time: int | None
    max_nodes: int | None
    nodes: int
    cpus: int
    memory: int
    gpus: int


def is_installed() -> bool:
    """Whether there are commands of Slurm's here."""
    return shutil.which("sbatch") is not None


def version() -> str:
    """Such as "22.05.8".

    Raises:
        SlurmError: as all functions here.
        UsageError: likewise, if there is no Slurm.
    """
    return _call("sinfo", "--version").split()[-1]


def submit(script: Path, options: Sequence[str] = ()) -> str:
    """Submits a batch script and returns the job's number.

    Args:
        script: the file.
        options: of sbatch, before those in the script.

    Raises:
        SlurmError: if it was refused (exit code 1), or if whether it was submitted is not known (75).
    """
    answer = _call("sbatch", "--parsable", *options, str(script), patience=_PATIENCE_OF_SBATCH)
    number = answer.strip().rpartition("\n")[2].partition(";")[0]  # a site's own words may come before
    if not number.isdecimal():
        raise SlurmError(
            f"sbatch has printed {answer!r} where a job number was expected; look for the job with squeue", away=True
        )
    return number


def dry_run(script: Path, options: Sequence[str] = ()) -> str:
    """What sbatch says of a script that it is not to submit: when and where it would run.

    Raises:
        SlurmError: if it would refuse it.
    """
    answer = _run("sbatch", "--test-only", *options, str(script), patience=_PATIENCE_OF_SBATCH)
    return answer.stderr.strip()


def queue(jobs: Sequence[str] = (), *, names: Sequence[str] = (), everyone: bool = False) -> list[QueuedJob]:
    """Jobs of this user, also those that ended a few minutes ago.

    Args:
        jobs: their numbers, of which those that Slurm has forgotten are left out; none: all.
        names: only jobs with one of these names.
        everyone: other users' too.
    """
    form = ",".join(f"{column}:{_SEPARATOR}" for column in (*_LISTED, *_LISTED_LAST))
    filters = [f"--jobs={','.join(jobs)}"] if jobs else []
    filters += [f"--name={','.join(names)}"] if names else []
    filters += [] if everyone else ["--me"]
    try:
        listing = _call("squeue", "--noheader", "--states=all", f"--Format={form}", *filters)
    except SlurmError as error:
        if _NO_SUCH_JOB in str(error):
            return []
        raise
    listed = [_queued_job(line) for line in listing.split(f"{_SEPARATOR}\n")]
    return [job for job in listed if job is not None and (not names or job.name in names)]


def details(job: str) -> JobDetails | None:
    """A job, also for some minutes after its end; None if Slurm does not know it, or no longer."""
    try:
        return _details(job, _call("scontrol", "show", "job", job))
    except SlurmError as error:
        if _NO_SUCH_JOB in str(error):
            return None
        raise


def partitions() -> list[Partition]:
    """Those that this user may see."""
    limits = _call("scontrol", "--oneliner", "show", "partition")
    nodes = _call("sinfo", "--noheader", "--exact", "--format=%R|%c|%m|%G")
    return [_partition(dict(_pairs(line)), nodes) for line in limits.splitlines() if line.startswith("PartitionName=")]


def requeue(job: str) -> None:
    """Stops a job and puts it into the queue again."""
    _call("scontrol", "requeue", job)


def cancel(jobs: Sequence[str]) -> None:
    """Ends jobs, or takes them out of the queue; those that have ended already do not matter."""
    if jobs:
        _call("scancel", *jobs)


def signal(job: str, name: str) -> None:
    """Sends a signal, such as USR1, to the batch script of a job and to nothing else."""
    _call("scancel", "--batch", f"--signal={name}", job)


def ask(*command: str, patience: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """Runs a command of Slurm's, without a terminal and without the user's settings, in English.

    Raises:
        OSError: if it is not there.
        subprocess.TimeoutExpired: if it has not ended after `patience` seconds; it is then ended.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_SETTINGS) and k not in _SETTING_NAMES}
    return subprocess.run(  # noqa: S603
        command,
        env=kept | {"LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=patience,
        check=False,
    )


def seconds_of(text: str) -> int | None:
    """`2-03:04:05`, `03:04:05`, `04:05`, and `2-03`, `2-03:04` as Slurm writes and takes them; a number is minutes.

    None for UNLIMITED, INVALID and the like.
    """
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        return None
    days, first, second, third = (int(part) if part else 0 for part in found.groups())
    if found[1] is not None or found[4] is not None:
        return ((days * 24 + first) * 60 + second) * 60 + third
    return first * 60 + second


def _call(*command: str, patience: float = PATIENCE) -> str:
    return _run(*command, patience=patience).stdout


def _run(*command: str, patience: float) -> subprocess.CompletedProcess[str]:
    try:
        answer = ask(*command, patience=patience)
    except OSError as error:
        raise UsageError(
            f"{command[0]} cannot be run here: {error.strerror}. Do this on a machine where Slurm's commands are on "
            "PATH, such as a login node of the cluster."
        ) from error
    except subprocess.TimeoutExpired as error:
        unsure = "; whether the job was submitted is not known, squeue may show it" if command[0] == "sbatch" else ""
        raise SlurmError(f"{command[0]} has not answered in {patience:.0f} seconds{unsure}", away=True) from error
    if answer.returncode:
        words = (answer.stderr.strip() or answer.stdout.strip()).replace("\n", "; ")
        raise SlurmError(
            f"{' '.join(command[:2])} has failed (exit code {answer.returncode}): {words or 'it says nothing'}",
            away=_AWAY.search(words) is not None,
        )
    return answer


def _queued_job(line: str) -> QueuedJob | None:
    values = line.split(_SEPARATOR)
    if len(values) != len(_LISTED) + len(_LISTED_LAST):
        return None
    number, name, partition, state, reason, nodes, node_list, used, left, restarts, start, dependency, command = values
    return QueuedJob(
        number,
        name,
        partition,
        state,
        reason,
        _integer(nodes),
        node_list,
        seconds_of(used),
        seconds_of(left),
        _integer(restarts) or 0,
        _time(start),
        "" if dependency in _NOTHING else dependency,
        "" if command in _NOTHING else command,
    )


def _details(job: str, text: str) -> JobDetails:
    """Names, paths and comments may hold anything, so a line counts by how it begins.

    The number of an array brings all its elements, each a paragraph.
    """
    found = next((part for part in text.split("\n\n") if re.match(rf"JobId={re.escape(job)}\b", part.lstrip())), "")
    lines = [line.strip() for line in found.splitlines()]
    fields = dict(pair for line in lines if line.startswith(_TYPED) for pair in _pairs(line))
    if "JobState" not in fields:
        raise SlurmError(f"scontrol show job {job} has printed something that is not understood: {text[:200]!r}")
    status, _, signal_number = fields.get("ExitCode", "0:0").partition(":")
    killed = _integer(signal_number) or 0
    return JobDetails(
        id=job,
        state=fields["JobState"],
        reason=fields.get("Reason", "None"),
        exit_code=128 + killed if killed else _integer(status) or 0,
        restarts=_integer(fields.get("Restarts", "")) or 0,
        start=_time(fields.get("StartTime", "")),
        end=_time(fields.get("EndTime", "")),
        time_limit=seconds_of(fields.get("TimeLimit", "")),
        node_list=fields.get("NodeList", "").replace("(null)", ""),
        fields=fields,
    )


# How the lines of `scontrol show job` begin that hold no free text.
_TYPED = ("JobState=", "Requeue=", "RunTime=", "StartTime=", "NodeList=", "BatchHost=", "NumNodes=", "Partition=")


def _partition(fields: dict[str, str], nodes: str) -> Partition:
    rows = [row.split("|", 3) for row in nodes.splitlines()]
    own = [row for row in rows if len(row) == 4 and row[0] == fields["PartitionName"]]
    return Partition(
        name=fields["PartitionName"],
        default=fields.get("Default") == "YES",
        up=fields.get("State") == "UP",
        max_time=seconds_of(fields.get("MaxTime", "")),
        max_nodes=_integer(fields.get("MaxNodes", "")),
        nodes=_integer(fields.get("TotalNodes", "")) or 0,
        cpus=max((_integer(row[1]) or 0 for row in own), default=0),
        memory=max((_integer(row[2]) or 0 for row in own), default=0),
        gpus=max((_gpus(row[3]) for row in own), default=0),
    )


def _gpus(resources: str) -> int:
    """`gpu:a100:4(S:0-1),gpu:h100:2,craynetwork:4` has 6."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu:(?:[^:,(]+:)?([0-9]{1,9})", resources))


def _pairs(line: str) -> list[tuple[str, str]]:
    words = (word.partition("=") for word in line.split())
    return [(name, value) for name, found, value in words if found]


def _integer(text: str) -> int | None:
    """`4`; also `4-4`, of the nodes of a job that waits, and `16+`, of unequal nodes."""
    found = re.match(r"[0-9]{1,18}", text)
    return int(found[0]) if found else None


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None
