"""A real Slurm of four nodes on this machine, for the tests: see cluster.sh beside this file."""

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpclr.slurm import client

PROGRAM = Path(__file__).with_name("cluster.sh")
COMMANDS = ("sbatch", "slurmctld", "slurmd", "munged", "ip", "unshare", "nsenter")
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}
_START = 30.0  # seconds; it takes two
_PR_SET_PDEATHSIG = 1


class Cluster:
    """A Slurm that runs; its nodes are n1 to n4, each with four CPUs and two GPUs that are none."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def path(self) -> str:
        """PATH with this Slurm's commands first."""
        return os.pathsep.join([str(self.directory / "bin"), os.environ["PATH"]])

    def do(self, what: str, node: str = "") -> None:
        """kill-node, start-node, kill-controller or start-controller."""
        subprocess.run([PROGRAM, what, self.directory, node], check=True, timeout=30)

    def wait(self, job: str, *states: str, limit: float = 60.0) -> client.JobDetails:
        """Waits until a job is in one of these states, or is over; fails if it never is, or is over in another."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            found = client.details(job)
            assert found is not None, f"job {job} is not known"
            if found.state in (states or OVER):
                return found
            assert found.state not in OVER or found.restarts, f"job {job}: {found}"
            time.sleep(0.1)
        raise AssertionError(f"job {job} is not {' or '.join(states) or 'over'} after {limit:.0f} s: {found}")


def unavailable() -> str | None:
    """Why there can be no Slurm here; None if there can."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    if os.getuid():
        return "a Slurm for tests is started as root only"
    if missing := [name for name in COMMANDS if shutil.which(name, path=path) is None]:
        return f"no Slurm is installed ({', '.join(missing)}): `make slurm` does that on Debian and Ubuntu"
    isolated = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--net", "--fork", "--mount-proc"]
    tried = subprocess.run([*isolated, "ip", "link", "add", "bridge", "type", "bridge"], capture_output=True, text=True)
    return f"nodes cannot be kept apart here: {tried.stderr.strip()}" if tried.returncode else None


@contextmanager
def started() -> Iterator[Cluster]:
    """Starts it, and leaves nothing behind."""
    directory = Path(tempfile.mkdtemp(prefix="hpclr-slurm-"))
    process = subprocess.Popen(
        [PROGRAM, "up", directory], stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_end_with_parent
    )
    try:
        _wait_until_ready(directory, process)
        yield Cluster(directory)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def _wait_until_ready(directory: Path, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + _START
    while not (directory / "ready").exists():
        if process.poll() is not None or time.monotonic() > end:
            logs = {path.name: path.read_text()[-1000:] for path in sorted((directory / "log").glob("*"))}
            raise AssertionError(f"Slurm did not start: {logs}")
        time.sleep(0.1)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
