"""How an attempt ended: `exit.json`, which the first to know writes and nobody replaces.

Launchers change exit codes (torchrun makes every failure a 1), so whoever started the processes reads this first.
"""

import errno
import warnings
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from hpclr.errors import EXIT_REQUEUE, EXIT_RETRY, EXIT_USAGE, HpclrError, exit_code_of, message_of
from hpclr.files import write_once

EXIT_FILE = "exit.json"
_NAMES = {0: "done", EXIT_REQUEUE: "saved", EXIT_RETRY: "retry", EXIT_USAGE: "usage"}
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES, errno.EXDEV)


class Outcome(msgspec.Struct, frozen=True):
    """How an attempt ended; `rank`, `host` and `step` are those of the process that it came from, as far as known."""

    code: int
    message: str
    rank: int | None = None
    host: str | None = None
    step: int | None = None

    @property
    def name(self) -> str:
        """One of done, saved, retry, failed, usage."""
        return _NAMES.get(self.code, "failed")

    @property
    def is_failure(self) -> bool:
        """Whether it is neither done nor saved."""
        return self.name not in ("done", "saved")


class AttemptFailedError(HpclrError):
    """This or another process of an attempt has failed; with the exit code and the message of the failed one."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.message)
        self.exit_code = outcome.code


def record_outcome(directory: Path, outcome: Outcome) -> bool:
    """Writes `exit.json`, whole, unless it is there; never fails.

    Args:
        directory: of the attempt, or of the launch where there is no attempt yet.
        outcome: of the attempt.

    Returns:
        Whether nobody was faster, as far as is known: then this process has to speak of it.
    """
    number = directory.name.rpartition("-")[2]
    record = msgspec.structs.asdict(outcome) | {
        "outcome": outcome.name,
        "attempt": int(number) if number.isdecimal() else None,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    content = msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"
    try:
        return _create(directory / EXIT_FILE, content)
    except OSError:
        return True


def read_outcome(directory: Path) -> Outcome | None:
    """How an attempt ended; None where it is not known, with a warning if that is because of a damaged file."""
    path = directory / EXIT_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Outcome)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        warnings.warn(f"{path} cannot be read and counts for nothing: {error}", stacklevel=2)
        return None


def outcome_of(error: BaseException) -> Outcome:
    """What an error of a process means for the attempt."""
    return Outcome(exit_code_of(error), message_of(error))


def _create(path: Path, content: bytes) -> bool:
    """Creates a file with this content if there is none; it is there whole or not at all where links are known."""
    try:
        write_once(path, content)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create_in_place(path, content)
    return True


def _create_in_place(path: Path, content: bytes) -> bool:
    """For file systems without links."""
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True
