"""The layout of a dataset file, as docs/data.md describes it: names, types, chunks and the digest."""

import hashlib
import json
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FORMAT: Final = "hpclr-data"
VERSION: Final = 1
LIBVER: Final = ("v110", "v110")  # HDF5 then checks its own metadata, not only the values
CHUNK_BYTES: Final = 1 << 20
CHUNK_CACHE_BYTES: Final = 16 << 20
BLOCK_BYTES: Final = 4 << 20  # how much is read, checked and written at a time

SPLITS: Final = ("train", "valid", "test")
FIELDS: Final = {"classification": ("x", "y"), "forecasting": ("series",), "language": ("tokens",)}
NAMES: Final = {"classification": "classes", "forecasting": "columns", "language": "vocabulary"}
STATISTICS: Final = {"classification": ("mean", "std"), "forecasting": ("mean", "std"), "language": ()}
CONSECUTIVE: Final = ("forecasting", "language")  # tasks whose splits follow one another in one series
RANKS: Final = {"x": (2, 4), "y": (1,), "series": (2,), "tokens": (1,)}
DTYPES: Final = {"x": ("uint8", "float32"), "y": ("int64",), "series": ("float32",), "tokens": ("uint16",)}

EXPECTED: Final = {
    "classification": (
        "/train/x and /test/x (N, C, H, W) or (N, F) uint8 or float32, /train/y and /test/y (N,) int64, "
        "/valid/x and /valid/y likewise or absent, /mean and /std (C,) float64, /classes JSON list as uint8"
    ),
    "forecasting": (
        "/train/series, /test/series (T, C) float32, /valid/series likewise or absent, "
        "/mean and /std (C,) float64, /columns JSON list as uint8"
    ),
    "language": (
        "/train/tokens, /test/tokens (T,) uint16, /valid/tokens likewise or absent, /vocabulary JSON list as uint8"
    ),
}


def rows_in(size_bytes: int, row_shape: tuple[int, ...], itemsize: int) -> int:
    """How many rows of `row_shape` fit into `size_bytes`; at least one."""
    row_bytes = itemsize * int(np.prod(row_shape, dtype=np.int64))
    return max(1, size_bytes // max(1, row_bytes))


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Chunks of about 1 MiB along the first axis, whole rows in each."""
    return (min(shape[0], rows_in(CHUNK_BYTES, shape[1:], itemsize)), *shape[1:])


def encode_json(value: Any) -> npt.NDArray[np.uint8]:
    """JSON text as bytes: fixed-size data that HDF5 checks, unlike its variable-length strings."""
    return np.frombuffer(json.dumps(value, ensure_ascii=False).encode(), dtype=np.uint8)


def decode_json(array: Array) -> Any:
    """The value behind `encode_json`.

    Raises:
        ValueError: if the bytes are not JSON text.
    """
    return json.loads(array.astype(np.uint8).tobytes().decode())


def text(value: Any) -> str:
    """An HDF5 string attribute as str, however it was stored."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


class ContentDigest:
    """The sha256 of everything a dataset file holds, computed block by block.

    Each dataset has its own sha256 over its values in C order, because the splits are written in
    turns; the digest is the sha256 of the list of these (docs/data.md gives the exact text).
    """

    def __init__(self, task: str) -> None:
        self._task = task
        self._hashes: dict[str, Any] = {}
        self._shapes: dict[str, tuple[str, int, tuple[int, ...]]] = {}

    def update(self, name: str, rows: Array) -> None:
        """Add the next rows of the dataset `name`, such as "train/x"."""
        rows = np.ascontiguousarray(rows)
        if name not in self._hashes:
            self._hashes[name] = hashlib.sha256()
            self._shapes[name] = (rows.dtype.str, 0, rows.shape[1:])
        dtype, count, row_shape = self._shapes[name]
        self._shapes[name] = (dtype, count + len(rows), row_shape)
        self._hashes[name].update(rows.view(np.uint8).data if rows.size else b"")

    def hexdigest(self) -> str:
        """The digest of all rows so far, 64 hexadecimal digits."""
        lines = [f"{FORMAT} {VERSION} {self._task}\n"]
        for name in sorted(self._hashes):
            dtype, count, row_shape = self._shapes[name]
            shape = ",".join(map(str, (count, *row_shape)))
            lines.append(f"{name} {dtype} {shape} {self._hashes[name].hexdigest()}\n")
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def first_not_finite(rows: Array) -> int | None:
    """Index of the first row that holds a NaN or an infinity."""
    if rows.dtype.kind != "f" or np.isfinite(rows).all():
        return None
    return int(np.argmin(np.isfinite(rows).reshape(len(rows), -1).all(axis=1)))


def first_outside(numbers: Array, count: int) -> int | None:
    """Index of the first number outside 0 … count − 1."""
    bad = (numbers < 0) | (numbers >= count)
    return int(np.argmax(bad)) if bad.any() else None


def fault_in(arrays: dict[str, Array], classes: int) -> tuple[int, str] | None:
    """The first row that must not be in a dataset, and what is wrong with it."""
    for name, rows in arrays.items():
        if (row := first_not_finite(rows)) is not None:
            return row, f"{name} holds a value that is NaN or infinite; every value must be a finite number"
    for name, what, names in (("y", "label", "classes"), ("tokens", "token", "names in the vocabulary")):
        if name in arrays and (row := first_outside(arrays[name], classes)) is not None:
            return row, f"the {what} is {int(arrays[name][row])}, expected 0 to {classes - 1} ({classes} {names})"
    return None


def as_array(values: Any, dtype: str) -> Array:
    """`values` as a contiguous array of the little-endian form of `dtype`."""
    return np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<"))
