"""Reading samples from disk by whole chunks."""

from collections import OrderedDict

import numpy as np

from hpclr.data.dataset import Dataset
from hpclr.data.layout import Array
from hpclr.data.order import Chunks, Indices
from hpclr.data.rows import runs


class ChunkReader:
    """Samples of a split, taken out of chunks that are read whole, the last used of which stay in memory.

    Selecting rows costs HDF5 tens of microseconds each, and it would check and copy a chunk anew for every batch
    that has a sample in it. Indexing a chunk in memory costs less than a microsecond.

    Args:
        dataset: an open classification dataset.
        split: which of its splits.
        rows: samples a chunk, as in the order of the run.
    """

    def __init__(self, dataset: Dataset, split: str, rows: int) -> None:
        self._dataset, self._split = dataset, split
        self._chunks = Chunks(dataset.file_sizes(split), rows)
        self._kept: OrderedDict[int, tuple[int, Array, Array]] = OrderedDict()

    def read(self, samples: Indices, keep: int) -> tuple[Array, Array]:
        """The given samples: x (k, …) and y (k,) as stored.

        Args:
            samples: their indices (k,); quickest where those of one chunk are next to each other.
            keep: how many chunks may stay in memory afterwards.
        """
        x = np.empty((len(samples), *self._dataset.sample_shape), self._dataset.dtype)
        y = np.empty(len(samples), np.int64)
        chunks = self._chunks.of(samples)
        for start, stop in runs(chunks):
            first, chunk_x, chunk_y = self._chunk(int(chunks[start]), keep)
            rows = samples[start:stop] - first
            chunk_x.take(rows, axis=0, out=x[start:stop], mode="clip")  # unlike "raise", into `out` directly
            chunk_y.take(rows, out=y[start:stop], mode="clip")
        return x, y

    def _chunk(self, number: int, keep: int) -> tuple[int, Array, Array]:
        """A chunk with the index of its first sample."""
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        while len(self._kept) >= max(1, keep):
            self._kept.popitem(last=False)
        first, last = self._chunks.bounds(number)
        x, y = (self._dataset.read_range(self._split, field, first, last) for field in ("x", "y"))
        self._kept[number] = first, x, y
        return self._kept[number]
