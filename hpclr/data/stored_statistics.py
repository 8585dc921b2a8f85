"""The group /statistics, which `hpclr data stats` adds to a dataset file; it is no part of what the digest covers."""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from hpclr.data.dataset import open_dataset
from hpclr.data.layout import LIBVER, STATISTICS, Array, as_array, text
from hpclr.data.writer import create, replacing
from hpclr.errors import UsageError

GROUP = "statistics"


class StoredStatistics(NamedTuple):
    """What the group holds: datasets and attributes by their names (docs/data.md)."""

    arrays: dict[str, Array]
    attributes: dict[str, Any]


def check_space(file: Path, out: Path | None) -> None:
    """Refuses what could not be written, before anything is computed.

    Raises:
        UsageError: if `out` is there already, or without `out` a copy of the file does not fit beside it.
    """
    if out is not None and out.exists():
        raise UsageError(f"--out {out}: the file exists already. Remove it, or name another file.")
    if out is not None:
        return
    size, free = file.stat().st_size, shutil.disk_usage(file.resolve().parent).free
    if size > free:
        raise UsageError(
            f"{file}: statistics are added to a copy, which then takes the place of the file, so that it is whole at "
            f"every moment; that needs {size / 1e6:.0f} MB, and there are {free / 1e6:.0f} MB free in its directory. "
            "Free space, or give --out OTHER.h5 to write the statistics to a small file of their own."
        )


def check_split(file: Path, split: str) -> tuple[str, list[str]]:
    """The digest of a dataset file's content and the names of its classes, none for forecasting.

    Raises:
        UsageError: for a file that is no dataset, has no such split, or holds text.
    """
    with open_dataset(file) as dataset:
        if split not in dataset.sizes:
            raise UsageError(f"--split: {file} has {', '.join(dataset.sizes)}, found '{split}'. Name one that it has.")
        if not STATISTICS[dataset.task]:
            raise UsageError(
                f"{file}: its task is {dataset.task}; tokens have neither mean nor principal components. "
                "`hpclr data inspect` shows how many there are."
            )
        return dataset.digest, dataset.classes if dataset.task == "classification" else []


def write_statistics(file: Path, statistics: StoredStatistics, out: Path | None = None) -> None:
    """Puts statistics into a dataset file in the place of those that are there, or writes them to a file `out`.

    An HDF5 file that is changed in place is lost if its writer is killed. So a copy is changed, and takes the place
    of the file at the end; who has the old one open keeps it.

    Raises:
        UsageError: if there is no room for the copy.
        RetryableError: if the file system refuses to write; the file is as it was.
    """
    target = file.resolve() if out is None else out  # of a link, the file that it leads to
    with replacing(target, file.stat().st_size if out is None else 0) as temporary:
        if out is None:
            shutil.copyfile(target, temporary)
            shutil.copymode(target, temporary)
        with h5py.File(temporary, "a", libver=LIBVER) as copy:
            _fill(copy, statistics)


def _fill(file: h5py.File, statistics: StoredStatistics) -> None:
    if GROUP in file:
        del file[GROUP]
    group = file.create_group(GROUP)
    for name, values in statistics.arrays.items():
        create(group, name, values.shape, str(values.dtype))[...] = as_array(values, str(values.dtype))
    for name, value in statistics.attributes.items():
        group.attrs[name] = np.bytes_(value) if isinstance(value, str) else value


def read_statistics(file: Path) -> StoredStatistics | None:
    """The statistics in a dataset file, or a file of their own; None where there are none.

    Raises:
        UsageError: if HDF5 cannot read them.
    """
    try:
        with h5py.File(os.fspath(file), "r") as content:
            group = content.get(GROUP)
            if not isinstance(group, h5py.Group):
                return None
            attributes = {name: text(v) if isinstance(v, bytes) else v for name, v in group.attrs.items()}
            return StoredStatistics({name: values[...] for name, values in group.items()}, attributes)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"{file}: HDF5 cannot read /{GROUP} ({error}). Run `hpclr data stats` on a sound copy of the file again."
        ) from error
