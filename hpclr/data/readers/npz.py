"""numpy's .npz archives with x_train, y_train, x_test, y_test and perhaps x_valid, y_valid."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from hpclr.data.layout import BLOCK_BYTES, Array, as_array, rows_in
from hpclr.data.source import Block, Part, Source, check_lengths, class_numbers, labelled, reading
from hpclr.errors import UsageError

_SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "val"), "test": ("test",)}
_X_NAMES = ("x_{}", "X_{}", "{}_x", "{}_images")
_Y_NAMES = ("y_{}", "Y_{}", "{}_y", "{}_labels")
_CHANNELS = (1, 3, 4)


class _Array(NamedTuple):
    """An array in an archive: known by its header, read when needed."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    def __str__(self) -> str:
        return f"{self.path}, array {self.name}"


def read(path: Path) -> Source:
    """An archive with samples (N, F), (N, H, W), (N, C, H, W) or (N, H, W, C) and whole-number labels (N,).

    Bytes stay bytes; every other kind of number becomes float32.

    Raises:
        UsageError: naming the array that is missing or is not what is expected.
    """
    with reading(path):
        headers = _headers(path)
        pairs = {split: pair for split in _SPLIT_NAMES if (pair := _pair(headers, split, path)) is not None}
        labels = {split: _labels(pair[1]) for split, pair in pairs.items()}
    for split, (x, y) in pairs.items():
        check_lengths(x, x.shape[0], y, len(labels[split]))
    first = pairs["train"][0]
    for x, _ in pairs.values():
        if x.shape[1:] != first.shape[1:] or x.dtype != first.dtype:
            raise UsageError(
                f"{x}: expected samples {first.shape[1:]} {first.dtype} as in {first.name}, "
                f"found {x.shape[1:]} {x.dtype}. Bring all splits to one shape and type."
            )
    dtype = "uint8" if first.dtype == np.uint8 else "float32"
    parts = {split: _part(x, labels[split], dtype) for split, (x, _) in pairs.items()}
    row_shape = _channels_first(np.empty((0, *first.shape[1:])), first).shape[1:]
    return Source("classification", class_numbers(path, *labels.values()), row_shape, dtype, parts)


def _headers(path: Path) -> dict[str, _Array]:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        return {name[:-4]: _array(archive, path, name) for name in names}


def _array(archive: zipfile.ZipFile, path: Path, name: str) -> _Array:
    with archive.open(name) as file:
        shape, _, dtype = _header(file, f"{path}, array {name[:-4]}")
    return _Array(path, name[:-4], shape, dtype)


def _header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, whether in Fortran order, and type; leaves the file at the first value."""
    try:
        version = np.lib.format.read_magic(file)
        head = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = head(file)
    except ValueError as error:
        raise UsageError(f"{where}: not an array as numpy writes it ({error}). Write the file again.") from error
    return shape, fortran, dtype


def _pair(headers: dict[str, _Array], split: str, path: Path) -> tuple[_Array, _Array] | None:
    words = _SPLIT_NAMES[split]
    x, y = (_first(headers, [form.format(word) for word in words for form in forms]) for forms in (_X_NAMES, _Y_NAMES))
    if x is not None and y is not None:
        _check(x, y)
        return x, y
    if split == "valid" and x is None and y is None:
        return None
    missing = "x" if x is None else "y"
    raise UsageError(
        f"{path}: expected an array {missing}_{split}, found {', '.join(sorted(headers)) or 'none'}. "
        "The archive must hold x_train, y_train, x_test, y_test, and may hold x_valid, y_valid."
    )


def _first(headers: dict[str, _Array], names: list[str]) -> _Array | None:
    return next((headers[name] for name in names if name in headers), None)


def _check(x: _Array, y: _Array) -> None:
    if x.dtype.kind not in "buif" or len(x.shape) not in (2, 3, 4):
        raise UsageError(
            f"{x}: expected numbers (N, F), (N, H, W), (N, C, H, W) or (N, H, W, C), found {x.shape} {x.dtype}. "
            "Arrays of objects are never loaded; save plain numbers."
        )
    if y.dtype.kind not in "ui" or y.shape[1:] not in ((), (1,)):
        raise UsageError(
            f"{y}: expected whole-number labels (N,), found {y.shape} {y.dtype}. Save class numbers from 0."
        )


def _labels(y: _Array) -> Array:
    return np.concatenate([np.zeros(0, dtype=np.int64), *(rows.reshape(-1).astype(np.int64) for rows in _rows(y))])


def _part(x: _Array, labels: Array, dtype: str) -> Part:
    def blocks() -> Iterator[Block]:
        first = 0
        for rows in _rows(x):
            y = labels[first : first + len(rows)]
            yield labelled(as_array(_channels_first(rows, x), dtype), y, str(x), first)
            first += len(rows)

    return Part(x.shape[0], blocks)


def _rows(array: _Array) -> Iterator[Array]:
    """The rows of an array, block by block; an array in Fortran order has no rows on disk and comes at once."""
    with zipfile.ZipFile(array.path) as archive, archive.open(f"{array.name}.npy") as file:
        shape, fortran, dtype = _header(file, str(array))
        rows = shape[0] if fortran else rows_in(BLOCK_BYTES, shape[1:], dtype.itemsize)
        for first in range(0, shape[0], max(1, rows)):
            count = min(rows, shape[0] - first)
            size = count * int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
            content = file.read(size)
            if len(content) < size:
                raise UsageError(f"{array}: ends early: expected another {size} bytes, found {len(content)}")
            yield np.frombuffer(content, dtype=dtype).reshape((count, *shape[1:]), order="F" if fortran else "C")


def _channels_first(rows: Array, x: _Array) -> Array:
    """(N, H, W) → (N, 1, H, W); (N, H, W, C) → (N, C, H, W) unless the second dimension can be the channels."""
    if rows.ndim == 3:
        return rows[:, None]
    if rows.ndim == 2 or rows.shape[1] in _CHANNELS:
        return rows
    if rows.shape[3] in _CHANNELS:
        return rows.transpose(0, 3, 1, 2)
    raise UsageError(f"{x}: expected 1, 3 or 4 channels first or last, found samples {rows.shape[1:]}")
