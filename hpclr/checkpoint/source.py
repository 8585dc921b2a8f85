"""The bytes that HDF5 reads: a regular file whose faults stay `OSError`s, or one that is in memory already."""

import io
import os
import stat
import struct
from pathlib import Path
from typing import Any

from hpclr.errors import UsageError

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SUPERBLOCK = struct.Struct("<8s4B4QI")
_NOWHERE = 2**64 - 1  # the address of what is not there
_ADVICE = "The file is damaged or was not written by hpclr: use another checkpoint."


class FileSource(io.FileIO):
    """A checkpoint file, open for reading.

    Attributes:
        size: bytes of the file when it was opened.
        quiet: whether a read that fails gives zeros, and leaves it to the reader to look at `fault` in the end: HDF5
            does not survive one. It keeps the file open for good, and brings the process down when that ends (2.0).
        start: the first bytes of the file, to be given where they cannot be read again; HDF5 survives no others either.
        fault: what a read has stumbled over.

    Raises:
        UsageError: there is nothing at `path`, or no regular file (a FIFO would be waited for).
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise _no_file(path)
        super().__init__(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
        status = os.fstat(self.fileno())
        if not stat.S_ISREG(status.st_mode):  # it was replaced after the look above
            self.close()
            raise _no_file(path)
        self.size = status.st_size
        self.fault: OSError | None = None
        self.quiet = False
        self.start = b""

    def readinto(self, buffer: Any, /) -> int:
        """Reads into `buffer`; remembers what went wrong."""
        try:
            return super().readinto(buffer) or 0
        except OSError as error:
            self.fault = error
            if not self.quiet:
                raise
        view, position = memoryview(buffer).cast("B"), self.tell()
        view[:] = self.start[position : position + len(view)].ljust(len(view), b"\0")
        return len(view)


class MemorySource(io.RawIOBase):
    """A file whose content is in memory.

    Args:
        content: all its bytes; they are not copied.
    """

    fault: OSError | None = None
    quiet = True
    start = b""

    def __init__(self, content: memoryview) -> None:
        self._content, self._position, self.size = content, 0, len(content)

    def readinto(self, buffer: Any, /) -> int:
        """Copies what comes at the current position."""
        part = self._content[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Moves the current position."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        """The current position."""
        return self._position


Source = FileSource | MemorySource


def read_at(source: Source, offset: int, buffer: memoryview) -> int:
    """Fills `buffer` with the bytes from `offset` on; returns how many there were, fewer only at the end."""
    source.seek(offset)
    done = 0
    while done < len(buffer) and (count := source.readinto(buffer[done:])):
        done += count
    return done


def check_start(path: Path, source: Source) -> None:
    """Checks what stands at the start of a file, before HDF5 sees it.

    The superblock of HDF5's 1.10 form is the only one accepted: older ones leave the descriptions of the data
    without checksums. It names the file's length, so that nothing may have been cut off or added.

    Raises:
        UsageError: it is no HDF5 file, of another form, or of another length than it says.
    """
    start = bytearray(_SUPERBLOCK.size)
    del start[read_at(source, 0, memoryview(start)) :]
    if not start.startswith(_SIGNATURE):
        found = bytes(start[: len(_SIGNATURE)])
        is_pickle = found.startswith((b"PK", b"\x80"))
        hint = " (a file of torch.save? it is not read, as it can run code)" if is_pickle else ""
        raise UsageError(
            f"{path}: expected an HDF5 file, which starts with {_SIGNATURE!r}, found {found!r}{hint}. "
            "Name a checkpoint written by hpclr."
        )
    if len(start) < _SUPERBLOCK.size:
        raise UsageError(f"{path}: expected a superblock of {_SUPERBLOCK.size} bytes, found {len(start)}. {_ADVICE}")
    _, *form, base, extension, end, _, _ = _SUPERBLOCK.unpack(start)
    expected, found_form = [3, 8, 8, 0, 0, _NOWHERE], [*form, base, extension]
    if found_form != expected:
        raise UsageError(
            f"{path}: expected a superblock of HDF5's 1.10 form, closed and without additions {expected}, "
            f"found {found_form}. {_ADVICE}"
        )
    source.start = bytes(start)
    if end != source.size:
        raise UsageError(f"{path}: expected a file of {end} bytes, as it says itself, found {source.size}. {_ADVICE}")


def _no_file(path: Path) -> UsageError:
    found = "no file" if path.exists() else "nothing"
    return UsageError(f"{path}: expected a checkpoint, found {found} there. Name a checkpoint written by hpclr.")
