"""Files written whole or not at all; files of others, read."""

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from hpclr.errors import UsageError


def write_whole(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Writes a file so that it has its old or its new content at every instant, also after a crash.

    Raises:
        OSError: if it cannot be written; the old content is then still there.
    """
    with _written_beside(path, content, mode) as temporary:
        os.replace(temporary, path)
    synchronise(path.parent)


def write_asked(path: Path, content: bytes) -> None:
    """Writes a file that the user has named, as `write_whole`.

    Raises:
        UsageError: if it cannot be written.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; name another place for it") from error


def write_once(path: Path, content: bytes) -> None:
    """Writes a file that is not there yet, whole or not at all; of several who try, one succeeds.

    Raises:
        FileExistsError: if it is there.
        OSError: if it cannot be written, also where the file system has no links.
    """
    with _written_beside(path, content, 0o644) as temporary:
        os.link(temporary, path)


@contextmanager
def _written_beside(path: Path, content: bytes, mode: int) -> Iterator[str]:
    """A temporary file with this content, on the disk; gone after the block."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".tmp-{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        yield temporary
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def synchronise(directory: Path) -> None:
    """Makes renames in a directory survive a power loss."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> BinaryIO:
    """Opens a file by anybody for reading; a pipe of that name does not hold it up.

    Raises:
        OSError: if that is not possible, or it is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is no regular file", str(path))
