"""The directory of an attempt: what the processes of one start of a run leave for whoever looks after them."""

import os
import re
from pathlib import Path

LAUNCH_VARIABLE = "HPCLR_LAUNCH"
_POINTER = "attempt"
_NAME = re.compile(r"attempt-(\d{2,})")


def next_attempt(run_directory: Path) -> int:
    """Makes the directory of the next attempt; one process does so and tells the others the number.

    Raises:
        OSError: if it cannot be made.
    """
    logs = run_directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    number = max(attempts(run_directory), default=0) + 1
    directory = attempt_directory(run_directory, number)
    directory.mkdir()
    if (launch := launch_directory()) is not None:
        (launch / _POINTER).write_bytes(os.fsencode(directory.absolute()))
    return number


def attempts(run_directory: Path) -> list[int]:
    """The numbers of the attempts so far, in rising order."""
    logs = run_directory / "logs"
    names = [entry.name for entry in logs.iterdir()] if logs.is_dir() else []
    return sorted(int(found[1]) for name in names if (found := _NAME.fullmatch(name)))


def attempt_directory(run_directory: Path, number: int) -> Path:
    """`RUN/logs/attempt-NN`."""
    return run_directory / "logs" / f"attempt-{number:02d}"


def log_path(directory: Path, rank: int) -> Path:
    """What a process writes."""
    return directory / f"rank-{rank:04d}.log"


def heartbeat_path(directory: Path, rank: int) -> Path:
    """Where a process says what it is doing."""
    return directory / f"rank-{rank:04d}.heartbeat"


def launch_directory() -> Path | None:
    """Where whoever started the processes wants to be told of the attempt, or of a failure before there is one."""
    named = os.environ.get(LAUNCH_VARIABLE)
    return Path(named) if named and Path(named).is_dir() else None


def attempt_of_launch(launch: Path) -> Path | None:
    """The directory of the attempt that was made by the processes of a launch; None: they did not come that far."""
    pointer = launch / _POINTER
    return Path(os.fsdecode(pointer.read_bytes())) if pointer.exists() else None
