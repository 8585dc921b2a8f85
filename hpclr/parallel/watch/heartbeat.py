"""The small file in which each process says, a few times a minute, that it lives and what it is doing.

A process that is stopped or killed cannot speak, and launchers end its neighbours at once. So each leaves a record of
fixed size in the attempt's directory; whoever wants to know what happened reads the records (see `diagnosis`).
"""

import contextlib
import os
import time
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from hpclr.output import printable
from hpclr.parallel.watch.record import fixed_size, read_record

Ending = Literal["", "done", "saved", "failed", "left"]  # left: because of another process's failure


class Record(msgspec.Struct):
    """What a heartbeat file says; durations are seconds of the writer's own clock."""

    rank: int
    world_size: int
    host: str
    pid: int
    pid_namespace: str  # processes with the same value see one another's pids
    beat: int  # rises while the process can run at all
    progress: int  # rises while its main thread goes from phase to phase
    phase: str
    step: int | None
    waiting: bool  # for other processes
    seconds: float  # in this phase
    ending: Ending = ""
    code: int = 0
    message: str = ""
    check: int = 0  # equals `beat` in a record that was read whole

    @property
    def who(self) -> str:
        """The process, for a message."""
        return f"rank {self.rank} on {self.host} (pid {self.pid})"

    @property
    def doing(self) -> str:
        """What the process is or was doing, for a message."""
        return self.phase if self.step is None else f"{self.phase} at step {self.step}"


class Moment(NamedTuple):
    """Where the main thread is; replaced as a whole, so that another thread reads no mixture."""

    progress: int
    phase: str
    step: int | None
    waiting: bool
    since: float  # time.monotonic()


class Heartbeat:
    """What a process tells about itself; `phase` is for its main thread, `write` for the thread that watches.

    Args:
        path: the file.
        rank: of this process.
        world_size: number of processes.
        host: name of this node, for messages.
    """

    def __init__(self, path: Path, rank: int, world_size: int, host: str) -> None:
        self.rank, self.world_size, self.host = rank, world_size, host[:64]
        self.now = Moment(0, "starting", None, False, time.monotonic())
        self._path = path
        self._pid_namespace = pid_namespace()
        self._beat = 0
        self._last: tuple[Ending, int, str] = ("", 0, "")

    def phase(self, name: str, step: int | None = None, *, waiting: bool = False) -> None:
        """Says what the main thread does from here on, and that it makes progress; takes less than a microsecond.

        Args:
            name: completes "it was …", such as "reading data".
            step: of the run; None: as before.
            waiting: whether this needs the other processes, so that standing still in it may be their fault.
        """
        before = self.now
        self.now = Moment(before.progress + 1, name, before.step if step is None else step, waiting, time.monotonic())

    def last_word(self, ending: Ending, code: int = 0, message: str = "") -> None:
        """How the process ends; written at once and kept by every later `write`."""
        self._last = ending, code, printable(message)
        self.write()

    def write(self) -> None:
        """Writes the record; a disk that cannot take it does not matter here.

        The file is closed each time: network file systems show others what was written when it is closed.
        """
        self._beat += 1
        with contextlib.suppress(OSError):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.pwrite(descriptor, fixed_size(self.record(), ("message", "phase", "host")), 0)
            finally:
                os.close(descriptor)

    def record(self) -> Record:
        """What the file is to say now."""
        now = self.now
        return Record(
            *(self.rank, self.world_size, self.host, os.getpid(), self._pid_namespace, self._beat),
            *(now.progress, now.phase, now.step, now.waiting, round(time.monotonic() - now.since, 1)),
            *(*self._last, self._beat),
        )


def read_heartbeat(path: Path) -> Record | None:
    """The record in a heartbeat file; None if there is none, or none that can be read now."""
    for _ in range(3):  # it may be caught half-written
        try:
            record = msgspec.json.decode(read_record(path), type=Record)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            record = None
        if record is not None and record.beat == record.check:
            return record
        time.sleep(0.002)
    return None


def pid_namespace() -> str:
    """A name for what shares one table of pids: a boot of a kernel, and a container within it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot[:18]} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: pids are judged by nobody
        return ""


def process_state(pid: int) -> str:
    """The state letter of a process of this machine, as in ps; "" if there is no such process, or only its remains."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except (FileNotFoundError, ProcessLookupError):
        return ""
    except OSError:
        return "?"
    return "" if state in "ZX" else state
