"""Errors that end a command, each with the exit code that batch scripts rely on.

A message is one paragraph for the person who reads it: what is wrong, where, what was expected
and found, and what to do. The rooms that know nothing of commands (`lowrank`, `methods`,
`models`) raise plain `ValueError`, `TypeError`; whoever calls them for a run file translates.
"""

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_RETRY = 75
EXIT_REQUEUE = 85


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
