"""Batches of windows: stretches of a time series with what follows them, and of a text with its next tokens."""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hpclr.data.augment import Augment
from hpclr.data.batches import Batch, BatchLoader, Form, check_split, is_kept
from hpclr.data.dataset import Dataset
from hpclr.data.hashing import Stream, below, hashes, key
from hpclr.data.layout import BLOCK_BYTES, FIELDS, SPLITS, Array, rows_in
from hpclr.data.order import Indices, Order
from hpclr.errors import UsageError


class WindowLoader(BatchLoader):
    """The windows of a split of a time series or a text; none crosses from one file to the next.

    Of a time series, sample i is `context` rows from row i · stride on, with the `horizon` rows after them as y, both
    normalised. The first windows of valid and test take their context from the end of the splits before, so that
    every row is predicted, as in the data loaders of Informer, Autoformer and PatchTST. Of a text, y is x one token
    further on; what is left over at the end of a split and does not fill a window is left out.

    Shuffled windows of train begin, in each epoch anew, as many rows or tokens later as the end of the file allows with
    their number staying the same, so that they have other boundaries and every row has its turn.

    Args:
        dataset: an open dataset for forecasting or of language; it must stay open while batches are read from disk.
        split: "train", "valid" or "test".
        batch_size: samples a global batch; the last one of an epoch may be smaller.
        seed: with the epoch, decides on order and boundaries.
        context: rows or tokens of x.
        horizon: rows of y; not for text, where y is as long as x.
        stride: from the beginning of one window of train to that of the next: by default 1 row, or `context` tokens,
            which is what valid and test always have.
        shuffle: `Order("samples")` or True for it; False for the order of the file.
        part: as of `Loader`.
        augment, mixup: are for pictures, and refused.
        in_memory: as of `Loader`.
        dtype: of x and y of a time series; tokens are int64.

    Raises:
        UsageError: for a split that is not there or holds no window, a batch larger than it, or options that do not
            fit the data; for values that must not be there, in whatever is read.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        batch_size: int,
        seed: int,
        *,
        context: int,
        horizon: int | None = None,
        stride: int | None = None,
        shuffle: bool | Order,
        part: tuple[int, int] = (0, 1),
        augment: Augment | None = None,
        mixup: float = 0.0,
        in_memory: bool | Literal["auto"] = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        _check(dataset, augment, mixup, shuffle)
        self._rows, self._windows = _lay_out(dataset, split, context, horizon, stride, shuffled=bool(shuffle))
        super().__init__(dataset, split, self._windows.sizes, batch_size, seed, shuffle=shuffle, part=part)
        self.context, self.horizon = context, horizon
        kind = torch.int64 if horizon is None else dtype
        self.x_form = Form((context, *dataset.sample_shape), kind)
        self.y_form = Form((horizon or context, *dataset.sample_shape), kind)
        self.kept = {"rows": torch.from_numpy(self._rows.read_all())} if is_kept(dataset, split, in_memory) else None

    def batch(self, epoch: int, index: int, piece: tuple[int, int] = (0, 1)) -> Batch:
        """As `BatchLoader.batch`."""
        indices = self._indices(epoch, index)
        first, last, weight = self._share(len(indices), piece)
        indices = indices[first:last]
        x, y = self._pair(self._stored(self._windows.first_rows(indices, self.seed, epoch)))
        return Batch(x, y, torch.from_numpy(indices), weight=weight)

    def _stored(self, first_rows: Indices) -> Array:
        """The windows (N, length, …) that begin at these rows, as they are stored."""
        length = self._windows.length
        if self.kept is not None:
            windows: Array = self.kept["rows"].numpy()[first_rows[:, None] + np.arange(length)]
            return windows
        out = np.empty((len(first_rows), length, *self.dataset.sample_shape), self.dataset.dtype)
        for window, first in zip(out, first_rows.tolist(), strict=True):
            self._rows.read_into(window, first)
        return out

    def _pair(self, windows: Array) -> tuple[Tensor, Tensor]:
        """What the model sees of windows, and what it is to find."""
        if self.horizon is None:
            tokens = torch.from_numpy(windows.astype(np.int64))
            return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        values = torch.from_numpy((windows - self.dataset.mean) / self.dataset.std).to(self.x_form.dtype)
        return values[:, : self.context].contiguous(), values[:, self.context :].contiguous()


def count_windows(
    dataset: Dataset, split: str, *, context: int, horizon: int | None = None, stride: int | None = None
) -> int:
    """How many samples an epoch of a `WindowLoader` without shuffling has; the arguments are the same.

    Raises:
        UsageError: for a split that is not there or holds no window, and options that do not fit the data.
    """
    return sum(_lay_out(dataset, split, context, horizon, stride, shuffled=False)[1].sizes)


class Windows:
    """Where windows lie in the rows of several files, one after another.

    Args:
        rows: number of rows of each file.
        length: rows of a window.
        stride: from the beginning of one window of a file to that of the next.
        shifted: whether they begin at another row in each epoch.

    Attributes:
        sizes: windows in each file, the same in all epochs.
    """

    def __init__(self, rows: Sequence[int], length: int, stride: int, *, shifted: bool) -> None:
        self.length, self._stride = length, stride
        places = np.maximum(0, np.array(rows, dtype=np.int64) - length + 1)  # where a window can begin
        counts = np.maximum(np.minimum(1, places), places // stride) if shifted else -(-places // stride)
        self._shifts = places - (counts - 1) * stride if shifted else np.ones_like(places)
        self._first_window: Indices = np.concatenate([[0], np.cumsum(counts)])
        self._first_row: Indices = np.concatenate([[0], np.cumsum(rows)[:-1]])
        self.sizes: list[int] = counts.tolist()

    def first_rows(self, windows: Indices, seed: int, epoch: int) -> Indices:
        """The row at which each of these windows (N,) begins in this epoch."""
        file = np.searchsorted(self._first_window, windows, side="right") - 1
        words = hashes(key(seed, epoch, Stream.SHIFT), np.arange(len(self.sizes)))
        begin = self._first_row + below(words, self._shifts)
        return begin[file] + (windows - self._first_window[file]) * self._stride


class Rows:
    """The rows that the windows of a split lie in: of each file the split, after the end of the splits before it.

    Args:
        dataset: an open dataset whose splits follow one another.
        split: which one.
        lead: how many rows of the splits before, as far as there are so many.

    Attributes:
        counts: number of rows of each file.
    """

    def __init__(self, dataset: Dataset, split: str, lead: int) -> None:
        self._dataset, self._field = dataset, FIELDS[dataset.task][0]
        files = [list(_pieces(dataset, number, split, lead))[::-1] for number in range(len(dataset.files))]
        self._pieces = [piece for pieces in files for piece in pieces]
        self.counts = [sum(last - first for _, first, last in pieces) for pieces in files]

    def read_all(self) -> Array:
        """All rows, of all files."""
        shape, dtype = self._dataset.sample_shape, self._dataset.dtype
        out = np.empty((sum(self.counts), *shape), dtype)
        step = rows_in(BLOCK_BYTES, shape, dtype.itemsize)
        for first in range(0, len(out), step):
            self.read_into(out[first : first + step], first)
        return out

    def read_into(self, out: Array, first: int) -> None:
        """Fills `out` (k, …) with the rows from `first` on, and checks them."""
        before = 0
        for split, start, stop in self._pieces:
            offset = before - start  # from a row of the split to its place here
            low, high = max(start, first - offset), min(stop, first + len(out) - offset)
            if low < high:
                rows = self._dataset.read_range(split, self._field, low, high)
                self._dataset.check(split, {self._field: rows}, low)
                out[low + offset - first : high + offset - first] = rows
            before += stop - start


def _pieces(dataset: Dataset, number: int, split: str, lead: int) -> Iterator[tuple[str, int, int]]:
    """What `Rows` takes of a file, from the last piece back to the first: a split, its first row and the one after."""
    wanted = dataset.sizes[split]
    for name in reversed(SPLITS[: SPLITS.index(split) + 1]):
        sizes = dataset.file_sizes(name)
        last = sum(sizes[: number + 1])
        taken = min(wanted, sizes[number])
        yield name, last - taken, last
        wanted = lead if name == split else wanted - taken


def _lay_out(
    dataset: Dataset, split: str, context: int, horizon: int | None, stride: int | None, *, shuffled: bool
) -> tuple[Rows, Windows]:
    _check_lengths(dataset, context, horizon, stride)
    check_split(dataset, split)
    usual = context if horizon is None else 1
    rows = Rows(dataset, split, 0 if horizon is None else context)
    length = context + (horizon or 1)
    training = split == "train"
    windows = Windows(rows.counts, length, (stride or usual) if training else usual, shifted=training and shuffled)
    if not any(windows.sizes):
        need = f"{context} (context) + {f'{horizon} (horizon)' if horizon else '1 (the next token)'}"
        raise UsageError(
            f"{dataset.path}: a window takes {need} = {length} rows, the {split} split has {max(rows.counts)} in a "
            f"row{' with those before it' if not training and horizon else ''}. Take shorter windows, or more data."
        )
    return rows, windows


def _check_lengths(dataset: Dataset, context: int, horizon: int | None, stride: int | None) -> None:
    for name, value in {"context": context, "horizon": horizon, "stride": stride}.items():
        if value is not None and value < 1:
            raise UsageError(f"{name}: expected 1 or more, found {value}")
    if horizon is None and dataset.task == "forecasting":
        raise UsageError(f"{dataset.path} holds time series: say in horizon how many rows are to be predicted.")
    if horizon is not None and dataset.task == "language":
        raise UsageError(
            f"{dataset.path} holds text, of which each next token is predicted; found horizon {horizon}. Leave it out."
        )


def _check(dataset: Dataset, augment: Augment | None, mixup: float, shuffle: bool | Order) -> None:
    if dataset.task not in ("forecasting", "language"):
        raise UsageError(
            f"{dataset.path}: its task is {dataset.task}, expected forecasting or language. Loader is for labelled "
            "samples."
        )
    if augment is not None or mixup:
        raise UsageError(
            f"{dataset.path}: flip, crop and mixup are for pictures, its task is {dataset.task}. Leave them out."
        )
    if isinstance(shuffle, Order) and shuffle.kind != "samples":
        raise UsageError(
            f"{dataset.path}: an order of {shuffle.kind} is for labelled samples, not for windows, which overlap. "
            "Take data.shuffle=samples or auto."
        )
