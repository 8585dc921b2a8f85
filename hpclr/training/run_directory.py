"""The directory of a run: everything about it is in there."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from hpclr.config import RunFile, differences, dump, load_run_file
from hpclr.errors import RetryableError, UsageError
from hpclr.files import write_whole

RUNS_VARIABLE = "HPCLR_RUNS"


def runs_directory(option: Path | None) -> Path:
    """Where runs live: the option, else HPCLR_RUNS, else `runs` in the current directory."""
    return option or Path(os.environ.get(RUNS_VARIABLE) or "runs")


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

    @property
    def exists(self) -> bool:
        """Whether a run has been here."""
        return self.run_file.exists()

    def check(self, asked: RunFile) -> None:
        """Refuses to continue another run than the one that is here.

        Raises:
            UsageError: with the list of differences, or if the directory holds something else.
        """
        if not self.exists:
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise UsageError(f"{self.path} exists but holds no run; choose another name")
            return
        listed = differences(load_run_file(self.run_file), asked)
        if listed:
            raise UsageError(
                f"{self.path} holds a run of another run file. What differs: {'; '.join(listed)}. Give this run a "
                "name of its own (name=…), take the changes back, or start over with --fresh (it is then set aside)."
            )

    def set_aside(self) -> Path | None:
        """Moves a run that is here out of the way; returns where to."""
        if not self.path.exists():
            return None
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.rename(target)
        return target

    def create(self, run: RunFile, environment: dict[str, object]) -> None:
        """Makes the directory, or renews the records of one that is being continued.

        Raises:
            RetryableError: if the place cannot be written to.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_whole(self.run_file, dump(run).encode())
            attempts = [*self.attempts(), environment]
            write_whole(self.environment, msgspec.json.format(msgspec.json.encode({"attempts": attempts}), indent=2))
        except OSError as error:
            raise RetryableError(f"cannot write the run directory {self.path}: {error}") from error

    def attempts(self) -> list[dict[str, object]]:
        """The environment records of the attempts so far."""
        if not self.environment.exists():
            return []
        return list(msgspec.json.decode(self.environment.read_bytes())["attempts"])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run directory against a second process on this machine.

        Raises:
            UsageError: if another process holds it; names that process.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise UsageError(
                    f"{self.path} is in use by process {lock.read().strip() or 'unknown'}; "
                    "wait for it to end, or give this run another name (name=…)"
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield
