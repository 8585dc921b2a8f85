"""CIFAR-10, in its binary version (data_batch_1.bin …) and its python version (data_batch_1 …)."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hpclr.data.layout import BLOCK_BYTES, Array
from hpclr.data.readers.unpickling import load_arrays
from hpclr.data.source import Block, Part, Source, check_folder, check_lengths, labelled, reading
from hpclr.errors import UsageError

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_RECORD = 1 + _PIXELS  # a label, then the red, green and blue planes
_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
_SUBFOLDERS = ("", "cifar-10-batches-bin", "cifar-10-batches-py")


class _Version(NamedTuple):
    """How the files of one version are read."""

    suffix: str
    count: Callable[[Path], int]  # samples in a file
    block: Callable[[Path, int], Block]  # of a file, from a sample on
    rows: int  # samples in a block


def read(folder: Path) -> Source:
    """CIFAR-10 from the folder of either version, or the folder above it.

    Raises:
        UsageError: naming the file that is missing or damaged.
    """
    check_folder(folder, "CIFAR-10's data_batch_1.bin … or data_batch_1 …")
    for inner in (folder / name for name in _SUBFOLDERS):
        if list(inner.glob("data_batch_*.bin")):
            return _source(inner, _Version(".bin", _count_binary, _read_binary, BLOCK_BYTES // _RECORD))
        if list(inner.glob("data_batch_*")):
            return _source(inner, _Version("", _count_pickled, _read_pickled, sys.maxsize))
    raise UsageError(
        f"{folder}: expected data_batch_1.bin … and test_batch.bin (binary version) or data_batch_1 … and test_batch "
        "(python version), found neither. Unpack the archive and name the folder that it makes."
    )


def _source(folder: Path, version: _Version) -> Source:
    train = [folder / f"data_batch_{number}{version.suffix}" for number in range(1, 6)]
    parts = {"train": _part(train, version), "test": _part([folder / f"test_batch{version.suffix}"], version)}
    return Source("classification", _CLASSES, _SHAPE, "uint8", parts)


def _part(files: list[Path], version: _Version) -> Part:
    counts = {file: version.count(file) for file in files}
    places = [(file, first) for file in files for first in range(0, counts[file], version.rows)]

    def every(block: int, step: int) -> Iterator[Block]:
        for file, first in places[block::step]:
            yield version.block(file, first)

    return Part.divisible(sum(counts.values()), every)


def _count_binary(path: Path) -> int:
    with reading(path):
        size = path.stat().st_size
    if size % _RECORD:
        raise UsageError(
            f"{path}: expected records of {_RECORD} bytes, found {size} bytes, which is {size % _RECORD} more than "
            f"{size // _RECORD} records. Fetch the file again."
        )
    return size // _RECORD


def _read_binary(path: Path, first: int) -> Block:
    with path.open("rb") as file:
        file.seek(first * _RECORD)
        content = file.read(BLOCK_BYTES // _RECORD * _RECORD)
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, _RECORD)
    return labelled(records[:, 1:].reshape(-1, *_SHAPE), records[:, 0].astype(np.int64), path, first)


def _count_pickled(path: Path) -> int:
    return len(_unpickle(path)[1])


def _read_pickled(path: Path, first: int) -> Block:
    return labelled(*_unpickle(path), path, first)


def _unpickle(path: Path) -> tuple[Array, Array]:
    with reading(path):
        content = load_arrays(path)
    try:
        images, labels = content[b"data"].array, np.asarray(content[b"labels"], dtype=np.int64)
        if images.dtype != np.uint8 or images.shape[1:] != (_PIXELS,):
            raise ValueError(f"data is {images.shape} {images.dtype}")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UsageError(
            f"{path}: expected a dictionary with data (N, {_PIXELS}) uint8 and labels (N,), found another content "
            f"({error}). Fetch the file again."
        ) from error
    check_lengths(path, len(images), path, len(labels))
    return images.reshape(-1, *_SHAPE), labels
