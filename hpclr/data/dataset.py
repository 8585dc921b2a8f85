"""Opening a dataset file: everything that could stop a training run later is found here."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
import numpy.typing as npt

from hpclr.data.layout import (
    BLOCK_BYTES,
    CHUNK_CACHE_BYTES,
    DTYPES,
    EXPECTED,
    FIELDS,
    FORMAT,
    NAMES,
    SPLITS,
    VERSION,
    Array,
    ContentDigest,
    decode_json,
    fault_in,
    rows_in,
    text,
)
from hpclr.errors import UsageError

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Dataset:
    """An open dataset file whose structure was found right.

    Attributes:
        path: the file.
        task: "classification" or "forecasting".
        classes: names of the classes in the order of the labels; for forecasting the columns.
        sample_shape: (C, H, W) or (F,); for forecasting (C,).
        dtype: type of x or series as stored.
        mean: of each channel over the training split, (C,) float64, in the units of the file.
        std: likewise, never zero.
        sizes: split → number of samples.
        digest: sha256 of the content.
        stamp: size in bytes and time of the last change (mtime_ns) of the file when it was opened. As long as
            it stays the same, so most likely has the content.
    """

    def __init__(self, path: Path, file: h5py.File, task: str, sizes: dict[str, int]) -> None:
        self.path, self.task, self.sizes = path, task, sizes
        self._file = file
        first = file["train"][FIELDS[task][0]]
        self.sample_shape: tuple[int, ...] = tuple(first.shape[1:])
        self.dtype: np.dtype[Any] = first.dtype
        self.mean: npt.NDArray[np.float64] = file["mean"][...].astype(np.float64)
        self.std: npt.NDArray[np.float64] = file["std"][...].astype(np.float64)
        self.classes: list[str] = decode_json(file[NAMES[task]][...])
        self.trusted = _is_checked(file)
        self.digest = text(file.attrs["digest"]) if self.trusted else ""
        self.stamp = _stamp(file)

    def __enter__(self) -> "Dataset":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; batches can then no longer be read from it."""
        self._file.close()

    def read_all(self, split: str, field: str) -> Array:
        """All rows of a field of a split, such as ("train", "x")."""
        with _damage_named(self.path, f"{split}/{field}"):
            return cast(Array, self._file[split][field][...])

    def read(self, split: str, field: str, rows: npt.NDArray[np.int64]) -> Array:
        """The given rows (k,) of a field, in the order asked for; read in the order of the file."""
        unique, places = np.unique(rows, return_inverse=True)
        with _damage_named(self.path, f"{split}/{field}"):
            return _rows(self._file[split][field], unique)[places]

    def verify(self) -> None:
        """Reads every value of a file that says it was checked, and compares the digest with the one it names.

        Of any other file every value was read when it was opened.

        Raises:
            UsageError: if the content is not the one of the digest, or holds values that must not be there.
        """
        if self.trusted and (found := self._scan()) != self.digest:
            raise UsageError(
                f"{self.path}: the content is not what the file was checked with: its attribute digest is "
                f"{self.digest}, the digest of its content {found}. Prepare the data again, or, if the change is "
                "meant, remove the attributes checked and digest."
            )

    def check(self, split: str, arrays: dict[str, Array], first: int = 0) -> None:
        """Refuses values that must not be in a dataset.

        Args:
            split: where the rows are from, for the message.
            arrays: field → rows, all of one length.
            first: index of the first of them in the split.

        Raises:
            UsageError: for a value that is not finite and a label without a class, naming split and index.
        """
        fault = fault_in(arrays, len(self.classes))
        if fault is not None:
            row, what = fault
            raise UsageError(f"{self.path}: {split} split, sample {first + row} (from 0): {what}. Repair the file.")

    def _scan(self) -> str:
        """Reads every value once: refuses what must not be there, and computes the digest on the way."""
        digest = ContentDigest(self.task)
        for split, size in self.sizes.items():
            step = rows_in(BLOCK_BYTES, self.sample_shape, self.dtype.itemsize)
            for first in range(0, size, step):
                self._scan_block(split, first, first + step, digest)
        for name in ("mean", "std", NAMES[self.task]):
            digest.update(name, self._file[name][...])
        return digest.hexdigest()

    def _scan_block(self, split: str, first: int, last: int, digest: ContentDigest) -> None:
        with _damage_named(self.path, split):
            arrays = {field: self._file[split][field][first:last] for field in FIELDS[self.task]}
        for field, values in arrays.items():
            digest.update(f"{split}/{field}", values)
        self.check(split, arrays, first)


def open_dataset(path: Path) -> Dataset:
    """Opens a dataset file after checking that training can use it.

    A file that says it was checked when it was written (docs/data.md) is believed; of any other every value is read
    once, to find what is not finite and labels without a class.

    Raises:
        UsageError: for a file that is missing, unreadable, damaged or not a dataset, naming every part that is
            missing or malformed; for values that must not be there, naming split and index.
    """
    path = Path(path)
    file = _open(path)
    try:
        with _damage_named(path, "the structure"):
            task = _task(path, file)
            _check_structure(path, file, task)
            sizes = {split: len(file[split][FIELDS[task][0]]) for split in SPLITS if split in file}
            dataset = Dataset(path, file, task, sizes)
        if not dataset.trusted:
            dataset.digest = dataset._scan()
    except BaseException:
        file.close()
        raise
    return dataset


def _open(path: Path) -> h5py.File:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        hint = (
            "`hpclr data prepare` makes such a file." if error.errno == errno.ENOENT else "Check path and permission."
        )
        raise UsageError(f"{path}: the dataset cannot be opened: {error.strerror}. {hint}") from error
    if not h5py.is_hdf5(path):
        raise UsageError(
            f"{path}: expected an HDF5 file as `hpclr data prepare` writes it, found another kind of file. "
            "Prepare the data first, and name the file that this makes."
        )
    try:
        return h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE_BYTES)
    except OSError as error:
        raise UsageError(_damaged(path, "the file", error)) from error


def _damaged(path: Path, what: str, error: Exception) -> str:
    return (
        f"{path}: HDF5 cannot read {what}; the file is truncated or damaged ({error}). "
        "Prepare the data again, or copy the file again."
    )


@contextmanager
def _damage_named(path: Path, what: str) -> Iterator[None]:
    """Turns what HDF5 raises for wrong checksums and broken structure into a message."""
    try:
        yield
    except (OSError, RuntimeError, KeyError) as error:
        raise UsageError(_damaged(path, what, error)) from error


def _task(path: Path, file: h5py.File) -> str:
    found = {name: text(file.attrs.get(name, "missing")) for name in ("format", "version", "task")}
    if found["format"] != FORMAT or found["version"] != str(VERSION) or found["task"] not in FIELDS:
        raise UsageError(
            f"{path}: expected the root attributes format='{FORMAT}', version={VERSION}, "
            f"task='classification' or 'forecasting', found {found}. "
            "Write the file with `hpclr data prepare`, or as docs/data.md says."
        )
    return found["task"]


def _is_checked(file: h5py.File) -> bool:
    return bool(file.attrs.get("checked", False)) and bool(_DIGEST.fullmatch(text(file.attrs.get("digest", ""))))


def _stamp(file: h5py.File) -> dict[str, int]:
    """Of the open file itself: its name may lead to another one by now."""
    status = os.fstat(file.id.get_vfd_handle())
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _check_structure(path: Path, file: h5py.File, task: str) -> None:
    problems = [problem for split in SPLITS for problem in _split_problems(file, split, task)]
    problems += _names_problems(file, NAMES[task])
    if not problems:
        problems = _agreement_problems(file, task)
    if problems:
        raise UsageError(
            f"{path}: not a usable dataset: {'; '.join(problems)}. Expected: {EXPECTED[task]}. "
            "Write the file with `hpclr data prepare`, or as docs/data.md says."
        )


def _split_problems(file: h5py.File, split: str, task: str) -> Iterator[str]:
    if split not in file:
        if split != "valid":
            yield f"/{split} is missing"
        return
    for field in FIELDS[task]:
        yield from _field_problems(file, f"{split}/{field}", field)


def _field_problems(file: h5py.File, name: str, field: str) -> Iterator[str]:
    found = _dataset(file, name)
    if found is None:
        yield f"/{name} is missing"
        return
    ranks = {"x": (2, 4), "y": (1,), "series": (2,)}[field]
    if found.ndim not in ranks:
        yield f"/{name} has {found.ndim} dimensions, expected {' or '.join(map(str, ranks))}"
    elif not found.size:
        yield f"/{name} is empty, its shape is {found.shape}"
    if str(found.dtype) not in DTYPES[field]:
        yield f"/{name} is {found.dtype}, expected {' or '.join(DTYPES[field])}"


def _names_problems(file: h5py.File, name: str) -> Iterator[str]:
    for statistic in ("mean", "std"):
        found = _dataset(file, statistic)
        if found is None or found.ndim != 1 or found.dtype.kind != "f":
            yield f"/{statistic} {_is_what(found)}, expected (C,) float64"
    found = _dataset(file, name)
    if found is None or found.dtype != np.uint8:
        yield f"/{name} {_is_what(found)}, expected the bytes of a JSON list"
    elif not _is_list_of_names(found):
        yield f"/{name} is not the JSON text of a list of at least one string"


def _is_what(found: h5py.Dataset | None) -> str:
    return "is missing" if found is None else f"is {found.shape} {found.dtype}"


def _is_list_of_names(found: h5py.Dataset) -> bool:
    try:
        names = decode_json(found[...])
    except ValueError:
        return False
    return isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)


def _agreement_problems(file: h5py.File, task: str) -> list[str]:
    """What is wrong between datasets each of which is right."""
    field = FIELDS[task][0]
    first = file["train"][field]
    problems = []
    for split in (split for split in SPLITS if split in file):
        rows = file[split][field]
        if rows.shape[1:] != first.shape[1:] or rows.dtype != first.dtype:
            problems.append(
                f"/{split}/{field} has samples {rows.shape[1:]} {rows.dtype}, "
                f"/train/{field} has {first.shape[1:]} {first.dtype}"
            )
        if "y" in FIELDS[task] and len(file[split]["y"]) != len(rows):
            problems.append(f"/{split}/{field} has {len(rows)} samples but /{split}/y {len(file[split]['y'])} labels")
    problems += _statistics_problems(file, first.shape[1])
    if task == "forecasting" and (count := len(decode_json(file["columns"][...]))) != first.shape[1]:
        problems.append(f"/columns has {count} names, /train/series has {first.shape[1]} columns")
    return problems


def _statistics_problems(file: h5py.File, channels: int) -> Iterator[str]:
    for name in ("mean", "std"):
        values = file[name][...]
        if values.shape != (channels,):
            yield f"/{name} has {len(values)} values, expected one for each of the {channels} channels"
        elif not np.isfinite(values).all() or (name == "std" and (values <= 0).any()):
            above = ", each above 0" if name == "std" else ""
            yield f"/{name} must hold finite numbers{above}, found {values.tolist()}"


def _dataset(file: h5py.File, name: str) -> h5py.Dataset | None:
    found = file.get(name)
    return found if isinstance(found, h5py.Dataset) else None


def _rows(stored: h5py.Dataset, rows: npt.NDArray[np.int64]) -> Array:
    """Ascending rows of a dataset, each chunk that holds some of them read once."""
    result = np.empty((len(rows), *stored.shape[1:]), dtype=stored.dtype)
    chunk = stored.chunks[0] if stored.chunks else rows_in(BLOCK_BYTES, stored.shape[1:], stored.dtype.itemsize)
    bounds = np.flatnonzero(np.diff(rows // chunk)) + 1
    for first, last in zip([0, *bounds], [*bounds, len(rows)], strict=True):
        start = int(rows[first])
        piece = stored[start : int(rows[last - 1]) + 1]
        result[first:last] = piece[rows[first:last] - start]
    return result
