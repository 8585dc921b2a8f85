"""What a reader hands over: the splits of a data set as they lie on disk, read block by block."""

import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, cast
from zipfile import BadZipFile

from hpclr.data.layout import Array
from hpclr.errors import UsageError

_MOST_CLASSES = 1_000_000  # more only where there are as many samples: every class has a name in memory


class Block(NamedTuple):
    """Consecutive rows of a split."""

    arrays: dict[str, Array]  # field → rows: x and y, or series, or tokens; all of one length
    file: Path | str  # where they come from, for messages
    first: int  # index of the first of them in that file


@dataclass(frozen=True)
class Part:
    """One split in the source.

    Attributes:
        size: number of rows.
        blocks: reads them all, block by block.
        every: `every(first, step)` reads the blocks first, first + step, … of these without reading the others, so
            that several processes can share the work; None where that cannot be, as in a compressed stream.
    """

    size: int
    blocks: Callable[[], Iterator[Block]]
    every: Callable[[int, int], Iterator[Block]] | None = None

    @classmethod
    def divisible(cls, size: int, every: Callable[[int, int], Iterator[Block]]) -> "Part":
        """A split of which any block can be read by itself."""
        return cls(size, lambda: every(0, 1), every)


@dataclass(frozen=True)
class Source:
    """A data set before it is written.

    Attributes:
        names: the classes, in the order of the labels; for forecasting the columns, of text the vocabulary.
        row_shape: shape of one sample (C, H, W) or (F,); for forecasting (C,), of text ().
        dtype: "uint8" or "float32", of x or series; "uint16" of tokens.
        parts: "train" and "test", and "valid" where the source has one.
        origin: the file or folder that was named, for messages.
    """

    task: str
    names: list[str]
    row_shape: tuple[int, ...]
    dtype: str
    parts: dict[str, Part]
    origin: Path | str = ""


def labelled(x: Array, y: Array, file: Path | str, first: int) -> Block:
    """A block of samples and their labels."""
    return Block({"x": x, "y": y}, file, first)


def open_binary(path: Path) -> IO[bytes]:
    """A file for reading, unpacked on the way if its name ends in .gz or .xz."""
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return lzma.open(path, "rb") if path.suffix == ".xz" else path.open("rb")


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turns what a missing or damaged source file raises into a message for the person who named it."""
    try:
        yield
    except (EOFError, OSError, zlib.error, lzma.LZMAError, BadZipFile) as error:
        raise UsageError(
            f"{path}: the source cannot be read ({type(error).__name__}: {error}). "
            "Check that the files are there, complete and readable."
        ) from error


def guarded(blocks: Iterator[Block], source: Path | str) -> Iterator[Block]:
    """The same blocks; what reading them raises is told from what writing them raises."""
    while True:
        with reading(source):
            block = next(blocks, None)
        if block is None:
            return
        yield block


def check_folder(folder: Path, expected: str) -> None:
    """Refuses a source that is not a folder.

    Raises:
        UsageError: naming what was expected in it.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise UsageError(f"{folder}: expected a folder with {expected}, found {found} there. Name the folder itself.")


def check_lengths(x_file: object, x_length: int, y_file: object, y_length: int) -> None:
    """Refuses samples and labels of different numbers.

    Raises:
        UsageError: naming both files and both numbers.
    """
    if x_length != y_length:
        raise UsageError(
            f"{x_file} holds {x_length} samples but {y_file} holds {y_length} labels; there must be one label for "
            "each sample. Check that the two belong together and are complete."
        )


def class_numbers(path: Path, *labels: Array) -> list[str]:
    """Names "0", "1", … for labels whose classes have none, up to the largest label seen.

    Raises:
        UsageError: if the largest label is too large for the number of a class.
    """
    largest = max((int(y.max()) for y in labels if y.size), default=0)
    limit = max(_MOST_CLASSES, sum(y.size for y in labels))
    if largest >= limit:
        raise UsageError(
            f"{path}: the largest label is {largest}, expected one below {limit}: labels are the numbers of the "
            "classes from 0. Number the classes in turn."
        )
    return [str(number) for number in range(1 + largest)]
