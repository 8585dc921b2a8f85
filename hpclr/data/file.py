"""One open dataset file; everything in it that could stop a training run later is found when it is opened."""

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from hpclr.data.layout import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    CHUNK_CACHE_BYTES,
    FIELDS,
    NAMES,
    SPLITS,
    STATISTICS,
    Array,
    ContentDigest,
    decode_json,
    fault_in,
    rows_in,
    text,
)
from hpclr.data.rows import RowReader, row_reader
from hpclr.data.structure import check_structure, task_of
from hpclr.errors import UsageError

_DIGEST = re.compile(r"[0-9a-f]{64}")


class DatasetFile:
    """An open dataset file whose structure was found right.

    Pickled for another process it is opened anew there, when something is first read from it.

    Attributes:
        path: the file.
        task, classes, sample_shape, dtype, mean, std, sizes: as of `Dataset`.
        trusted: whether the file says that its content was checked when it was written.
        digest: sha256 of the content.
        stamp: size in bytes and time of the last change (mtime_ns) of the file when it was opened.

    Raises:
        UsageError: as `open_dataset`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: h5py.File | None = _open(path)
        self._fields: dict[str, h5py.Dataset] = {}
        self._row_readers: dict[str, RowReader] = {}
        try:
            with _damage_named(path, "the structure"):
                self._describe(self._file)
            if not self.trusted:
                self.digest = self._scan()
        except BaseException:
            self.close()
            raise

    def _describe(self, file: h5py.File) -> None:
        self.task = task_of(self.path, file)
        check_structure(self.path, file, self.task)
        field = FIELDS[self.task][0]
        first = file["train"][field]
        self.sizes: dict[str, int] = {split: len(file[split][field]) for split in SPLITS if split in file}
        self.sample_shape: tuple[int, ...] = tuple(first.shape[1:])
        self.dtype: np.dtype[Any] = first.dtype
        self.mean, self.std = self._statistic("mean", file), self._statistic("std", file)
        self.classes: list[str] = decode_json(file[NAMES[self.task]][...])
        self.digest = stored_digest(file)
        self.trusted: bool = bool(self.digest)
        self.stamp = _stamp(file)

    def _statistic(self, name: str, file: h5py.File) -> npt.NDArray[np.float64]:
        present = name in STATISTICS[self.task]
        return file[name][...].astype(np.float64) if present else np.empty(0)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "_fields": {}, "_row_readers": {}}

    def close(self) -> None:
        """Closes the file; nothing can then be read from it in this process."""
        self._fields.clear()
        self._row_readers.clear()
        if self._file is not None:
            self._file.close()

    def read_into(self, out: Array, split: str, field: str, first: int) -> None:
        """Fills `out` (k, …) with the rows `first` to `first` + k − 1 of a field of a split."""
        with _damage_named(self.path, f"{split}/{field}"):
            self._field(split, field).read_direct(out, np.s_[first : first + len(out)])

    def read(self, split: str, field: str, rows: npt.NDArray[np.int64]) -> Array:
        """The given rows (k,) of a field, in the order asked for; read in the order of the file."""
        unique, places = np.unique(rows, return_inverse=True)
        with _damage_named(self.path, f"{split}/{field}"):
            return self._row_reader(split, field)(unique)[places]

    def rows_in_chunk(self, split: str) -> int:
        """Samples in a chunk of a split as it is stored, or so many of these chunks as make 1 MiB."""
        stored = self._field(split, FIELDS[self.task][0])
        rows: int = stored.chunks[0] if stored.chunks else 1
        return rows * max(1, rows_in(CHUNK_BYTES, self.sample_shape, self.dtype.itemsize) // rows)

    def verify(self) -> None:
        """As `Dataset.verify`."""
        if self.trusted and (found := self._scan()) != self.digest:
            raise UsageError(
                f"{self.path}: the content is not what the file was checked with: its attribute digest is "
                f"{self.digest}, the digest of its content {found}. Prepare the data again, or, if the change is "
                "meant, remove the attributes checked and digest."
            )

    def check(self, split: str, arrays: dict[str, Array], first: int) -> None:
        """Refuses rows, of which `first` is the first one's index in the split, that must not be in a dataset."""
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
        for name in (*STATISTICS[self.task], NAMES[self.task]):
            digest.update(name, self._opened()[name][...])
        return digest.hexdigest()

    def _scan_block(self, split: str, first: int, last: int, digest: ContentDigest) -> None:
        with _damage_named(self.path, split):
            arrays = {field: self._field(split, field)[first:last] for field in FIELDS[self.task]}
        for field, values in arrays.items():
            digest.update(f"{split}/{field}", values)
        self.check(split, arrays, first)

    def _field(self, split: str, field: str) -> h5py.Dataset:
        """A dataset, kept open: HDF5 keeps the chunks that it read for as long as that."""
        name = f"{split}/{field}"
        if name not in self._fields:
            self._fields[name] = self._opened()[name]
        return self._fields[name]

    def _row_reader(self, split: str, field: str) -> RowReader:
        name = f"{split}/{field}"
        if name not in self._row_readers:
            self._row_readers[name] = row_reader(self._field(split, field))
        return self._row_readers[name]

    def _opened(self) -> h5py.File:
        if self._file is None:
            self._file = _open(self.path)
            if (found := _stamp(self._file)) != self.stamp:
                raise UsageError(
                    f"{self.path}: the file was changed or replaced while it was in use: it had {self.stamp}, now "
                    f"{found}. Leave datasets as they are while a run uses them, and start the command again."
                )
        return self._file


def stored_digest(file: h5py.File) -> str:
    """The digest that a file was checked with when it was written; "" if it was not."""
    digest = text(file.attrs.get("digest", ""))
    return digest if bool(file.attrs.get("checked", False)) and _DIGEST.fullmatch(digest) else ""


def identity(path: Path) -> str:
    """64 hexadecimal digits that tell the content of a file from others: its digest, else a hash of its stamp.

    Raises:
        UsageError: if it cannot be opened.
    """
    with _open(path) as file, _damage_named(path, "the attributes"):
        return stored_digest(file) or hashlib.sha256(repr(sorted(_stamp(file).items())).encode()).hexdigest()


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
        return _open_hdf5(path)
    except BlockingIOError as error:
        raise UsageError(
            f"{path}: another program has the file open for writing ({error}). Let it end, or read a copy of the file."
        ) from error
    except OSError as error:
        raise UsageError(_damaged(path, "the file", error)) from error


def _open_hdf5(path: Path) -> h5py.File:
    """The file, with a shared lock where the file system gives one.

    The lock keeps writers out that would change what is read. Any number of readers have it at once, so it is no
    hindrance to them; but Lustre and NFS may be mounted without locks, or refuse them, and HDF5 then refuses to
    open at all. As dataset files are renamed into place when they are whole, reading works without a lock as well,
    and whoever changes one nevertheless is found out by checksums and stamps.
    """
    try:
        return h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE_BYTES)
    except BlockingIOError:
        raise
    except OSError as error:
        if "unable to lock file" not in str(error):
            raise
        return h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE_BYTES, locking=False)


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


def _stamp(file: h5py.File) -> dict[str, int]:
    """Of the open file itself: its name may lead to another one by now."""
    status = os.fstat(file.id.get_vfd_handle())
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
