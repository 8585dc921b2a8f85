"""A file in memory that is laid out by HDF5, and gets its data elsewhere."""

import io
from collections.abc import Iterator
from typing import Any

_PAGE_BYTES = 4096


class Skeleton(io.RawIOBase):
    """A sparse file: it keeps what is written to it, and holds zeros everywhere else.

    HDF5 gives every dataset its place in it, of any size, and writes only what describes them. So
    HDF5 never meets a full disk, which it does not survive: it keeps the file open for good and may
    bring the process down later (seen with HDF5 2.0: segmentation fault at exit).
    """

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self._position = 0
        self.size = 0

    def between(self, start: int, stop: int) -> bytes:
        """The bytes from `start` up to `stop`."""
        empty = bytes(_PAGE_BYTES)
        return b"".join(
            self._pages.get(page, empty)[first:last] for page, first, last in _parts_of_pages(start, stop - start)
        )

    def readinto(self, buffer: Any, /) -> int:
        """Fills `buffer` from the current position, beyond the end with zeros, as HDF5 expects it."""
        view = memoryview(buffer).cast("B")
        view[:] = self.between(self._position, self._position + len(view))
        self._position += len(view)
        return len(view)

    def write(self, data: Any, /) -> int:
        """Puts all of `data` at the current position."""
        view = memoryview(data).cast("B")
        done = 0
        for page, first, last in _parts_of_pages(self._position, len(view)):
            content = self._pages.setdefault(page, bytearray(_PAGE_BYTES))
            content[first:last] = view[done : done + last - first]
            done += last - first
        self._position += len(view)
        self.size = max(self.size, self._position)
        return len(view)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Moves the current position, also beyond the end."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        """The current position."""
        return self._position

    def truncate(self, size: int | None = None, /) -> int:
        """Sets the length; HDF5 does this once it is done."""
        self.size = self._position if size is None else size
        return self.size


def _parts_of_pages(start: int, count: int) -> Iterator[tuple[int, int, int]]:
    """The pages that `count` bytes from `start` lie in, each with the part of it that they take."""
    stop = start + count
    while start < stop:
        page, first = divmod(start, _PAGE_BYTES)
        last = min(_PAGE_BYTES, first + stop - start)
        yield page, first, last
        start += last - first
