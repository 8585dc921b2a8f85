"""What one asks of a run from outside."""

import shlex
from pathlib import Path
from typing import Literal

from hpclr.cluster.queued import Jobs, is_over, job_numbers, owner_of, queued
from hpclr.errors import UsageError
from hpclr.files import write_whole
from hpclr.output import printable
from hpclr.slurm import client
from hpclr.training.lock import holder
from hpclr.training.owner import fate_of, this_process
from hpclr.training.run_directory import RunDirectory, writing


def request_stop(run: Path, word: Literal["end", "requeue"], reason: str) -> None:
    """Asks whoever trains in a run directory, by the file STOP there, to save and leave.

    Args:
        run: the directory.
        word: whether its job is to end then or to be started again.
        reason: who or what asks.

    Raises:
        UsageError: if the directory may not be written to.
        RetryableError: if it cannot be written to now.
    """
    line = printable(" ".join([word, *reason.split()]))
    with writing(run):
        write_whole(RunDirectory(run).stop_file, line.encode() + b"\n")


def stop(run: Path) -> str:
    """Asks a run to save and end; returns what happens now, in a sentence.

    Args:
        run: its directory.

    Raises:
        UsageError: if nobody trains there, as far as this machine and Slurm know.
        RetryableError: if the directory cannot be read or written to now.
    """
    if not run.is_dir():
        raise _no_directory(run)
    owner, me = holder(run), this_process()
    if owner is None:
        what = "it is finished" if RunDirectory(run).summary.exists() else "no process has it in use"
        raise UsageError(
            f"nothing trains in {run}: {what}. Jobs that have not begun to train, waiting or starting, are ended with "
            f"`hpclr cancel {shlex.quote(str(run))}`."
        )
    fate = fate_of(owner, me)
    if fate.gone:
        raise UsageError(f"nothing trains in {run}: it was in use by {owner}, but {fate.why}")
    request_stop(run, "end", f"by {me.user}")
    doubt = "; whether it is still alive cannot be told from here" if fate.gone is None else ""
    return (
        f"{run}: asked to stop. It saves at the end of a step, on a network file system within about a minute, and "
        f"ends; the command that started it continues it. In use by {owner}{doubt}."
    )


def cancel(run: Path) -> Jobs:
    """Ends all jobs of a run at once, those of a chain too; returns them as they were.

    One that trains is asked to save by Slurm's signal, and has as long for that as the cluster's KillWait is.

    Args:
        run: its directory.

    Raises:
        UsageError: if none waits or runs; or there is no Slurm here.
        SlurmError: if Slurm refuses, or does not answer.
    """
    if not run.is_dir():
        raise _no_directory(run)
    numbers = job_numbers(run, owner_of(run))
    ahead = {number: job for number, job in queued({run: numbers})[run].items() if not is_over(job)}
    if not ahead:
        known = f"Slurm knows none of its jobs {', '.join(numbers)} that waits or runs" if numbers else "it has no job"
        raise UsageError(
            f"nothing to cancel in {run}: {known}. What trains there without a job is ended with "
            f"`hpclr stop {shlex.quote(str(run))}`."
        )
    client.cancel(list(reversed(ahead)))  # the last of a chain first: it must not start meanwhile
    return ahead


def _no_directory(run: Path) -> UsageError:
    return UsageError(f"{run}: there is no such run directory; expected that of a run, such as runs/digits")
