"""Batches of labelled samples, such as pictures, normalised and augmented."""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hpclr.data.augment import Augment, mixing
from hpclr.data.batches import IN_MEMORY_BYTES, Batch, BatchLoader, Form, empty, is_kept, split_bytes
from hpclr.data.chunks import ChunkReader
from hpclr.data.dataset import Dataset
from hpclr.data.order import Indices, Order
from hpclr.errors import UsageError


class Loader(BatchLoader):
    """The batches of a split of labelled samples.

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
        _check(dataset, augment, mixup)
        super().__init__(dataset, split, dataset.file_sizes(split), batch_size, seed, shuffle=shuffle, part=part)
        self.augment, self.mixup, self.dtype = augment, mixup, dtype
        self.x_form, self.y_form = Form(dataset.sample_shape, dtype), Form((), torch.int64)
        channels = (-1,) + (1,) * (len(dataset.sample_shape) - 1)
        self._mean = torch.from_numpy(dataset.mean).to(dtype).reshape(channels)
        self._std = torch.from_numpy(dataset.std).to(dtype).reshape(channels)
        self.kept = self._read_all() if is_kept(dataset, split, in_memory) else None
        self._chunks = self._chunk_reader()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_chunks": self._chunk_reader()}  # what it has in memory is not sent along

    def batch(self, epoch: int, index: int, piece: tuple[int, int] = (0, 1)) -> Batch:
        """As `BatchLoader.batch`."""
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
        kind: "auto" is "chunks" for labelled samples of 1 GiB and more: by the data alone, so that a run has the
            same order wherever it runs, in memory or not; else "samples".
        window: chunks within which samples are mixed.
    """
    large = dataset.task == "classification" and split_bytes(dataset, "train") >= IN_MEMORY_BYTES
    if kind == "chunks" or (kind == "auto" and large):
        return Order("chunks", dataset.rows_in_chunk("train"), window)
    return Order("samples")


def _check(dataset: Dataset, augment: Augment | None, mixup: float) -> None:
    if dataset.task != "classification":
        raise UsageError(
            f"{dataset.path}: its task is {dataset.task}, expected classification. WindowLoader is for the others."
        )
    if augment is not None and len(dataset.sample_shape) != 3:
        raise UsageError(
            f"{dataset.path}: flip and crop are for pictures (C, H, W), found samples of shape {dataset.sample_shape}. "
            "Leave them out."
        )
    if mixup < 0 or not math.isfinite(mixup):
        raise UsageError(f"mixup: expected 0 (none) or a finite alpha above it, found {mixup}")
