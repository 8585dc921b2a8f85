"""Copies of dataset files on a disk of the node, from which all its processes read."""

import contextlib
import fcntl
import os
import shutil
import socket
import string
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hpclr.data.file import identity
from hpclr.errors import RetryableError, UsageError
from hpclr.files import synchronise

Progress = Callable[[int, int], None]  # bytes copied, bytes in all

_BLOCK_BYTES = 16 << 20
_TEMPORARY = f".tmp-hpclr-{socket.gethostname()}-"


def stage(paths: Sequence[Path], directory: Path, *, progress: Progress = lambda done, total: None) -> list[Path]:
    """Copies dataset files to a directory, each whole or not at all; one process of a node does this.

    A copy that is there already is used again: of this job's last attempt, or of another job, of which any number
    may do the same at once. Copies are called NAME-DIGEST.h5 and keep the time of the last change.

    Args:
        paths: the files.
        directory: is made if it is not there; $NAME in it stands for the environment variable.
        progress: called after every block that was copied.

    Returns:
        The copies.

    Raises:
        UsageError: for a file that cannot be opened, a variable that is not set, a directory that cannot be written
            to or has too little space.
        RetryableError: if the file system fails, or a file changes while it is copied.
    """
    target = expanded(directory)
    copies = staged(paths, directory)
    with _writing(target):
        target.mkdir(parents=True, exist_ok=True)
        with _alone_in(target):
            wanted = [(path, copy) for path, copy in zip(paths, copies, strict=True) if not _is_copy(path, copy)]
            total = sum(path.stat().st_size for path, _ in wanted)
            _check_space(target, total)
            done = 0
            for path, copy in wanted:
                before = done
                for count in _copy(path, copy):
                    done = before + count
                    progress(done, total)
    return copies


def staged(paths: Sequence[Path], directory: Path) -> list[Path]:
    """Where `stage` leaves the copies, for the other processes of the node; they need not be there yet.

    Raises:
        UsageError: for a file that cannot be opened, and a variable that is not set.
    """
    target = expanded(directory)
    return [target / f"{path.stem}-{identity(path)[:12]}.h5" for path in paths]


def expanded(directory: Path) -> Path:
    """The directory with environment variables, written $NAME or ${NAME}, put in.

    Raises:
        UsageError: if one is not set.
    """
    try:
        return Path(string.Template(str(directory)).substitute(os.environ))
    except KeyError as error:
        raise UsageError(
            f"data.stage is {directory}, but the environment variable {error.args[0]} is not set on this node. "
            "Set it, or name another directory."
        ) from error
    except ValueError as error:
        raise UsageError(
            f"data.stage: {directory} has a $ without a name after it; write $$ for a plain one."
        ) from error


def _is_copy(path: Path, copy: Path) -> bool:
    try:
        return copy.stat().st_size == path.stat().st_size and identity(copy) == identity(path)
    except (FileNotFoundError, UsageError):
        return False


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UsageError(
            f"{directory}: staging the data needs {needed / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB free. Free "
            "space, name another directory as data.stage, or take the key out."
        )


def _copy(path: Path, copy: Path) -> Iterator[int]:
    """Copies one file; yields how many bytes are done."""
    wanted, status = identity(path), path.stat()
    descriptor, name = tempfile.mkstemp(prefix=f"{_TEMPORARY}{copy.name}-", dir=copy.parent)
    temporary = Path(name)
    try:
        with path.open("rb") as source, os.fdopen(descriptor, "wb") as target:
            while block := source.read(min(_BLOCK_BYTES, status.st_size - target.tell())):
                target.write(block)
                yield target.tell()
            target.flush()
            os.fsync(target.fileno())
        os.utime(temporary, ns=(status.st_atime_ns, status.st_mtime_ns))
        now = path.stat()
        unchanged = (now.st_size, now.st_mtime_ns) == (status.st_size, status.st_mtime_ns)
        if not unchanged or temporary.stat().st_size != status.st_size or identity(temporary) != wanted:
            raise RetryableError(f"{path}: the file changed while it was copied to {copy}. Start the command again.")
        temporary.chmod(0o644)
        temporary.replace(copy)
        synchronise(copy.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Tells a directory that cannot be used from a file system that fails."""
    try:
        yield
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UsageError(
            f"{directory}: data cannot be staged there: {error}. Name another directory as data.stage, or take it out."
        ) from error
    except OSError as error:
        raise RetryableError(
            f"{directory}: staging the data failed ({error}). What was copied in part is removed; check the disk, "
            "then start the command again."
        ) from error


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Holds a lock on the directory: another job waits and finds the copies, and no two count the same free space.

    A temporary file of this host that is seen under the lock was left by a process that was killed. Where the file
    system has no locks, jobs copy side by side; each renames its own file into place.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            for leftover in directory.glob(f"{_TEMPORARY}*"):
                leftover.unlink()
        yield
    finally:
        os.close(descriptor)
