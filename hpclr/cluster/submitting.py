"""One at a time submits a run: from the look whether it has a job already to the note that it has one.

RUN/.lock-submit is the record of the process that does. Unlike the lock of training it is held for seconds, and is
removed at the end; of one that was killed meanwhile it tells the next, which tidies up after it.
"""

import os
import secrets
import shlex
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from hpclr.cluster.queued import runs_script
from hpclr.cluster.record import JOB_SCRIPT, SUBMISSION
from hpclr.errors import EXIT_RETRY, HpclrError, RetryableError, UsageError
from hpclr.output import say
from hpclr.slurm import client
from hpclr.training.owner import Fate, Owner, decode, fate_of, this_process
from hpclr.training.run_directory import writing

NEW, OLD = ".tmp-submission-new-", ".tmp-submission-old-"  # what RUN/submission is called before and after
_LEFT = ".tmp-submission-*"
_LOCK = ".lock-submit"  # what begins like this makes no run directory
_MOMENT = 1.0  # seconds in which Slurm does what it was asked to do when sbatch was cut short


class UnknownOutcomeError(RetryableError):
    """Whether a job was submitted cannot be told now; nothing is undone, so that it is found later."""


@contextmanager
def submitting(run: Path) -> Iterator[None]:
    """Keeps other processes from submitting the run; makes its directory, which goes again if it stays empty.

    Raises:
        UsageError: if another process submits it; or the directory may not be written to.
        RetryableError: if it cannot be written to now.
    """
    with ExitStack() as undo:
        with writing(run):
            undo.callback(_remove_if_empty, run)
            run.mkdir(parents=True, exist_ok=True)
            _take(run / _LOCK)
            undo.callback((run / _LOCK).unlink, missing_ok=True)
            _tidy(run)
        yield


def hand_over(script: Path, options: Sequence[str], before: Sequence[str], jobs: list[str]) -> None:
    """Submits a job, and puts its number into `jobs`, also if sbatch was cut short after Slurm had taken it.

    Raises:
        HpclrError: if it was not submitted.
        UnknownOutcomeError: if that cannot be told.
        BaseException: what has cut it short, unless that was Slurm's slowness.
    """
    try:
        jobs.append(client.submit(script, options))
    except BaseException as error:
        if isinstance(error, HpclrError) and error.exit_code != EXIT_RETRY:
            raise  # it was refused
        found = [job for job in _jobs_after(script, error) if job not in (*before, *jobs)]
        jobs += found
        if not found or not isinstance(error, client.SlurmError):
            raise
        say(f"hpclr: warning: {error}; but it was submitted")


def _jobs_after(script: Path, error: BaseException) -> list[str]:
    """All jobs of a script, after sbatch was cut short.

    Raises:
        UnknownOutcomeError: if Slurm does not say.
    """
    time.sleep(_MOMENT)
    try:
        return jobs_with(script)
    except HpclrError as second:
        run = shlex.quote(str(script.parent.parent))
        raise UnknownOutcomeError(
            f"{error or type(error).__name__}. Whether the job was submitted is not known, as Slurm does not answer: "
            f"{second}. Once it does, `hpclr status {run}` shows the job if there is one, and `hpclr cancel {run}` "
            f"takes it back; if there is none, `hpclr resume {run}` submits it."
        ) from error


def jobs_with(script: Path) -> list[str]:
    """Numbers of all jobs of a script that Slurm knows; none where there is no Slurm."""
    return [job.id for job in client.queue() if runs_script(job, script)] if client.is_installed() else []


def withdraw(jobs: Sequence[str], error: BaseException) -> None:
    """Takes back jobs of which not all could be submitted, or whose submission was interrupted.

    Raises:
        HpclrError: if they cannot be taken back either.
    """
    try:
        client.cancel(jobs)
    except HpclrError as second:
        raise HpclrError(
            f"{error}. Of it jobs {', '.join(jobs)} are left: `scancel {' '.join(jobs)}` ({second})"
        ) from error
    if not isinstance(error, HpclrError):
        said = f"cancelled again: {', '.join(jobs)}" if jobs else "nothing was submitted"
        say(f"hpclr: interrupted; {said}")


@contextmanager
def hangups_undo() -> Iterator[None]:
    """Lets the signals HUP and TERM end a command as Ctrl-C does: undone, with 128 and the signal's number."""
    wanted = [number for number in (signal.SIGHUP, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _end) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # whoever is impatient does not keep it from being undone
    raise SystemExit(128 + number)


def _take(lock: Path) -> None:
    me = this_process()
    new = lock.with_name(f".tmp-lock-{secrets.token_hex(4)}")
    try:
        new.write_bytes(me.encode())
        while not _linked(new, lock):
            _require_over(lock, me)
    finally:
        new.unlink(missing_ok=True)


def _linked(new: Path, lock: Path) -> bool:
    try:
        os.link(new, lock)
    except FileExistsError:
        return new.stat().st_nlink > 1  # NFS may have lost the answer, and have asked again
    return True


def _require_over(lock: Path, me: Owner) -> None:
    """Removes the record of a process that is gone.

    Raises:
        UsageError: if it is not, as far as one knows.
    """
    try:
        content = lock.read_bytes()
    except FileNotFoundError:  # just now
        return
    owner = decode(content)
    fate = fate_of(owner, me) if owner is not None else Fate(None, "")
    if not fate.gone:
        what = str(owner or "a process whose record cannot be read")
        advice = f"{fate.why}; wait" if fate.why else f"wait, or remove {lock} if you know that it is gone"
        raise UsageError(f"{lock.parent}: this run is just being submitted by {what}: {advice}.")
    old = lock.with_name(f".tmp-lock-{secrets.token_hex(4)}")
    with suppress(FileNotFoundError):
        lock.rename(old)
        if old.read_bytes() == content:
            say(f"{lock.parent}: taken over from {owner}: {fate.why}")
        else:  # another was quicker, and has it now
            with suppress(FileExistsError):
                os.link(old, lock)
        old.unlink()


def _tidy(run: Path) -> None:
    """Clears what a process has left that was killed; a submission that it had only moved aside is back."""
    place = run / SUBMISSION
    aside = [old for old in run.glob(f"{OLD}*") if (old / JOB_SCRIPT).is_file()]
    if len(aside) == 1 and not place.exists():
        aside[0].rename(place)
    for left in run.glob(_LEFT):
        shutil.rmtree(left, ignore_errors=True)


def _remove_if_empty(run: Path) -> None:
    with suppress(OSError):
        (run / "logs").rmdir()
    with suppress(OSError):
        run.rmdir()
