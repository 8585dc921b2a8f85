"""Errors that end a command, each with the exit code that batch scripts rely on.

A message is one paragraph for the person who reads it: what is wrong, where, what was expected
and found, and what to do. The rooms that know nothing of commands (`lowrank`, `methods`,
`models`) raise plain `ValueError`, `TypeError`; whoever calls them for a run file translates.
"""

from collections.abc import Iterator
from contextlib import contextmanager

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_RETRY = 75
EXIT_REQUEUE = 85
_LASTING = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


class HpclrError(Exception):
    """A fault that ends the command with `exit_code` and a one-paragraph message.

    Attributes:
        shared: the first of several processes raises it too, and reports it for all.
    """

    exit_code = EXIT_ERROR
    shared = False


class UsageError(HpclrError):
    """Wrong usage, run file or input file; found before any work is done or lost."""

    exit_code = EXIT_USAGE


class RetryableError(HpclrError):
    """A fault worth retrying, such as a full disk or a node that went away."""

    exit_code = EXIT_RETRY


class StopRequestedError(HpclrError):
    """The run was asked to stop, has saved, and would like to be requeued."""

    exit_code = EXIT_REQUEUE


class TrainingDivergedError(HpclrError):
    """The loss is no longer finite; the message names the step and the last good checkpoint."""


def exit_code_of(error: BaseException) -> int:
    """What an error ends a command with: its own code, 75 for faults of input and output that may pass, else 1."""
    if isinstance(error, HpclrError):
        return error.exit_code
    return EXIT_RETRY if isinstance(error, OSError) and not isinstance(error, _LASTING) else EXIT_ERROR


def message_of(error: BaseException) -> str:
    """What an error says; one that nobody raised for a person to read says that, too."""
    return str(error) if isinstance(error, HpclrError) else f"unexpected {type(error).__name__}: {error}"


def error_of(code: int, message: str) -> HpclrError:
    """The error that another process raised, from the exit code and the message that it sent."""
    kinds = {kind.exit_code: kind for kind in (UsageError, RetryableError, StopRequestedError)}
    return kinds.get(code, HpclrError)(message)


@contextmanager
def usage_errors(section: str) -> Iterator[None]:
    """The rooms below speak of their arguments; here it is known which section of the run file those are.

    Raises:
        UsageError: in place of a ValueError or TypeError.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(f"{section}: {error}") from error
