"""The machine itself: cores, memory, limits of processes, clock."""

import ctypes
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from hpclr.cluster.doctor.finding import Finding, ok, warning
from hpclr.cluster.doctor.space import size

_INFINIBAND = Path("/sys/class/infiniband")
_FILES = 256  # open files of a process alone; each other process costs a few connections more
_FILES_PER_PEER = 4
_TIMEX = 512  # bytes, more than struct timex has
_UNSYNCHRONISED = 5  # TIME_ERROR of sys/timex.h


def examine(processes: int) -> Iterator[Finding]:
    """Looks; `processes` is how many work together."""
    yield ok("machine", f"{_cores()}, {_memory()}, kernel {os.uname().release}", same=f"kernel {os.uname().release}")
    yield _open_files(processes)
    yield _locked_memory()
    yield ok("core dumps", _amount(resource.getrlimit(resource.RLIMIT_CORE)[0]))
    yield _clock()


def _cores() -> str:
    return f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def _memory() -> str:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free, total = (int(fields[name].split()[0]) << 10 for name in ("MemAvailable", "MemTotal"))
    return f"{size(free)} of {size(total)} memory free"


def _open_files(processes: int) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES + _FILES_PER_PEER * processes
    text = f"{_amount(soft)} a process"
    if 0 <= soft < wanted:
        most = f"; up to {hard} without the administrators" if hard > soft else ""
        return warning(
            "open files", text, f"`ulimit -n {wanted}` in the job's script, for {processes} processes{most}."
        )
    return ok("open files", text)


def _locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if _INFINIBAND.is_dir() and soft != resource.RLIM_INFINITY:
        return warning(
            "locked memory",
            f"{size(soft)} a process, but there is InfiniBand, which needs it unlimited",
            "`ulimit -l unlimited` in the job's script; where that is refused, the administrators must allow it "
            "(with Slurm: PropagateResourceLimitsExcept=MEMLOCK, and slurmd's own limit).",
        )
    return ok("locked memory", f"{_amount(soft, is_size=True)} a process")


def _amount(limit: int, *, is_size: bool = False) -> str:
    if limit == resource.RLIM_INFINITY:
        return "unlimited"
    return size(limit) if is_size else str(limit)


def _clock() -> Finding:
    """Whether the kernel is told the time by somebody; nothing is changed by asking."""
    if ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX)) == _UNSYNCHRONISED:
        return warning(
            "clock",
            "nothing keeps it right, as far as the kernel knows",
            "Times in logs, and when a job is to end, may be off; `hpclr doctor --job` compares the clocks of nodes.",
        )
    return ok("clock", "kept right (NTP)")
