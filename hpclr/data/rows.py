"""Reading single rows of a stored dataset in any order, each of them checked."""

import math
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from zlib import crc32

import h5py
import numpy as np

from hpclr.data.layout import BLOCK_BYTES, Array, rows_in
from hpclr.data.order import Indices

KEPT_BYTES = 128 << 20  # a field up to this, such as the labels, is kept: no more than a shuffle by chunks holds

RowReader = Callable[[Indices], Array]
"""Ascending row numbers (k,), each once → the rows (k, …). Raises OSError where the file is damaged."""


def row_reader(stored: h5py.Dataset) -> RowReader:
    """The quickest way to read single rows of a dataset, which must stay open."""
    if math.prod(stored.shape) * stored.dtype.itemsize <= KEPT_BYTES:
        values: Array = stored[...]
        return lambda rows: values[rows]
    return _DirectRows(stored).read if _is_plain(stored) else lambda rows: _by_chunks(stored, rows)


def runs(values: Indices) -> Iterator[tuple[int, int]]:
    """Where each stretch of equal values begins, and the place after its end."""
    bounds = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return pairwise(bounds if len(values) else [])


def _is_plain(stored: h5py.Dataset) -> bool:
    """Whether a row's bytes lie in the file as they are in memory, within one chunk."""
    created = stored.id.get_create_plist()
    filters = {created.get_filter(number)[0] for number in range(created.get_nfilters())}
    return (
        stored.chunks is not None
        and stored.chunks[1:] == stored.shape[1:]
        and filters <= {h5py.h5z.FILTER_FLETCHER32}  # which comes after the chunk's values
        and stored.dtype.isnative
        and stored.file.driver == "sec2"
        and stored.file.userblock_size == 0
    )


class _DirectRows:
    """Rows read from their places in the file, past HDF5, and yet checked.

    For a single row HDF5 reads and checks the whole chunk, about 1 MiB. Here it does so when a row of a chunk is wanted
    for the first time. Checksums of the chunk's rows are remembered then, 4 bytes each; from there on a row is read
    by itself and compared with its own.
    """

    def __init__(self, stored: h5py.Dataset) -> None:
        self._stored, self._file = stored, stored.file.id.get_vfd_handle()
        self._rows = stored.chunks[0]
        self._row_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
        self._begin = np.zeros(-(-len(stored) // self._rows), np.int64)  # of each chunk in the file; 0: not yet known
        self._checksums = np.zeros(len(stored), np.uint32)

    def read(self, rows: Indices) -> Array:
        out = np.empty((len(rows), *self._stored.shape[1:]), self._stored.dtype)
        chunks = rows // self._rows
        for first, last in runs(chunks):
            chunk = int(chunks[first])
            read = self._read if self._begin[chunk] else self._check
            read(chunk, rows[first:last], out[first:last])
        return out

    def _check(self, chunk: int, rows: Indices, out: Array) -> None:
        """Has HDF5 read and check the chunk."""
        first = chunk * self._rows
        values = self._stored[first : first + self._rows]
        out[...] = values[rows - first]
        begin = self._stored.id.get_chunk_info_by_coord((first, *(0 for _ in out.shape[1:]))).byte_offset
        if begin is not None:  # else it has never been written
            self._checksums[first : first + len(values)] = [crc32(row) for row in _bytes(values)]
            self._begin[chunk] = begin

    def _read(self, chunk: int, rows: Indices, out: Array) -> None:
        places = int(self._begin[chunk]) + (rows - chunk * self._rows) * self._row_bytes
        expected = self._checksums[rows]
        for row, place, checksum, number in zip(
            _bytes(out), places.tolist(), expected.tolist(), rows.tolist(), strict=True
        ):
            if os.preadv(self._file, [row], place) != self._row_bytes or crc32(row) != checksum:
                raise OSError(f"row {number} is no longer what it was when its chunk was checked")


def _bytes(rows: Array) -> Array:
    """The bytes of each row, (k, …) → (k, size of a row), in the same memory."""
    return rows.reshape(len(rows), -1).view(np.uint8)


def _by_chunks(stored: h5py.Dataset, rows: Indices) -> Array:
    """The rows by HDF5, each chunk that holds some of them read once."""
    result = np.empty((len(rows), *stored.shape[1:]), dtype=stored.dtype)
    chunk = stored.chunks[0] if stored.chunks else rows_in(BLOCK_BYTES, stored.shape[1:], stored.dtype.itemsize)
    for first, last in runs(rows // chunk):
        start = int(rows[first])
        piece = stored[start : int(rows[last - 1]) + 1]
        result[first:last] = piece[rows[first:last] - start]
    return result
