"""Records of one size, which are written in place and read by other processes meanwhile."""

import os
import stat
from pathlib import Path

import msgspec

from hpclr.output import printable

SIZE = 512  # bytes; small enough to be written at once


def fixed_size(record: msgspec.Struct, texts: tuple[str, ...]) -> bytes:
    """The record as SIZE bytes of JSON, blanks and a final newline.

    Args:
        record: what to write.
        texts: its attributes that may be cut, and are, the longest first, in the record too. They are made printable.

    Raises:
        ValueError: if the rest alone is too long.
    """
    for name in texts:
        setattr(record, name, printable(getattr(record, name)))
    while len(content := msgspec.json.encode(record)) >= SIZE:
        _cut_longest(record, texts, len(content))
    return content.ljust(SIZE - 1) + b"\n"


def _cut_longest(record: msgspec.Struct, texts: tuple[str, ...], size: int) -> None:
    longest = max(texts, key=lambda name: len(getattr(record, name)))
    text = getattr(record, longest)
    if not text:
        raise ValueError(
            f"a record of {type(record).__name__} takes {size} bytes without its texts ({', '.join(texts)}); expected "
            f"fewer than {SIZE}; bound its other attributes"
        )
    setattr(record, longest, text[: len(text) * 3 // 4])


def read_record(path: str | Path, directory: int | None = None) -> bytes:
    """The first SIZE bytes of a file; none of what is no regular file, since a pipe could be waited for endlessly.

    Args:
        path: the file.
        directory: the descriptor of the directory that the path starts from.

    Raises:
        OSError: if it cannot be read.
    """
    if not stat.S_ISREG(os.stat(path, dir_fd=directory, follow_symlinks=False).st_mode):
        return b""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK, dir_fd=directory)
    try:
        return os.read(file, SIZE)
    finally:
        os.close(file)
