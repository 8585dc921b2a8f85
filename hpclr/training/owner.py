"""Who holds a run directory: what a process tells of itself, and what is known of its fate."""

import os
import platform
import pwd
import shlex
import sys
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec

from hpclr.output import printable
from hpclr.parallel.watch.heartbeat import pid_namespace
from hpclr.parallel.watch.record import fixed_size
from hpclr.slurm.jobs import Job, has_ended, this_job

_LONGEST_CLUSTER = 64  # characters; real names are shorter


class Owner(msgspec.Struct):
    """The record of a process that holds a run directory, or has held it."""

    host: str
    pid: Annotated[int, msgspec.Meta(gt=0, lt=2**31)]
    born: int  # clock ticks after the boot; tells the process from later ones with the same pid
    pid_namespace: str  # processes with the same value see one another's pids
    job: Job | None
    user: str
    since: str
    command: str
    state: Literal["held", "free"] = "held"
    beat: int = 0  # rises while the process can run at all
    check: int = 0  # equals `beat` in a record that was read whole

    def __str__(self) -> str:
        job = "" if self.job is None else f"{self.job}, "
        return printable(f"{job}process {self.pid} on {self.host}, of {self.user}, since {self.since} ({self.command})")

    @property
    def identity(self) -> tuple[str, str, int, int]:
        """What no two processes have in common."""
        return self.host, self.pid_namespace, self.pid, self.born

    def is_alive(self) -> bool | None:
        """Whether the process is there; None if it is, or was, where its pid says nothing here."""
        if not self.pid_namespace or self.pid_namespace != pid_namespace():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's
            pass
        try:
            state, born = _state_and_birth(self.pid)
        except OSError:  # /proc may hide other users' processes
            return True
        return state not in "ZX" and born == self.born

    def encode(self) -> bytes:
        """The record for its file; texts that are too long are cut, here as well."""
        return fixed_size(self, ("command", "host", "user"))


def decode(content: bytes) -> Owner | None:
    """The owner that a record names; None if it is none, or was caught half-written."""
    try:
        owner = msgspec.json.decode(content, type=Owner)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return owner if owner.beat == owner.check else None


def this_process() -> Owner:
    """What this process would tell of itself as an owner."""
    return Owner(
        host=platform.node(),
        pid=os.getpid(),
        born=_state_and_birth(os.getpid())[1] if pid_namespace() else 0,
        pid_namespace=pid_namespace(),
        job=_job(),
        user=_user(),
        since=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC",
        command=shlex.join(sys.argv).replace("\n", " "),
    )


class Fate(NamedTuple):
    """What is known of an owner.

    Attributes:
        gone: whether it is gone; None if nothing here tells.
        why: how one knows.
        seen: whether this machine has seen it itself, and not only been told.
    """

    gone: bool | None
    why: str
    seen: bool = False


def fate_of(owner: Owner, me: Owner) -> Fate:
    """What this machine, and Slurm, know of an owner."""
    alive = owner.is_alive()
    if alive is not None:
        return Fate(not alive, "it is alive" if alive else "that process has ended", seen=True)
    if owner.job is None:
        return Fate(None, "")
    if me.job is not None and (me.job.id, me.job.cluster) == (owner.job.id, owner.job.cluster):
        return _fate_within_a_job(owner.job.restarts, me.job.restarts)
    ended = has_ended(owner.job, own=owner.user == me.user)
    return Fate(ended, {True: "that job has ended", False: "that job has not ended", None: ""}[ended])


def _fate_within_a_job(its_restarts: int, my_restarts: int) -> Fate:
    if its_restarts < my_restarts:
        return Fate(True, f"the job has been requeued, and is at restart {my_restarts}")
    if its_restarts > my_restarts:
        return Fate(False, f"it is a later start of this job, which is at restart {my_restarts}")
    return Fate(None, "")


def _state_and_birth(pid: int) -> tuple[str, int]:
    """The state letter of a process, and when it was started (proc(5): fields 3 and 22 of `stat`)."""
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2].split()
    return fields[0], int(fields[19])


def _job() -> Job | None:
    """This process's job; a name of a cluster that is none is cut, and then equals none that Slurm knows."""
    job = this_job(os.environ)
    if job is None:
        return None
    return replace(job, cluster=job.cluster.encode("unicode_escape").decode()[:_LONGEST_CLUSTER])


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # as in containers
        return f"user {os.geteuid()}"
