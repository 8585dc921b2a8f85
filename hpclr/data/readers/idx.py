"""The idx format of MNIST and its relatives: a big-endian header, then raw bytes.

Header: two zero bytes, the type (8: unsigned byte), the number of dimensions, each dimension as uint32.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from hpclr.data.layout import BLOCK_BYTES, Array, rows_in
from hpclr.data.source import (
    Block,
    Part,
    Source,
    check_folder,
    check_lengths,
    class_numbers,
    labelled,
    open_binary,
    reading,
)
from hpclr.errors import UsageError

_SPLITS = {"train": "train", "test": "t10k"}
_CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
_UNSIGNED_BYTE = 8


def read(folder: Path) -> Source:
    """A folder with {train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte, gzipped or not.

    Raises:
        UsageError: naming the file that is missing or is not what its name says.
    """
    check_folder(folder, "idx files such as train-images-idx3-ubyte.gz")
    images = {split: _find(folder, prefix, "images", 3) for split, prefix in _SPLITS.items()}
    files = {split: _find(folder, prefix, "labels", 1) for split, prefix in _SPLITS.items()}
    labels = {split: _labels(file) for split, file in files.items()}
    shapes = {split: _shape(file, 3) for split, file in images.items()}
    for split in _SPLITS:
        check_lengths(images[split], shapes[split][0], files[split], len(labels[split]))
    _check_same_size(images, shapes)
    parts = {split: _part(images[split], shapes[split], labels[split]) for split in _SPLITS}
    return Source("classification", class_numbers(folder, *labels.values()), (1, *shapes["train"][1:]), "uint8", parts)


def read_fashion_mnist(folder: Path) -> Source:
    """Fashion-MNIST: the idx files of `read` with the names of ten kinds of clothing."""
    source = read(folder)
    return replace(source, names=_CLOTHES)


def _find(folder: Path, prefix: str, kind: str, dimensions: int) -> Path:
    pattern = re.compile(rf"{prefix}-{kind}[.-]idx{dimensions}-ubyte(\.gz)?")
    found = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    if not found:
        raise UsageError(
            f"{folder}: expected a file {prefix}-{kind}-idx{dimensions}-ubyte or the same with .gz, found none. "
            "An idx data set has images and labels for train and t10k."
        )
    return found[0]


def _shape(path: Path, dimensions: int) -> tuple[int, ...]:
    with reading(path), open_binary(path) as file:
        return _header(file, path, dimensions)


def _header(file: IO[bytes], path: Path, dimensions: int) -> tuple[int, ...]:
    head = file.read(4 + 4 * dimensions)
    if head[:4] != bytes((0, 0, _UNSIGNED_BYTE, dimensions)) or len(head) < 4 + 4 * dimensions:
        raise UsageError(
            f"{path}: not an idx file of unsigned bytes with {dimensions} dimensions: expected it to begin with "
            f"0000080{dimensions} in hexadecimal, found {head[:4].hex() or 'nothing'}. Check that it is the right file."
        )
    return struct.unpack(f">{dimensions}I", head[4:])


def _labels(path: Path) -> Array:
    with reading(path), open_binary(path) as file:
        (count,) = _header(file, path, 1)
        return np.frombuffer(_exactly(file, count, path), dtype=np.uint8).astype(np.int64)


def _exactly(file: IO[bytes], count: int, path: Path) -> bytes:
    content = file.read(count)
    if len(content) < count:
        raise UsageError(
            f"{path}: the file ends early: expected another {count} bytes, found {len(content)}. Fetch it again."
        )
    return content


def _check_same_size(images: dict[str, Path], shapes: dict[str, tuple[int, ...]]) -> None:
    if shapes["train"][1:] != shapes["test"][1:]:
        raise UsageError(
            f"{images['test']}: its images are {shapes['test'][1:]} pixels, those of {images['train']} "
            f"{shapes['train'][1:]}; both splits must have the same size"
        )


def _part(path: Path, shape: tuple[int, ...], labels: Array) -> Part:
    rows, sample = rows_in(BLOCK_BYTES, shape[1:], 1), shape[1:]

    def every(block: int, step: int) -> Iterator[Block]:
        with open_binary(path) as file:
            _header(file, path, len(shape))
            start, size = file.tell(), int(np.prod(sample))
            for first in range(block * rows, shape[0], step * rows):
                y = labels[first : first + rows]
                file.seek(start + first * size)
                content = _exactly(file, len(y) * size, path)
                yield labelled(np.frombuffer(content, dtype=np.uint8).reshape(-1, 1, *sample), y, path, first)

    # unpacking is all the work there is with a compressed file, and every process would do all of it
    return Part(shape[0], partial(every, 0, 1)) if path.suffix == ".gz" else Part.divisible(shape[0], every)
