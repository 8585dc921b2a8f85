"""Batches of a split, each a function of (epoch, index) alone."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpclr.data.augment import Augment, mixup
from hpclr.data.dataset import Dataset
from hpclr.data.order import sample_order
from hpclr.errors import UsageError

_IN_MEMORY_BYTES = 1 << 30  # "auto": splits below this are kept in memory


@dataclass(frozen=True)
class Batch:
    """Samples as the model sees them.

    Attributes:
        x: normalised samples (N, C, H, W) or (N, F).
        y: labels (N,) int64.
        indices: which samples of the split these are (N,) int64.
        y_mixed: labels (N,) of what mixup added with weight 1 − lam; None without mixup.
        lam: the weight of `y` in the loss; 1 without mixup.
    """

    x: Tensor
    y: Tensor
    indices: Tensor
    y_mixed: Tensor | None = None
    lam: float = 1.0

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        mixed = None if self.y_mixed is None else self.y_mixed.to(device)
        return Batch(self.x.to(device), self.y.to(device), self.indices.to(device), mixed, self.lam)

    def split(self, size: int) -> Iterator["Batch"]:
        """The batch in pieces of at most `size` samples."""
        for first in range(0, len(self.y), size):
            rows = slice(first, first + size)
            mixed = None if self.y_mixed is None else self.y_mixed[rows]
            yield Batch(self.x[rows], self.y[rows], self.indices[rows], mixed, self.lam)


class Loader:
    """Gives any batch of any epoch at once, without those before it, which is what makes resuming exact.

    Args:
        dataset: an open classification dataset; it must stay open while batches are read from disk.
        split: "train", "valid" or "test".
        batch_size: samples a batch; the last one of an epoch may be smaller.
        seed: with the epoch, decides on order, augmentation and mixup.
        shuffle: a new order each epoch; otherwise the order of the file.
        augment: what is done to the pictures.
        mixup: alpha of the Beta distribution of mixup's weight; 0 for none.
        in_memory: whether to read the split once and keep it; "auto": if it is below 1 GiB.
        dtype: of x.

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
        shuffle: bool,
        augment: Augment | None = None,
        mixup: float = 0.0,
        in_memory: bool | Literal["auto"] = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        _check(dataset, split, batch_size, augment, mixup)
        self.dataset, self.split, self.size = dataset, split, dataset.sizes[split]
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.augment, self.mixup, self.dtype = augment, mixup, dtype
        channels = (-1,) + (1,) * (len(dataset.sample_shape) - 1)
        self._mean = torch.from_numpy(dataset.mean).to(dtype).reshape(channels)
        self._std = torch.from_numpy(dataset.std).to(dtype).reshape(channels)
        size_bytes = self.size * math.prod(dataset.sample_shape) * dataset.dtype.itemsize
        keep = size_bytes < _IN_MEMORY_BYTES if in_memory == "auto" else in_memory
        self._kept = self._read_all() if keep else None

    def __len__(self) -> int:
        """Batches an epoch, the smaller last one included."""
        return -(-self.size // self.batch_size)

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch `index` of an epoch, both from 0; the same arguments always give the same batch.

        Raises:
            IndexError: if the epoch has no such batch.
            UsageError: if the file turns out to be damaged.
        """
        indices = self._indices(epoch, index)
        x = self._rows("x", indices).to(self.dtype).sub_(self._mean).div_(self._std)
        y = self._rows("y", indices)
        if self.augment is not None:
            x = self.augment(x, indices, self.seed, epoch)
        if not self.mixup:
            return Batch(x, y, torch.from_numpy(indices))
        x, partners, weight = mixup(x, self.mixup, self.seed, epoch, index)
        return Batch(x, y, torch.from_numpy(indices), y[torch.from_numpy(partners)], weight)

    def _indices(self, epoch: int, index: int) -> npt.NDArray[np.int64]:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index}: an epoch of this split has the batches 0 to {len(self) - 1}")
        first = index * self.batch_size
        positions = np.arange(first, min(first + self.batch_size, self.size))
        return sample_order(self.seed, epoch, positions, self.size) if self.shuffle else positions

    def _rows(self, field: str, indices: npt.NDArray[np.int64]) -> Tensor:
        """Rows as stored, a copy."""
        if self._kept is None:
            return torch.from_numpy(self.dataset.read(self.split, field, indices))
        return self._kept[field].index_select(0, torch.from_numpy(indices))

    def _read_all(self) -> dict[str, Tensor]:
        """The whole split, checked while at hand: `checked` and `digest` may have been copied from another file."""
        arrays = {field: self.dataset.read_all(self.split, field) for field in ("x", "y")}
        self.dataset.check(self.split, arrays)
        return {field: torch.from_numpy(values) for field, values in arrays.items()}


def _check(dataset: Dataset, split: str, batch_size: int, augment: Augment | None, mixup: float) -> None:
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
    if augment is not None and len(dataset.sample_shape) != 3:
        raise UsageError(
            f"{dataset.path}: flip and crop are for pictures (C, H, W), found samples of shape {dataset.sample_shape}. "
            "Leave them out."
        )
    if mixup < 0 or not math.isfinite(mixup):
        raise UsageError(f"mixup: expected 0 (none) or a finite alpha above it, found {mixup}")
