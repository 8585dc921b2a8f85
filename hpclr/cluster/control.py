"""What one asks of a run from outside."""

from pathlib import Path
from typing import Literal

from hpclr.errors import UsageError
from hpclr.files import write_whole
from hpclr.output import printable
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
        raise UsageError(f"{run}: there is no such run directory; expected that of a run, such as runs/digits")
    owner, me = holder(run), this_process()
    if owner is None:
        what = "it is finished" if RunDirectory(run).summary.exists() else "no process has it in use"
        raise UsageError(f"nothing trains in {run}: {what}. A job that has not begun to train is ended with scancel.")
    fate = fate_of(owner, me)
    if fate.gone:
        raise UsageError(f"nothing trains in {run}: it was in use by {owner}, but {fate.why}")
    request_stop(run, "end", f"by {me.user}")
    doubt = "; whether it is still alive cannot be told from here" if fate.gone is None else ""
    return (
        f"{run}: asked to stop. It saves at the end of a step, on a network file system within about a minute, and "
        f"ends; the command that started it continues it. In use by {owner}{doubt}."
    )
