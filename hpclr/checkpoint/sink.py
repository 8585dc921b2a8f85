"""The file that HDF5 writes into."""

import io
import os
from pathlib import Path
from typing import Any


class Sink(io.FileIO):
    """A new file that keeps its first fault to itself until it is closed.

    HDF5 does not survive a failed write: with a full disk it keeps the file open for good and may
    bring the process down later (seen with HDF5 2.0: segmentation fault at exit). So here a write
    that fails is noted, all later ones are skipped, and `commit` raises what happened once HDF5 is
    done with the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "xb+")
        self.fault: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write all of `data`, unless a write has failed; always reports success."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while self.fault is None and done < len(view):
                done += super().write(view[done:])
        except OSError as error:
            self.fault = error
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        """Set the length, unless a write has failed; always reports success."""
        try:
            if self.fault is None:
                return super().truncate(size)
        except OSError as error:
            self.fault = error
        return size or 0

    def commit(self) -> None:
        """Wait until the bytes are on the disk.

        Raises:
            OSError: this, or any write before, has failed.
        """
        if self.fault is not None:
            raise self.fault
        os.fsync(self.fileno())
