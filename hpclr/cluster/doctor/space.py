"""Free space: where runs live, for temporary files, in shared memory; and the user's quota."""

import getpass
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hpclr.cluster.doctor.finding import Finding, failure, ok, warning
from hpclr.cluster.doctor.storage import kind

_MEGABYTE, _GIGABYTE = 10**6, 10**9
_TOO_LITTLE, _LITTLE = 100 * _MEGABYTE, 10 * _GIGABYTE  # for checkpoints
_FEW_FILES = 1000
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - of the kernel, to look at
_LITTLE_SHARED = _GIGABYTE  # data workers pass batches through it, and NCCL gradients
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_PATIENCE = 10.0  # seconds


def examine(directory: Path) -> Iterator[Finding]:
    """Looks at all three."""
    yield _of_runs(directory)
    yield _temporary()
    yield _shared_memory()
    yield from _quota(directory)


def _of_runs(directory: Path) -> Finding:
    free, total, files = _free(directory)
    text = f"{directory}: {size(free)} of {size(total)} free"
    if files < _FEW_FILES:
        return failure(
            "space", f"{directory}: room for {files} more files only", "Remove files there, or have it extended."
        )
    if free < _TOO_LITTLE:
        return failure("space", text, "A checkpoint will not fit: free space, or let runs live elsewhere (HPCLR_RUNS).")
    if free < _LITTLE:
        return warning("space", text, "See that the checkpoints will fit: a run keeps checkpoint.keep + 2 at times.")
    return ok("space", text)


def _temporary() -> Finding:
    try:
        directory = Path(tempfile.gettempdir())
    except OSError as error:
        return failure("TMPDIR", str(error), "Set TMPDIR to a directory that you may write to.")
    wanted = os.environ.get("TMPDIR")
    free, total, _ = _free(directory)
    text = f"{directory} ({kind(directory)}): {size(free)} of {size(total)} free"
    if wanted and Path(wanted) != directory:
        return warning("TMPDIR", f"{wanted} cannot be used; {text}", "Set TMPDIR to a directory that you may write to.")
    if free < _GIGABYTE:
        return warning("TMPDIR", text, "Set TMPDIR to a place with room; data that is staged goes there.")
    return ok("TMPDIR", text)


def _shared_memory() -> Finding:
    if not _SHARED_MEMORY.is_dir():
        return failure("shared memory", f"no {_SHARED_MEMORY}", "Have it mounted; in a container bind the host's.")
    free, total, _ = _free(_SHARED_MEMORY)
    text = f"{_SHARED_MEMORY}: {size(free)} of {size(total)} free"
    if free < _LITTLE_SHARED:
        advice = "Data workers and NCCL need more: remove what was left there; in a container enlarge it."
        return warning("shared memory", text, advice)
    return ok("shared memory", text)


def _quota(directory: Path) -> Iterator[Finding]:
    """What the programs for it say of limits that are exceeded; silent where there are none."""
    commands = [["quota", "-q", "-w"]]
    if kind(directory).startswith("lustre"):
        commands.append(["lfs", "quota", "-q", "-u", getpass.getuser(), str(directory)])
    for command in filter(lambda words: shutil.which(words[0]), commands):
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)  # noqa: S603
        words = " ".join(asked.stdout.split())
        if asked.returncode == 0 and "*" not in words:
            yield ok("quota", f"{command[0]} knows of no limit that is exceeded")
        elif words:
            yield warning("quota", words, "Free space or have the quota raised: writing may stop at any time.")


def _free(directory: Path) -> tuple[int, int, int]:
    """Bytes free for users and in all, and how many files may still be made."""
    found = os.statvfs(directory)
    return (
        found.f_bavail * found.f_frsize,
        found.f_blocks * found.f_frsize,
        found.f_favail if found.f_files else 1 << 62,
    )


def size(count: float) -> str:
    """`1.5 GB`."""
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.{0 if unit == 0 or count >= 100 else 1}f} {_UNITS[unit]}"
