"""What a checkpoint file holds, as it is found before it is read."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hpclr.checkpoint.format import STORED_AS
from hpclr.checkpoint.parts import HERE, StoredPiece
from hpclr.checkpoint.tree import show_keys


@dataclass(frozen=True)
class Entry:
    """A group, a tensor, a JSON value or a tensor whose rows are in parts, checked but not read.

    Attributes:
        keys: the keys on the way to it from the top of the tree.
        kind: what it is.
        dtype: torch's name of a tensor's type.
        shape: of the tensor.
        stored: the dataset's shape: (1,) for a tensor without axes or elements. Of a sharded tensor: its own.
        nbytes: of the data as it is stored.
        offset: where the data lies in the file, all of it in one piece; None in version 1.
        crc32: of the data; None in version 1, where HDF5 checks each chunk.
        dataset: HDF5's handle (version 1).
        table: of a sharded tensor: as `sharding.Sharded` has it.
    """

    keys: tuple[str, ...]
    kind: Literal["group", "tensor", "json", "sharded"]
    dtype: str = ""
    shape: tuple[int, ...] = ()
    stored: tuple[int, ...] = ()
    nbytes: int = 0
    offset: int | None = None
    crc32: int | None = None
    dataset: Any = None
    table: np.ndarray[Any, Any] | None = None

    @property
    def name(self) -> str:
        """As messages call it."""
        return show_keys(self.keys)

    def pieces_in(self, part: int) -> list[StoredPiece]:
        """The rows of a sharded tensor that are in a part."""
        if self.table is None:
            return []
        return [StoredPiece(*row) for row in self.table[self.table[:, 0] == part].tolist()]

    def pieces_between(self, start: int, stop: int) -> list[StoredPiece]:
        """Where rows of a tensor are, among others; a tensor that is not sharded is one piece (version 2)."""
        if self.table is None:
            assert self.offset is not None
            assert self.crc32 is not None
            return [StoredPiece(HERE, 0, self.stored[0], self.offset, self.crc32)] if start < stop else []
        first, rows = self.table[:, 1], self.table[:, 2]
        return [StoredPiece(*row) for row in self.table[(first < stop) & (first + rows > start)].tolist()]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, as it is stored."""
        return self.nbytes // self.stored[0]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Of the data as it is stored."""
        return np.dtype(STORED_AS[self.dtype]).newbyteorder("<")
