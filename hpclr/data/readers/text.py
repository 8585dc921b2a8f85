"""Text in UTF-8: every character is a token, its number the place among the characters that occur."""

import codecs
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hpclr.data.layout import BLOCK_BYTES
from hpclr.data.source import Block, Part, Source, open_binary, reading
from hpclr.errors import UsageError

_CODE_POINTS = 0x110000
_MOST_TOKENS = 1 << 16  # as they are stored in uint16


def read(path: Path) -> Source:
    """A text file, gzipped or xz-compressed or neither, split 80/10/10 in its order.

    Raises:
        UsageError: for a file that is not UTF-8, naming the byte; that has too few characters to split, or too many
            different ones.
    """
    occurs = np.zeros(_CODE_POINTS, dtype=np.bool_)
    count = 0
    with reading(path):
        for points in _code_points(path):
            occurs[points] = True
            count += len(points)
    found = np.flatnonzero(occurs)
    if count < 10:
        raise UsageError(f"{path}: expected at least 10 characters to split 80/10/10, found {count}")
    if len(found) > _MOST_TOKENS:
        raise UsageError(
            f"{path}: found {len(found):,} different characters, expected at most {_MOST_TOKENS:,}, the numbers of "
            "16 bits. Check that the file is text."
        )
    tokens = (np.cumsum(occurs) - 1).astype(np.uint16)  # of each code point
    bounds = {
        "train": (0, count * 8 // 10),
        "valid": (count * 8 // 10, count * 9 // 10),
        "test": (count * 9 // 10, count),
    }
    parts = {split: _part(path, tokens, first, last) for split, (first, last) in bounds.items()}
    return Source("language", [chr(point) for point in found], (), "uint16", parts)


def _part(path: Path, tokens: npt.NDArray[np.uint16], first: int, last: int) -> Part:
    def blocks() -> Iterator[Block]:
        start = 0
        for points in _code_points(path):
            low, high = max(first - start, 0), min(last - start, len(points))
            if low < high:
                yield Block({"tokens": tokens[points[low:high]]}, path, start + low)
            start += len(points)
            if start >= last:
                return

    return Part(last - first, blocks)


def _code_points(path: Path) -> Iterator[npt.NDArray[np.uint32]]:
    """The characters of a file, block by block, without the byte order mark in front that some programs write."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    done = 0
    with open_binary(path) as file:
        while True:
            block = file.read(BLOCK_BYTES)
            done += len(block)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                offset = done - len(error.object) + error.start
                raise UsageError(
                    f"{path}: byte {offset} (from 0) is not UTF-8: found 0x{error.object[error.start]:02x} "
                    f"({error.reason}). Convert the file, as with `iconv -f latin1 -t utf-8`, or repair it."
                ) from error
            if not block:
                return
            yield np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
