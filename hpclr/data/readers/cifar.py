"""CIFAR-10, in its binary version (data_batch_1.bin …) and its python version (data_batch_1 …)."""

from collections.abc import Callable, Iterator
from pathlib import Path

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

BatchReader = Callable[[Path], Iterator[Block]]
Count = Callable[[Path], int]


def read(folder: Path) -> Source:
    """CIFAR-10 from the folder of either version, or the folder above it.

    Raises:
        UsageError: naming the file that is missing or damaged.
    """
    check_folder(folder, "CIFAR-10's data_batch_1.bin … or data_batch_1 …")
    for inner in (folder / name for name in _SUBFOLDERS):
        if list(inner.glob("data_batch_*.bin")):
            return _source(inner, ".bin", _count_binary, _read_binary)
        if list(inner.glob("data_batch_*")):
            return _source(inner, "", _count_pickled, _read_pickled)
    raise UsageError(
        f"{folder}: expected data_batch_1.bin … and test_batch.bin (binary version) or data_batch_1 … and test_batch "
        "(python version), found neither. Unpack the archive and name the folder that it makes."
    )


def _source(folder: Path, suffix: str, count: Count, batches: BatchReader) -> Source:
    train = [folder / f"data_batch_{number}{suffix}" for number in range(1, 6)]
    parts = {
        "train": _part(train, count, batches),
        "test": _part([folder / f"test_batch{suffix}"], count, batches),
    }
    return Source("classification", _CLASSES, _SHAPE, "uint8", parts)


def _part(files: list[Path], count: Count, batches: BatchReader) -> Part:
    def blocks() -> Iterator[Block]:
        for file in files:
            yield from batches(file)

    return Part(sum(count(file) for file in files), blocks)


def _count_binary(path: Path) -> int:
    with reading(path):
        size = path.stat().st_size
    if size % _RECORD:
        raise UsageError(
            f"{path}: expected records of {_RECORD} bytes, found {size} bytes, which is {size % _RECORD} more than "
            f"{size // _RECORD} records. Fetch the file again."
        )
    return size // _RECORD


def _read_binary(path: Path) -> Iterator[Block]:
    rows = BLOCK_BYTES // _RECORD
    with path.open("rb") as file:
        first = 0
        while content := file.read(rows * _RECORD):
            records = np.frombuffer(content, dtype=np.uint8).reshape(-1, _RECORD)
            yield labelled(records[:, 1:].reshape(-1, *_SHAPE), records[:, 0].astype(np.int64), path, first)
            first += len(records)


def _count_pickled(path: Path) -> int:
    return len(_unpickle(path)[1])


def _read_pickled(path: Path) -> Iterator[Block]:
    x, y = _unpickle(path)
    yield labelled(x, y, path, 0)


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
