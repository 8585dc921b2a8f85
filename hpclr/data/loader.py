"""Batches of a split, each a function of (epoch, index) alone; a process reads only its part of them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hpclr.data.augment import Augment, mixing
from hpclr.data.chunks import ChunkReader
from hpclr.data.dataset import Dataset
from hpclr.data.order import Indices, Order
from hpclr.errors import UsageError

_IN_MEMORY_BYTES = 1 << 30  # "auto": splits below this are kept in memory, and shuffled by samples


@dataclass(frozen=True)
class Batch:
    """Samples as the model sees them: a global batch, or one process's part of it.

    Attributes:
        x: normalised samples (N, C, H, W) or (N, F).
        y: labels (N,) int64.
        indices: which samples of the split these are (N,) int64.
        y_mixed: labels (N,) of what mixup added with weight 1 − lam; None without mixup.
        lam: the weight of `y` in the loss; 1 without mixup.
        weight: share of the global batch's samples that are in this part; 0 for the one sample that stands in
            for a part without any.
    """

    x: Tensor
    y: Tensor
    indices: Tensor
    y_mixed: Tensor | None = None
    lam: float = 1.0
    weight: float = 1.0

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        mixed = None if self.y_mixed is None else self.y_mixed.to(device)
        return Batch(self.x.to(device), self.y.to(device), self.indices.to(device), mixed, self.lam, self.weight)

    def split(self, size: int) -> Iterator["Batch"]:
        """The batch in pieces of at most `size` samples; each keeps the weight of the whole."""
        for first in range(0, len(self.y), size):
            rows = slice(first, first + size)
            mixed = None if self.y_mixed is None else self.y_mixed[rows]
            yield Batch(self.x[rows], self.y[rows], self.indices[rows], mixed, self.lam, self.weight)


class Loader:
    """Gives any batch of any epoch at once, without those before it, which is what makes resuming exact.

    Can be pickled for another process, where it opens the files anew.

    Args:
        dataset: an open classification dataset; it must stay open while batches are read from disk.
        split: "train", "valid" or "test".
        batch_size: samples a global batch; the last one of an epoch may be smaller.
        seed: with the epoch, decides on order, augmentation and mixup.
        shuffle: the order of an epoch, or True for `Order("samples")`; False for the order of the file.
        part: this process's rank and the number of processes. Rank r of N gets the rows from s·r/N to
            s·(r + 1)/N, rounded down, of each global batch of s samples.
        augment: what is done to the pictures.
        mixup: alpha of the Beta distribution of mixup's weight; 0 for none.
        in_memory: whether to read the split once and keep it; "auto": if it is below 1 GiB.
        dtype: of x.

    Attributes:
        order: the order of an epoch; None without shuffling.

    Raises:
        UsageError: for a split that is not there, a batch larger than it, or options that do not fit the data;
            for values that must not be there, in a split that is kept in memory.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        batch_size: int,
        seed: int,
        *,
        shuffle: bool | Order,
        part: tuple[int, int] = (0, 1),
        augment: Augment | None = None,
        mixup: float = 0.0,
        in_memory: bool | Literal["auto"] = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        _check(dataset, split, batch_size, part, augment, mixup)
        self.dataset, self.split, self.size = dataset, split, dataset.sizes[split]
        self.batch_size, self.seed, self.part = batch_size, seed, part
        self.order = shuffle if isinstance(shuffle, Order) else Order() if shuffle else None
        self.augment, self.mixup, self.dtype = augment, mixup, dtype
        channels = (-1,) + (1,) * (len(dataset.sample_shape) - 1)
        self._mean = torch.from_numpy(dataset.mean).to(dtype).reshape(channels)
        self._std = torch.from_numpy(dataset.std).to(dtype).reshape(channels)
        keep = split_bytes(dataset, split) < _IN_MEMORY_BYTES if in_memory == "auto" else in_memory
        self.kept = self._read_all() if keep else None
        self._chunks = self._chunk_reader()

    def __len__(self) -> int:
        """Batches an epoch, the smaller last one included."""
        return -(-self.size // self.batch_size)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_chunks": self._chunk_reader()}  # what it has in memory is not sent along

    def batch(self, epoch: int, index: int, piece: tuple[int, int] = (0, 1)) -> Batch:
        """This process's part of global batch `index` of an epoch; the same arguments always give the same batch.

        Args:
            epoch: from 0.
            index: from 0.
            piece: number and count of the pieces in which worker processes make the part; a piece may be empty, a
                part is not: where the global batch has too few samples, its first one stands in, with weight 0.

        Raises:
            IndexError: if the epoch has no such batch.
            UsageError: if the file turns out to be damaged.
        """
        indices = self._indices(epoch, index)
        first, last, weight = self._share(len(indices), piece)
        if not self.mixup:
            x, y = self._samples(indices[first:last], epoch, piece)
            return Batch(x, y, torch.from_numpy(indices[first:last]), weight=weight)
        partners, lam = mixing(self.mixup, self.seed, epoch, index, len(indices))
        theirs = partners[first:last]
        others = np.setdiff1d(theirs, np.arange(first, last))
        x, y = self._samples(np.concatenate([indices[first:last], indices[others]]), epoch, piece)
        inside = (theirs >= first) & (theirs < last)
        places = torch.from_numpy(np.where(inside, theirs - first, last - first + np.searchsorted(others, theirs)))
        x_mixed, y_mixed, count = x[places], y[places], last - first
        x = torch.lerp(x_mixed, x[:count], lam)
        return Batch(x, y[:count], torch.from_numpy(indices[first:last]), y_mixed, lam, weight)

    def most_samples(self, pieces: int = 1) -> int:
        """The most samples that a piece of a part of a batch can have."""
        return -(-self.batch_size // (self.part[1] * pieces))

    def _indices(self, epoch: int, index: int) -> Indices:
        """The samples of the whole global batch."""
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index}: an epoch of this split has the batches 0 to {len(self) - 1}")
        first = index * self.batch_size
        positions = np.arange(first, min(first + self.batch_size, self.size))
        if self.order is None:
            return positions
        return self.order.batch(self.seed, epoch, positions, self.dataset.file_sizes(self.split))

    def _share(self, size: int, piece: tuple[int, int]) -> tuple[int, int, float]:
        """The rows of a global batch in a piece of this part: the first, the one after the last; the part's weight."""
        (rank, processes), (number, pieces) = self.part, piece
        first, last = (size * place // processes for place in (rank, rank + 1))
        if first == last:
            return 0, int(number == 0), 0.0
        rows = [size * (rank * pieces + place) // (processes * pieces) for place in (number, number + 1)]
        return rows[0], rows[1], (last - first) / size

    def _samples(self, indices: Indices, epoch: int, piece: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Samples normalised and augmented, and their labels."""
        stored, y = self._stored(indices, piece)
        x = empty(stored.shape, self.dtype).copy_(stored).sub_(self._mean).div_(self._std)
        if self.augment is not None and len(indices):
            x = self.augment(x, indices, self.seed, epoch)
        return x, y

    def _stored(self, indices: Indices, piece: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Samples and labels as they are stored, copies."""
        if self.kept is not None:
            rows = torch.from_numpy(indices)
            return self.kept["x"].index_select(0, rows), self.kept["y"].index_select(0, rows)
        if self._chunks is not None:
            x, y = self._chunks.read(indices, self._chunks_to_keep(piece))
        else:
            x, y = (self.dataset.read(self.split, field, indices) for field in ("x", "y"))
        return torch.from_numpy(x), torch.from_numpy(y)

    def _chunk_reader(self) -> ChunkReader | None:
        if self.kept is not None or self.order is None or self.order.kind != "chunks":
            return None
        return ChunkReader(self.dataset, self.split, self.order.chunk)

    def _chunks_to_keep(self, piece: tuple[int, int]) -> int:
        """What a piece needs of two windows, as a batch may lie in both; partners of mixup come from all over them."""
        window = 0 if self.order is None else self.order.window
        pieces = 1 if self.mixup else self.part[1] * piece[1]
        return 2 * -(-window // pieces) + 2

    def _read_all(self) -> dict[str, Tensor]:
        """The whole split, checked while at hand: `checked` and `digest` may have been copied from another file."""
        arrays = {field: self.dataset.read_all(self.split, field) for field in ("x", "y")}
        self.dataset.check(self.split, arrays)
        return {field: torch.from_numpy(values) for field, values in arrays.items()}


def choose_order(dataset: Dataset, kind: Literal["auto", "samples", "chunks"], window: int) -> Order:
    """The order in which a new run shows the training samples.

    Args:
        dataset: an open dataset.
        kind: "auto" is "chunks" for a training split of 1 GiB and more: by the data alone, so that a run has the
            same order wherever it runs, in memory or not.
        window: chunks within which samples are mixed.
    """
    large = split_bytes(dataset, "train") >= _IN_MEMORY_BYTES
    if kind == "chunks" or (kind == "auto" and large):
        return Order("chunks", dataset.rows_in_chunk("train"), window)
    return Order("samples")


def split_bytes(dataset: Dataset, split: str) -> int:
    """Size of the samples of a split."""
    return dataset.sizes[split] * math.prod(dataset.sample_shape) * dataset.dtype.itemsize


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in memory from numpy, which asks for huge pages: torch's takes twice as long to fill."""
    size_bytes = math.prod(shape) * dtype.itemsize
    if not size_bytes:  # numpy gives it strides that torch cannot view
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(np.empty(size_bytes, np.uint8)).view(dtype).view(shape)


def _check(
    dataset: Dataset, split: str, batch_size: int, part: tuple[int, int], augment: Augment | None, mixup: float
) -> None:
    if dataset.task != "classification":
        raise UsageError(f"{dataset.path}: its task is {dataset.task}, expected classification")
    if split not in dataset.sizes:
        raise UsageError(f"{dataset.path}: no split '{split}', found {', '.join(dataset.sizes)}. Prepare it with one.")
    size = dataset.sizes[split]
    if not 1 <= batch_size <= size:
        raise UsageError(
            f"{dataset.path}: batch_size is {batch_size}, the {split} split has {size} samples. "
            f"Take a batch size from 1 to {size}."
        )
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part: expected (rank, number of processes) with rank from 0 to number − 1, found {part}")
    if augment is not None and len(dataset.sample_shape) != 3:
        raise UsageError(
            f"{dataset.path}: flip and crop are for pictures (C, H, W), found samples of shape {dataset.sample_shape}. "
            "Leave them out."
        )
    if mixup < 0 or not math.isfinite(mixup):
        raise UsageError(f"mixup: expected 0 (none) or a finite alpha above it, found {mixup}")
