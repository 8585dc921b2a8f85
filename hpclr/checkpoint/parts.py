"""The files that hold the rows of sharded tensors, one a process, beside the checkpoint that is their index.

    step-00001200.h5                                         the index: the checkpoint itself
    step-00001200.parts/part-0003-of-0008-9f86d081884c7d65.h5

A part's name is made of its number and its SHA-256, which the index holds: it names no files, so it cannot name
others. And the parts of a checkpoint that is being replaced by another of the same step stay beside the new ones.
HDF5 is not asked to read parts here: the index says where in them which rows lie.
"""

import re
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from hpclr.checkpoint.digest import digest_of
from hpclr.checkpoint.source import FileSource, read_at
from hpclr.errors import UsageError

TEMPORARY = ".tmp-"
"""How the names of files begin that are being written."""

HERE = -1
"""The number that stands for the index itself where a part is named."""

MOST_OPEN = 32
"""Part files that are held open at a time."""

_NAME = re.compile(r"part-\d{4,}-of-\d{4,}-[0-9a-f]{16}\.h5")
_ADVICE = "Use another checkpoint, or fetch the part again from a good copy."


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an index knows of a part file: the SHA-256 of its bytes in hexadecimal, and how many they are."""

    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 46)]


class StoredPiece(NamedTuple):
    """Rows of a tensor as an index tells of them: part, first row, how many, byte of the part, checksum."""

    part: int
    offset: int
    rows: int
    place: int
    crc32: int

    def __str__(self) -> str:
        return f"the rows {self.offset} to {self.offset + self.rows}"


class PieceReport(msgspec.Struct, frozen=True, array_like=True):
    """Rows of a sharded tensor that a part holds.

    Attributes:
        keys: the tensor's, from the top of the tree.
        dtype: torch's name of its type.
        shape: of the whole tensor.
        offset: the first of the rows.
        rows: how many; 0 if the part holds none.
        place: the byte of the part file at which they begin.
        crc32: of their bytes.
    """

    keys: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    offset: int
    rows: int
    place: int
    crc32: int


class PartReport(msgspec.Struct, frozen=True):
    """What a process has written: the first process needs those of all for the index.

    `msgspec.to_builtins(report)` is a JSON value to be sent, `msgspec.convert(value, PartReport)` the report again.

    Attributes:
        step: optimiser steps done.
        process: number of the process that has written it.
        processes: how many write one.
        part: the file.
        pieces: one for each sharded tensor, in the order of the tree.
    """

    step: int
    process: int
    processes: int
    part: Part
    pieces: list[PieceReport]

    @property
    def name(self) -> str:
        """Of the file."""
        return part_name(self.part, self.process, self.processes)


class MissingPartError(UsageError):
    """A part is not where it should be; on a network file system it may still appear."""


def parts_directory(index: Path) -> Path:
    """Where the parts of a checkpoint lie: `NAME.parts` beside `NAME.h5`."""
    return index.with_name(index.name.removesuffix(".h5") + ".parts")


def part_name(part: Part, number: int, count: int) -> str:
    """The name of a part's file, of as many."""
    return f"part-{number:04d}-of-{count:04d}-{part.sha256[:16]}.h5"


def part_files(index: Path) -> list[Path]:
    """The parts beside a checkpoint, also those that are being written or are not its own."""
    directory = parts_directory(index)
    if directory.is_symlink() or not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name) or path.name.startswith(TEMPORARY))


def are_whole(files: list[Path]) -> bool:
    """Whether these are the parts of one checkpoint, each once, as far as their names tell."""
    count = len(files)
    starts = {path.name[: -len("-0123456789abcdef.h5")] for path in files}
    return starts == {f"part-{number:04d}-of-{count:04d}" for number in range(count)}


def bytes_of_parts(index: Path) -> int:
    """Of all files beside a checkpoint."""
    total = 0
    for path in part_files(index):
        with suppress(OSError):  # it was deleted meanwhile
            total += path.lstat().st_size
    return total


def remove_parts(index: Path, keep: Container[str] = ()) -> list[Path]:
    """Removes the parts beside a checkpoint but for those of these names, and their directory if nothing is left."""
    removed = [path for path in part_files(index) if path.name not in keep]
    for path in removed:
        path.unlink(missing_ok=True)
    with suppress(OSError):  # something is left, or there was none
        parts_directory(index).rmdir()
    return removed


class Parts:
    """The part files of one checkpoint, for reading.

    Args:
        index: the checkpoint.
        parts: as the index lists them.
    """

    def __init__(self, index: Path, parts: tuple[Part, ...]) -> None:
        self._index, self._parts = index, parts
        self._open: dict[int, FileSource] = {}

    def __len__(self) -> int:
        return len(self._parts)

    def path(self, number: int) -> Path:
        """Of a part."""
        return parts_directory(self._index) / part_name(self._parts[number], number, len(self))

    def opened(self, number: int, holds: str) -> FileSource:
        """A part, open for reading.

        Args:
            number: of the part.
            holds: what of the checkpoint it holds, for messages.

        Raises:
            UsageError: it is missing (`MissingPartError`), no regular file, or of another length than it should be.
            OSError: it cannot be opened.
        """
        path, expected = self.path(number), self._parts[number].bytes
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UsageError(f"{path}: expected a regular file, which holds {holds}, found a link or none. {_ADVICE}")
        if not path.exists():
            raise MissingPartError(
                f"{path}: expected a part of the checkpoint {self._index.name}, which holds {holds}, found none there. "
                f"Copy {parts_directory(self._index).name}/ along with the checkpoint, or use another one."
            )
        source = FileSource(path)
        if source.size != expected:
            source.close()
            raise UsageError(
                f"{path}: expected a part of {expected} bytes, which holds {holds}, found {source.size}. {_ADVICE}"
            )
        return source

    def held_open(self, number: int, holds: str) -> FileSource:
        """As `opened`; the part stays open until many others have been asked for, or until `close`."""
        if number not in self._open:
            if len(self._open) >= MOST_OPEN:
                self._open.pop(next(iter(self._open))).close()
            self._open[number] = self.opened(number, holds)
        return self._open[number]

    def close(self) -> None:
        """Closes the parts that are held open."""
        while self._open:
            self._open.popitem()[1].close()

    def check_digest(
        self, source: FileSource, number: int, holds: str, advance: Callable[[int], None] = lambda count: None
    ) -> None:
        """Compares all bytes of an open part with the digest in the index.

        Args:
            source: the part, as `opened` gives it.
            number: of the part.
            holds: what of the checkpoint it holds, for messages.
            advance: called with the number of bytes as they are done.

        Raises:
            UsageError: they have another one.
            OSError: they cannot be read.
        """
        found, expected = digest_of(source, advance), self._parts[number].sha256
        if found != expected:
            raise UsageError(
                f"{self.path(number)}: the content, which holds {holds}, has changed since it was saved: expected "
                f"sha256 {expected} (from {self._index.name}), found {found} over {source.size} bytes. {_ADVICE}"
            )


def held(names: Sequence[str]) -> str:
    """What a part holds rows of, as messages say it."""
    first, more = (names[0] if names else "no tensor"), len(names) - 1
    return f"rows of {first}" + (f" and {more} more" if more > 0 else "")


def read_piece(path: Path, source: FileSource, piece: StoredPiece, name: str, view: memoryview) -> None:
    """As `checked`, into one view."""
    for _ in checked(path, source, piece, name, [view]):
        pass


def checked(
    path: Path, source: FileSource, piece: StoredPiece, name: str, views: Iterable[memoryview]
) -> Iterator[memoryview]:
    """Fills views, one after the other, with the bytes of a piece, and compares its checksum after the last one.

    Args:
        path: of the file that holds it, for messages.
        source: that file.
        piece: where its bytes are.
        name: of its tensor, for messages.
        views: together as long as the piece; they may be one and the same.

    Yields:
        Each view, once it is filled.

    Raises:
        UsageError: the bytes are others than were saved.
        OSError: they cannot be read.
    """
    place, checksum = piece.place, 0
    for view in views:
        place += read_at(source, place, view)
        checksum = zlib.crc32(view, checksum)
        yield view
    if checksum != piece.crc32:
        raise UsageError(
            f"{path}: {piece} of {name}: expected data with the checksum crc32 {piece.crc32:#010x}, found "
            f"{checksum:#010x}. It has changed since it was saved. {_ADVICE}"
        )
