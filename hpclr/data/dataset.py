"""A dataset: one file, or several that count as one."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import takewhile
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpclr.data.file import DatasetFile
from hpclr.data.layout import Array
from hpclr.errors import UsageError

_MUST_AGREE = {
    "task": "task",
    "classes": "classes, columns or vocabulary",
    "sample_shape": "shape of a sample",
    "dtype": "type",
}

_MOST_NAMES = 12


class Dataset:
    """Open dataset files, in each split one after another.

    Pickled for another process it opens the files anew there, when something is first read from them.

    Attributes:
        paths: the files.
        path: the first of them.
        task: "classification", "forecasting" or "language".
        classes: names of the classes in the order of the labels; for forecasting the columns, of text the
            vocabulary.
        sample_shape: (C, H, W) or (F,); for forecasting (C,), of text ().
        dtype: type of x, series or tokens as stored.
        mean: of each channel over the training split, (C,) float64, in the units of the file; of several files
            that of their training samples together; of text (0,).
        std: likewise, never zero.
        sizes: split → number of samples, rows or tokens in all files.
        trusted: whether all files say that their content was checked when they were written.
        digest: sha256 of the content; of several files the sha256 of the list of their digests.
        stamp: size in bytes and time of the last change (mtime_ns) of the file when it was opened; of several,
            the list of these. As long as it stays the same, so most likely has the content.

    Raises:
        UsageError: for files that do not fit one another.
    """

    def __init__(self, files: Sequence[DatasetFile]) -> None:
        self.files = list(files)
        first = self.files[0]
        _check_agreement(self.files)
        self.paths, self.path = tuple(file.path for file in files), first.path
        self.task, self.classes = first.task, first.classes
        self.sample_shape, self.dtype = first.sample_shape, first.dtype
        self.trusted = all(file.trusted for file in files)
        names = [split for split in ("train", "valid", "test") if any(split in file.sizes for file in files)]
        self.sizes: dict[str, int] = {split: sum(self.file_sizes(split)) for split in names}
        self.mean, self.std = _statistics(self.files)
        self.digest = _digest(self.files)
        self.stamp: dict[str, Any] = first.stamp if len(files) == 1 else {"files": [file.stamp for file in files]}

    def __enter__(self) -> "Dataset":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; batches can then no longer be read from them."""
        for file in self.files:
            file.close()

    def file_sizes(self, split: str) -> list[int]:
        """Number of samples of a split in each file."""
        return [file.sizes.get(split, 0) for file in self.files]

    def rows_in_chunk(self, split: str) -> int:
        """Samples in a chunk of a split as it is stored in the first file that has it; at least 1 MiB of them."""
        return next(file.rows_in_chunk(split) for file in self.files if split in file.sizes)

    def read_all(self, split: str, field: str) -> Array:
        """All rows of a field of a split, such as ("train", "x")."""
        return self.read_range(split, field, 0, self.sizes[split])

    def read_range(self, split: str, field: str, first: int, last: int) -> Array:
        """The rows `first` to `last` − 1 of a field."""
        out = self._empty(field, last - first)
        for file, offset, start, stop in self._overlaps(split, first, last):
            file.read_into(out[start - first : stop - first], split, field, start - offset)
        return out

    def read(self, split: str, field: str, rows: npt.NDArray[np.int64]) -> Array:
        """The given rows (k,) of a field, in the order asked for; read in the order of the files."""
        if len(self.files) == 1:
            return self.files[0].read(split, field, rows)
        offsets = np.cumsum([0, *self.file_sizes(split)])
        owner = np.searchsorted(offsets, rows, side="right") - 1
        out = self._empty(field, len(rows))
        for number in np.unique(owner).tolist():
            mine = owner == number
            out[mine] = self.files[number].read(split, field, rows[mine] - offsets[number])
        return out

    def verify(self) -> None:
        """Reads every value of files that say that they were checked, and compares the digest with the one they name.

        Of any other file every value was read when it was opened.

        Raises:
            UsageError: if the content is not the one of the digest, or holds values that must not be there.
        """
        for file in self.files:
            file.verify()

    def check(self, split: str, arrays: dict[str, Array], first: int = 0) -> None:
        """Refuses values that must not be in a dataset.

        Args:
            split: where the rows are from, for the message.
            arrays: field → rows, all of one length.
            first: index of the first of them in the split.

        Raises:
            UsageError: for a value that is not finite and a label without a class, naming file, split and index
                in that file.
        """
        count = len(next(iter(arrays.values())))
        for file, offset, start, stop in self._overlaps(split, first, first + count):
            rows = slice(start - first, stop - first)
            file.check(split, {field: values[rows] for field, values in arrays.items()}, start - offset)

    def _empty(self, field: str, rows: int) -> Array:
        if field == "y":
            return np.empty(rows, np.int64)
        return np.empty((rows, *self.sample_shape), self.dtype)

    def _overlaps(self, split: str, first: int, last: int) -> Iterator[tuple[DatasetFile, int, int, int]]:
        """The files that hold the rows `first` to `last` − 1: file, its first row, and which of the rows it holds."""
        offset = 0
        for file, size in zip(self.files, self.file_sizes(split), strict=True):
            start, stop = max(first, offset), min(last, offset + size)
            if start < stop:
                yield file, offset, start, stop
            offset += size


def open_dataset(path: str | PathLike[str] | Sequence[str | PathLike[str]]) -> Dataset:
    """Opens a dataset after checking that training can use it.

    A file that says it was checked when it was written (docs/data.md) is believed; of any other every value is read
    once, to find what is not finite and labels without a class.

    Args:
        path: the file; or several files, which count as one after another in each split.

    Raises:
        UsageError: for a file that is missing, unreadable, damaged or not a dataset, naming every part that is
            missing or malformed; for values that must not be there, naming split and index; for files that do not
            fit one another, naming the two and what differs.
    """
    paths = [path] if isinstance(path, str | PathLike) else path
    if not paths:
        raise UsageError("no dataset file is named; expected at least one")
    files: list[DatasetFile] = []
    try:
        for each in paths:
            files.append(DatasetFile(Path(each)))
        return Dataset(files)
    except BaseException:
        for file in files:
            file.close()
        raise


def _check_agreement(files: Sequence[DatasetFile]) -> None:
    first = files[0]
    for file in files[1:]:
        for name, what in _MUST_AGREE.items():
            expected, found = getattr(first, name), getattr(file, name)
            if found != expected:
                raise UsageError(
                    f"{file.path}: its {what} is {_from(found, expected)}, that of {first.path} is "
                    f"{_from(expected, found)}; files that count as one dataset must agree in it. Prepare them alike, "
                    "or leave one out."
                )


def _from(value: Any, other: Any) -> str:
    """A value for a message that shows two; of a long list of names what begins with the first difference."""
    if not isinstance(value, list) or len(value) <= _MOST_NAMES:
        return f"{value}"
    pairs = zip(value, other, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return f"{len(value)} names, from number {same} (from 0) on {value[same : same + _MOST_NAMES]}"


def _statistics(files: Sequence[DatasetFile]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and standard deviation of all training samples together, from those of each file."""
    if len(files) == 1:
        return files[0].mean, files[0].std
    shares = np.array([file.sizes["train"] for file in files], dtype=np.float64)[:, None]
    shares /= shares.sum()
    means, deviations = (np.stack([getattr(file, name) for file in files]) for name in ("mean", "std"))
    mean = (shares * means).sum(axis=0)
    return mean, np.sqrt((shares * (deviations**2 + (means - mean) ** 2)).sum(axis=0))


def _digest(files: Sequence[DatasetFile]) -> str:
    if len(files) == 1:
        return files[0].digest
    return hashlib.sha256("".join(f"{file.digest}\n" for file in files).encode()).hexdigest()
