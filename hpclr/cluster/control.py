"""What one asks of a run from outside."""

import shlex
from pathlib import Path
from typing import Literal

from hpclr.cluster.queued import Jobs, is_over, job_numbers, owner_of, queued
from hpclr.cluster.record import submitted
from hpclr.errors import UsageError
from hpclr.files import write_whole
from hpclr.output import printable
from hpclr.slurm import client
from hpclr.training.lock import holder
from hpclr.training.owner import Fate, Owner, fate_of, this_process
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
        UsageError: if nobody trains there, as far as this machine and Slurm know, and none of its jobs that has begun
            to train is about to go on.
        RetryableError: if the directory cannot be read or written to now.
        SlurmError: if Slurm does not say whether a job is about to go on.
    """
    if not run.is_dir():
        raise _no_directory(run)
    owner, me = holder(run), this_process()
    fate = fate_of(owner, me) if owner is not None else Fate(True, "")
    if fate.gone:
        return _stop_waiting(run, owner, fate, me)
    request_stop(run, "end", f"by {me.user}")
    doubt = "; whether it is still alive cannot be told from here" if fate.gone is None else ""
    return (
        f"{run}: asked to stop. It saves at the end of a step, on a network file system within about a minute, and "
        f"ends; the command that started it continues it. In use by {owner}{doubt}."
    )


def _stop_waiting(run: Path, owner: Owner | None, fate: Fate, me: Owner) -> str:
    """Asks a job to end that is to go on but does not train now; its script looks for that before it starts again."""
    ahead = _ahead(run, owner)
    begun = {number for number in ahead if _started(run) & _together_with(run, number)}
    again = [n for n, job in ahead.items() if job.restarts or (n in begun and job.state == "PENDING")]
    cancel_it = f"`hpclr cancel {shlex.quote(str(run))}`"
    if again:
        request_stop(run, "end", f"by {me.user}")
        return (
            f"{run}: asked to stop. Job {again[0]} ({ahead[again[0]].state}) does not train now, and will not start "
            f"training again: when its turn comes, it ends. {cancel_it} ends it at once."
        )
    if owner is not None:
        raise UsageError(f"nothing trains in {run}: it was in use by {owner}, but {fate.why}")
    what = "it is finished" if RunDirectory(run).summary.exists() else "no process has it in use"
    raise UsageError(
        f"nothing trains in {run}: {what}. Jobs that have not begun to train, waiting or starting, are ended with "
        f"{cancel_it}."
    )


def _ahead(run: Path, owner: Owner | None) -> Jobs:
    """The jobs of a run that have not ended, as Slurm knows them; none where there is no Slurm."""
    numbers = dict.fromkeys([*job_numbers(run, owner), *_started(run)])
    if not numbers or not client.is_installed():
        return {}
    return {number: job for number, job in queued({run: list(numbers)})[run].items() if not is_over(job)}


def _started(run: Path) -> set[str]:
    """The jobs whose scripts have started the run, since it was submitted last: logs/progress has a line for each."""
    try:
        lines = (run / "logs" / "progress").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return {words[0] for line in lines if len(words := line.split()) == 3 and words[0].isdecimal()}


def _together_with(run: Path, number: str) -> set[str]:
    """The jobs of a chain that one belongs to; any of them goes on where others have begun."""
    return {job for entry in submitted(run)[-1:] if number in entry.jobs for job in entry.jobs}


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
    found = queued({run: numbers}, surely=client.is_installed())[run]
    ahead = {number: job for number, job in found.items() if not is_over(job)}
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
