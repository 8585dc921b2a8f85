"""What runs need of the file system that they live on, really done there: write, fsync, rename, link, lock, HDF5."""

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from hpclr.cluster.doctor.finding import Finding, failure, ok, warning
from hpclr.files import synchronise

TEMPORARY = ".tmp-doctor-"
_SIZE = 1 << 20  # bytes
_SLOW = 2.0  # seconds for what takes milliseconds
_CLOCKS_APART = 2.0  # seconds
_REMEDIES = {
    errno.ENOSPC: "Free space there (the lines below), or let runs live elsewhere: --runs-dir or HPCLR_RUNS.",
    errno.EDQUOT: "Your quota is used up: free space, have it raised, or let runs live elsewhere (HPCLR_RUNS).",
    errno.EROFS: "It is mounted read-only, on some clusters so on compute nodes: let runs live elsewhere (HPCLR_RUNS).",
    errno.ESTALE: "The file server no longer knows the directory: have it mounted again.",
}
_ELSEWHERE = "Make it writable, or let runs live elsewhere: --runs-dir or HPCLR_RUNS."
_NO_LOCKS = (
    "hpclr does without them here, but other programs with HDF5 may refuse to open files: set "
    "HDF5_USE_FILE_LOCKING=FALSE for those, and let only one write."
)


def examine(directory: Path) -> Iterator[Finding]:
    """Writes a few small files into a directory, which are removed again."""
    place = f"{directory} ({kind(directory)})"
    began = time.monotonic()
    try:
        with scratch(directory) as inside:
            skew = _write(inside / "written")
            os.rename(inside / "written", inside / "renamed")
            synchronise(inside)
            took = time.monotonic() - began
            yield _links(place, inside / "renamed")
            yield _locks(place, inside / "renamed")
            yield _clocks(place, skew)
            yield _hdf5(inside / "file.h5")
    except OSError as error:
        advice = _REMEDIES.get(error.errno or 0, _ELSEWHERE)
        yield failure("files", f"{place} cannot be written to: {error.strerror or error}", advice)
        return
    if took > _SLOW:
        yield warning(
            "files",
            f"{place}: to write, fsync and rename {_SIZE >> 20} MiB has taken {took:.1f} s",
            "Saves will be slow: choose a file system meant for large files, or ask whether this one is overloaded.",
        )
    else:
        yield ok("files", f"{place}: write, fsync, rename in {1e3 * took:.0f} ms")


def kind(directory: Path) -> str:
    """The type of file system that a directory is on, and what is mounted, as the kernel calls them."""
    device = os.stat(directory).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        for line in reversed(file.read().splitlines()):
            mount, _, source = line.partition(" - ")
            if mount.split()[2] == wanted:
                return " ".join(source.split()[:2])
    return "unknown"


@contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """A directory for this process in another one, gone after the block."""
    inside = tempfile.mkdtemp(prefix=TEMPORARY, dir=directory)
    try:
        yield Path(inside)
    finally:
        shutil.rmtree(inside, ignore_errors=True)


def _write(path: Path) -> float:
    """Writes a file; returns how many seconds the file system's clock is ahead of this machine's."""
    before = time.time()
    with path.open("wb") as file:
        file.write(os.urandom(_SIZE))
        file.flush()
        os.fsync(file.fileno())
    written = path.stat().st_mtime
    return written - min(max(written, before), time.time())


def _links(place: str, path: Path) -> Finding:
    try:
        os.link(path, path.with_name("linked"))
    except OSError as error:
        return failure(
            "run lock",
            f"{place}: no hard links ({error.strerror})",
            "hpclr keeps two jobs out of one run with them: let runs live on another file system.",
        )
    return ok("run lock", "hard links work")


def _locks(place: str, path: Path) -> Finding:
    """As HDF5 takes them: flock, without waiting, of the whole file."""
    with path.open("r+b") as first, path.open("r+b") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return warning("locking", f"{place}: files cannot be locked ({error.strerror})", _NO_LOCKS)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ok("locking", "locks work")
    return warning("locking", f"{place}: the same file was locked twice, so locks mean nothing", _NO_LOCKS)


def _clocks(place: str, skew: float) -> Finding:
    if abs(skew) <= _CLOCKS_APART:
        return ok("file times", "the file system's clock is this machine's")
    return warning(
        "file times",
        f"{place}: its clock is {skew:+.1f} s from this machine's",
        "Times of files mislead make, rsync and people; tell the administrators (NTP).",
    )


def _hdf5(path: Path) -> Finding:
    """A file that is written, and read again."""
    h5py = import_module("h5py")
    setting = os.environ.get("HDF5_USE_FILE_LOCKING")
    version = f"{h5py.version.hdf5_version} (h5py {h5py.version.version})"
    locking = f", HDF5_USE_FILE_LOCKING={setting}" if setting else ""
    try:
        for mode in ("w", "r"):
            with h5py.File(path, mode) as file:
                right = bool(file.require_dataset("x", (4,), "i4", data=[1, 2, 3, 4])[3] == 4)
    except OSError as error:
        if error.errno in _REMEDIES:
            raise
        return warning("hdf5", f"{version}{locking}: {error}", _NO_LOCKS)
    if not right:
        return failure("hdf5", f"{version} reads something else than was written", "Install h5py again.")
    return ok("hdf5", f"{version} works{locking}", same=f"hdf5 {h5py.version.hdf5_version}")
