"""Writing a dataset file: whole or not at all."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import h5py
import numpy as np

from hpclr.data.layout import (
    CHUNK_CACHE_BYTES,
    FIELDS,
    FORMAT,
    LIBVER,
    NAMES,
    STATISTICS,
    VERSION,
    Array,
    ContentDigest,
    as_array,
    chunk_shape,
    encode_json,
)
from hpclr.data.source import Source
from hpclr.data.statistics import ChannelStatistics
from hpclr.errors import RetryableError, UsageError
from hpclr.files import synchronise


@contextmanager
def replacing(target: Path, size_bytes: int) -> Iterator[Path]:
    """A temporary file beside `target` that takes its place when the block ends well.

    Raises:
        UsageError: before the block, if the directory cannot take a file of this size.
        RetryableError: if the file system refuses to write.
    """
    _check_directory(target, size_bytes)
    _sweep(target)
    temporary = target.with_name(f"{_prefix(target)}{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        synchronise(target.parent)
    except OSError as error:
        raise RetryableError(
            f"{target}: the file could not be written ({error}). Nothing was left there; check the space and the "
            "state of the file system, then run the command again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _prefix(target: Path) -> str:
    return f".tmp-{target.name}-{socket.gethostname()}-"


def _check_directory(target: Path, size_bytes: int) -> None:
    directory = target.parent
    if not directory.is_dir():
        raise UsageError(f"{target}: the directory {directory} does not exist. Make it, or name another file.")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UsageError(f"{target}: no permission to write in {directory}. Name a file in another directory.")
    free = shutil.disk_usage(directory).free
    if size_bytes > free:
        raise UsageError(
            f"{target}: the dataset needs {size_bytes / 1e6:.0f} MB, {directory} has {free / 1e6:.0f} MB free. "
            "Free space, or name a file on another disk."
        )


def _sweep(target: Path) -> None:
    """Removes what writers of this file left when they were killed on this host."""
    prefix = _prefix(target)
    for path in target.parent.iterdir():
        owner = path.name.removeprefix(prefix)
        if owner != path.name and owner.isdecimal() and not _is_running(int(owner)):
            with suppress(OSError):
                path.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


class DatasetWriter:
    """Fills a new dataset file with rows in the order in which they come.

    Args:
        path: where the file is made.
        source: what is written; its parts are not touched.
        sizes: split → number of rows it will have in the file.
    """

    def __init__(self, path: Path, source: Source, sizes: dict[str, int]) -> None:
        self._file = h5py.File(path, "w", libver=LIBVER, rdcc_nbytes=CHUNK_CACHE_BYTES)
        self._task, self._names = source.task, source.names
        self._digest = ContentDigest(source.task)
        self._statistics = ChannelStatistics(source.row_shape[0]) if STATISTICS[source.task] else None
        self._written: dict[str, int] = {}
        for split, size in sizes.items():
            for field in FIELDS[source.task]:
                shape, dtype = ((size,), "int64") if field == "y" else ((size, *source.row_shape), source.dtype)
                create(self._file, f"{split}/{field}", shape, dtype)

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, split: str, arrays: dict[str, Array]) -> None:
        """Writes the next rows of a split; those of train also count for mean and standard deviation."""
        for field, values in arrays.items():
            name = f"{split}/{field}"
            rows = as_array(values, str(self._file[name].dtype))
            first = self._written.get(name, 0)
            self._file[name][first : first + len(rows)] = rows
            self._written[name] = first + len(rows)
            self._digest.update(name, rows)
        if split == "train" and self._statistics is not None:
            self._statistics.update(arrays[FIELDS[self._task][0]])

    def finish(self) -> str:
        """Writes names, statistics and what vouches for the content; returns the digest."""
        for name in STATISTICS[self._task]:
            self._add(name, as_array(getattr(self._statistics, name), "float64"))
        self._add(NAMES[self._task], encode_json(self._names))
        digest = self._digest.hexdigest()
        self._file.attrs.update(
            format=np.bytes_(FORMAT),
            version=VERSION,
            task=np.bytes_(self._task),
            checked=True,
            digest=np.bytes_(digest),
        )
        return digest

    def _add(self, name: str, values: Array) -> None:
        create(self._file, name, values.shape, str(values.dtype))[...] = values
        self._digest.update(name, values)


def create(file: h5py.Group, name: str, shape: tuple[int, ...], dtype: str) -> h5py.Dataset:
    """A new dataset of little-endian numbers, in chunks with checksums."""
    return file.create_dataset(
        name,
        shape,
        np.dtype(dtype).newbyteorder("<"),
        chunks=chunk_shape(shape, np.dtype(dtype).itemsize),
        fletcher32=True,
        track_times=False,
    )
