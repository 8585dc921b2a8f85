"""The directory of a run: everything about it is in there."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hpclr.config import RunFile, differences, dump, load_run_file
from hpclr.errors import HpclrError, RetryableError, UsageError
from hpclr.files import write_whole
from hpclr.output import say

if TYPE_CHECKING:
    from hpclr.training.lock import RunLock

RUNS_VARIABLE = "HPCLR_RUNS"
# Of a start under way, or that was killed: no run yet.
_LEFTOVERS = (".lock", ".tmp-", ".meeting-", ".nonce-", "logs", "submission", "STOP")
_LASTING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)  # trying again changes nothing


def runs_directory(option: Path | None) -> Path:
    """Where runs live: the option, else HPCLR_RUNS, else `runs` in the current directory."""
    return option or Path(os.environ.get(RUNS_VARIABLE) or "runs")


class _Attempts(msgspec.Struct):
    attempts: list[dict[str, object]]


class RunDirectory:
    """One run's files; nothing is written until `create`.

    Args:
        path: `runs/NAME`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_file = path / "run.yaml"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.environment = path / "environment.json"
        self.summary = path / "summary.json"
        self.stop_file = path / "STOP"  # a request to save and leave
        self.lock: RunLock | None = None  # set by the process that holds it for all of the job

    @property
    def exists(self) -> bool:
        """Whether a run has been here."""
        return self.run_file.exists()

    def check_place(self) -> None:
        """Refuses a place that something other than a run has taken.

        Raises:
            UsageError: if it has, or if the place cannot be looked at.
        """
        try:
            taken = not self.exists and self.path.exists() and not self._is_empty()
        except OSError as error:
            raise _unusable(self.path, error) from error
        if taken:
            raise UsageError(
                f"{self.path} exists but holds no run (expected its run.yaml); choose another name (name=…)"
            )

    def _is_empty(self) -> bool:
        return self.path.is_dir() and all(entry.name.startswith(_LEFTOVERS) for entry in self.path.iterdir())

    def check(self, asked: RunFile) -> None:
        """Refuses to continue another run than the one that is here.

        Raises:
            UsageError: with the list of differences, or if the directory holds something else.
        """
        self.check_place()
        if not self.exists:
            return
        listed = differences(load_run_file(self.run_file), asked)
        if listed:
            raise UsageError(
                f"{self.path} holds a run of another run file. What differs: {'; '.join(listed)}. Give this run a "
                "name of its own (name=…), take the changes back, or start over with --fresh (it is then set aside)."
            )

    def set_aside(self) -> Path:
        """Moves the run that is here out of the way; returns where to."""
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.rename(target)
        return target

    def create(self, run: RunFile, environment: dict[str, object]) -> None:
        """Writes the records of a run, or renews those of one that is being continued.

        Raises:
            UsageError: if the place may not be written to.
            RetryableError: if writing fails for another reason.
        """
        with writing(self.path):
            write_whole(self.run_file, dump(run).encode())
            self.checkpoints.mkdir(exist_ok=True)
            self.summary.unlink(missing_ok=True)  # of the shorter run that is being continued
            attempts = [*self.attempts(), environment]
            write_whole(self.environment, msgspec.json.format(msgspec.json.encode({"attempts": attempts}), indent=2))

    def attempts(self) -> list[dict[str, object]]:
        """The environment records of the attempts so far; none, and a warning, where the file is damaged."""
        if not self.environment.exists():
            return []
        try:
            return msgspec.json.decode(self.environment.read_bytes(), type=_Attempts).attempts
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            say(f"hpclr: warning: {self.environment} is damaged, its records of earlier attempts are lost: {error}")
            return []

    def require_held(self) -> None:
        """Makes sure that this job still owns the run directory, where this is the process that has locked it.

        Raises:
            HpclrError: if another job has taken it; names that job.
        """
        if self.lock is not None:
            self.lock.require_held()


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Says what an OSError means that comes of writing in a run directory.

    Raises:
        UsageError: if it may not be written to.
        RetryableError: if it cannot be written to now: the disk is full, the file system away or without locks.
    """
    try:
        yield
    except OSError as error:
        raise _unusable(directory, error) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Says what an OSError means that comes of looking at a file or directory that was named.

    Raises:
        UsageError: if it cannot be read.
    """
    try:
        yield
    except OSError as error:
        inside = f" ({error.filename})" if error.filename not in (None, str(path)) else ""
        raise UsageError(
            f"{path}: it cannot be read: {error.strerror or error}{inside}. Check the name and its permissions."
        ) from error


def _unusable(path: Path, error: OSError) -> HpclrError:
    if error.errno in _LASTING:
        return UsageError(
            f"the run directory {path} cannot be used: {error.strerror} ({error.filename}); make it writable, or let "
            f"runs live elsewhere, with --runs-dir or {RUNS_VARIABLE}"
        )
    return RetryableError(
        f"the run directory {path} cannot be written: {error}. Checkpoints that are there stay; once it can be "
        "written again, the same command goes on from the newest."
    )
