"""What all loaders have in common: batches that are functions of (epoch, index), shared out over processes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpclr.data.dataset import Dataset
from hpclr.data.order import Indices, Order
from hpclr.errors import UsageError

IN_MEMORY_BYTES = 1 << 30  # "auto": splits below this are kept in memory, and shuffled by samples


@dataclass(frozen=True)
class Batch:
    """Samples as the model sees them: a global batch, or one process's part of it.

    Attributes:
        x: normalised samples (N, C, H, W) or (N, F); of time series (N, context, C); of text (N, context) int64.
        y: labels (N,) int64; of time series the normalised rows that follow (N, horizon, C); of text the tokens one
            place further on (N, context) int64.
        indices: which samples of the split these are (N,) int64; of windows, which ones of this epoch.
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
        """The batch on a device; copied while this process goes on, where the device can fetch it by itself."""
        asynchronous = torch.device(device).type != "cpu"  # a copy to the CPU would be used before it is there
        return self._each(lambda tensor: tensor.to(device, non_blocking=asynchronous))

    def in_pinned_memory(self) -> "Batch":
        """A copy in page-locked memory, from which a CUDA device can fetch it by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, work: Callable[[Tensor], Tensor]) -> "Batch":
        mixed = None if self.y_mixed is None else work(self.y_mixed)
        return Batch(work(self.x), work(self.y), work(self.indices), mixed, self.lam, self.weight)

    def split(self, size: int) -> Iterator["Batch"]:
        """The batch in pieces of at most `size` samples; each keeps the weight of the whole."""
        for first in range(0, len(self.y), size):
            rows = slice(first, first + size)
            mixed = None if self.y_mixed is None else self.y_mixed[rows]
            yield Batch(self.x[rows], self.y[rows], self.indices[rows], mixed, self.lam, self.weight)


class Form(NamedTuple):
    """What one sample's x or y is in a batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class BatchLoader(ABC):
    """Gives any batch of any epoch at once, without those before it, which is what makes resuming exact.

    Can be pickled for another process, where it opens the files anew.

    Args:
        dataset: an open dataset; it must stay open while batches are read from disk.
        split: "train", "valid" or "test".
        sizes: samples of the split in each file.
        batch_size: samples a global batch; the last one of an epoch may be smaller.
        seed: with the epoch, decides on everything that is random.
        shuffle: the order of an epoch, or True for `Order("samples")`; False for the order of the file.
        part: this process's rank and the number of processes. Rank r of N gets the rows from s·r/N to
            s·(r + 1)/N, rounded down, of each global batch of s samples.

    Attributes:
        size: samples an epoch.
        order: the order of an epoch; None without shuffling.
        mixup: alpha of the Beta distribution of mixup's weight; 0 for none.
        x_form, y_form: shape and type of a sample's x and y.
        kept: the split as it is stored, where it is in memory.

    Raises:
        UsageError: for a split that is not there, and a batch larger than it.
    """

    mixup: float = 0.0
    x_form: Form
    y_form: Form
    kept: dict[str, Tensor] | None = None

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        sizes: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        shuffle: bool | Order,
        part: tuple[int, int],
    ) -> None:
        check_split(dataset, split)
        self.size = sum(sizes)
        _check(dataset, split, self.size, batch_size, part)
        self.dataset, self.split, self._sizes = dataset, split, list(sizes)
        self.batch_size, self.seed, self.part = batch_size, seed, part
        self.order = shuffle if isinstance(shuffle, Order) else Order() if shuffle else None

    def __len__(self) -> int:
        """Batches an epoch, the smaller last one included."""
        return -(-self.size // self.batch_size)

    def samples(self, step: int) -> int:
        """How many samples the global batch of a step has."""
        return min(self.batch_size, self.size - step % len(self) * self.batch_size)

    @abstractmethod
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
        return self.order.batch(self.seed, epoch, positions, self._sizes)

    def _share(self, size: int, piece: tuple[int, int]) -> tuple[int, int, float]:
        """The rows of a global batch in a piece of this part: the first, the one after the last; the part's weight."""
        (rank, processes), (number, pieces) = self.part, piece
        first, last = (size * place // processes for place in (rank, rank + 1))
        if first == last:
            return 0, int(number == 0), 0.0
        rows = [size * (rank * pieces + place) // (processes * pieces) for place in (number, number + 1)]
        return rows[0], rows[1], (last - first) / size


def split_bytes(dataset: Dataset, split: str) -> int:
    """Size of the samples of a split."""
    return dataset.sizes[split] * math.prod(dataset.sample_shape) * dataset.dtype.itemsize


def is_kept(dataset: Dataset, split: str, in_memory: bool | Literal["auto"]) -> bool:
    """Whether a split is read once and kept; "auto": if it is below 1 GiB."""
    return split_bytes(dataset, split) < IN_MEMORY_BYTES if in_memory == "auto" else in_memory


def empty(shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool = False) -> Tensor:
    """An uninitialised tensor in memory from numpy, which asks for huge pages: torch's takes twice as long to fill."""
    if pinned:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    size_bytes = math.prod(shape) * dtype.itemsize
    if not size_bytes:  # numpy gives it strides that torch cannot view
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(np.empty(size_bytes, np.uint8)).view(dtype).view(shape)


def check_split(dataset: Dataset, split: str) -> None:
    """Refuses a split that a dataset does not have.

    Raises:
        UsageError: naming those that it has.
    """
    if split not in dataset.sizes:
        raise UsageError(f"{dataset.path}: no split '{split}', found {', '.join(dataset.sizes)}. Prepare it with one.")


def _check(dataset: Dataset, split: str, size: int, batch_size: int, part: tuple[int, int]) -> None:
    if not 1 <= batch_size <= size:
        raise UsageError(
            f"{dataset.path}: batch_size is {batch_size}, the {split} split has {size} samples. "
            f"Take a batch size from 1 to {size}."
        )
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part: expected (rank, number of processes) with rank from 0 to number − 1, found {part}")
