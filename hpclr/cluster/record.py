"""What a run directory knows of its jobs: how they were submitted, and their numbers.

RUN/submission/submission.json    what was asked for; written with the snapshot, and never changed
RUN/logs/jobs                     a line for each submission, appended: {"time": …, "jobs": ["12"], "by": "submit"}
"""

import os
from datetime import datetime, timezone
from io import FileIO
from pathlib import Path
from typing import Literal

import msgspec

from hpclr.errors import UsageError
from hpclr.files import write_whole

SUBMISSION = "submission"
JOB_SCRIPT = "job.sh"
_RECORD = "submission.json"
_JOBS = Path("logs", "jobs")

Command = Literal["submit", "resume", "sweep", "compare"]


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for; fields of a later version are passed over.

    Attributes:
        command: the words of the command line.
        name: of the run.
        launcher: srun, torchrun or mpirun.
        nodes: how many.
        processes: on each node.
        chain: how many jobs follow one another; 0: one job, which requeues itself.
        hpclr: its version.
        commits: of the repositories that the code comes from, by their directories.
        changes: whether the code differs from them, as changes.diff tells; unknown if git did not.
        container: the image in which it is run, if in one.
        time: when, in UTC.
    """

    command: tuple[str, ...]
    name: str
    launcher: Literal["srun", "torchrun", "mpirun"]
    nodes: int
    processes: int
    chain: int = 0
    hpclr: str
    commits: dict[str, str] = {}
    changes: Literal["none", "listed", "unknown"] = "none"
    container: str | None = None
    time: str


class Submitted(msgspec.Struct, frozen=True):
    """Jobs that were given to Slurm together.

    Attributes:
        time: when, in UTC.
        jobs: those of a chain in their order; "12_3" is an element of an array.
        by: which command.
        script: the file that sbatch was given, by which Slurm's jobs are known again; "" if it was not noted.
    """

    time: str
    jobs: tuple[str, ...]
    by: Command
    script: str = ""


def read_submission(run: Path) -> Submission | None:
    """What was asked for; None if the run was never submitted.

    Raises:
        UsageError: if the record cannot be read.
    """
    file = run / SUBMISSION / _RECORD
    try:
        return msgspec.json.decode(file.read_bytes(), type=Submission)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(
            f"cannot read {file}: {error}. It is written by `hpclr submit`; submit the run again."
        ) from None


def write_submission(directory: Path, submission: Submission) -> None:
    """Writes the record into RUN/submission, or into what is about to become that."""
    write_whole(directory / _RECORD, msgspec.json.format(msgspec.json.encode(submission), indent=2) + b"\n")


def note_jobs(run: Path, jobs: tuple[str, ...], by: Command, script: Path | str = "") -> None:
    """Appends the numbers of jobs to the run's list, or leaves it as it is.

    Raises:
        OSError: if they cannot be written.
    """
    line = msgspec.json.encode(Submitted(now(), jobs, by, str(script))) + b"\n"
    with open(run / _JOBS, "ab", buffering=0) as file:
        before = file.tell()
        try:
            _write_all(file, line)
        except OSError:
            file.truncate(before)
            raise


def _write_all(file: FileIO, content: bytes) -> None:
    """A file system that has not room for all of it takes a part first, and refuses the rest."""
    while content:
        content = content[file.write(content) :]
    os.fsync(file.fileno())


def submitted(run: Path) -> list[Submitted]:
    """All submissions of the run, oldest first; a line that is none is passed over."""
    try:
        lines = (run / _JOBS).read_bytes().splitlines()
    except OSError:
        return []
    return [entry for line in lines if (entry := _entry(line)) is not None]


def jobs_of(run: Path) -> list[str]:
    """The numbers of all jobs of the run, oldest first."""
    return [job for entry in submitted(run) for job in entry.jobs]


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _entry(line: bytes) -> Submitted | None:
    try:
        return msgspec.json.decode(line, type=Submitted)
    except msgspec.MsgspecError:
        return None
