"""Reading from a checkpoint what is asked for and no more: rows of its tensors, for any number of processes."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import torch

from hpclr.checkpoint.digest import check_found, digest_of, read_sidecar
from hpclr.checkpoint.entry import Entry
from hpclr.checkpoint.format import STORED_AS
from hpclr.checkpoint.parts import HERE, Part, Parts, StoredPiece, held, read_piece
from hpclr.checkpoint.reader import allocated, as_saved, check_bools, put, rows_of
from hpclr.checkpoint.scan import OlderVersionError, opened, refuse
from hpclr.checkpoint.source import FileSource
from hpclr.checkpoint.tree import Json, Tree, decode_json, show_keys

Keys: TypeAlias = Sequence[str]


def open_file(path: Path, *, verify: bool = True, digests: Sequence[str] | None = None) -> "OpenCheckpoint":
    """Open a checkpoint, wherever it lies, to read parts of it; nothing large is read yet.

    The checksum of whatever is read from it then is compared; the digests of its parts are by `check_parts`.

    Args:
        path: the HDF5 file.
        verify: check the file against its `.sha256` first; without, HDF5 may see a damaged one.
        digests: the SHA-256 digests that the file may have, instead of those in its `.sha256`.

    Raises:
        UsageError: missing, damaged, without its digest, or not a checkpoint that can be read so (versions 2 and 3).
        OSError: it cannot be read for a reason that is not its content.
    """
    source = FileSource(path)
    try:
        if verify:
            check_found(path, digest_of(source), digests or read_sidecar(path), source.size)
        with opened(path, source) as scan:
            if scan.version == 1:
                raise OlderVersionError(
                    f"{path}: expected a checkpoint of format version 2 or 3, of which rows can be read, found version "
                    "1: go on from it on one process, which reads it whole and saves it in a newer one."
                )
            return OpenCheckpoint(path, source, scan.attrs, scan.parts, list(scan.entries()))
    except BaseException:
        source.close()
        raise


class OpenCheckpoint:
    """A checkpoint to read from; as a context manager it is closed at the end.

    Attributes:
        path: of the file.
        step: optimiser steps done.
        attrs: the root attributes.
        keys: those at the top of the tree.
        tensors: keys from the top of the tree → what a tensor is: its `dtype` by name and its `shape`.
    """

    def __init__(
        self,
        path: Path,
        source: FileSource,
        attrs: dict[str, int | float | str],
        parts: tuple[Part, ...],
        entries: Sequence[Entry],
    ) -> None:
        self.path, self.attrs, self.step = path, attrs, int(attrs["step"])
        self.tensors: Mapping[tuple[str, ...], Entry] = {
            entry.keys: entry for entry in entries if entry.kind in ("tensor", "sharded")
        }
        self.keys = list(dict.fromkeys(entry.keys[0] for entry in entries))
        self._source, self._entries, self._parts = source, entries, Parts(path, parts)

    def __enter__(self) -> "OpenCheckpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the files; nothing can be read any more."""
        self._source.close()
        self._parts.close()

    def read(self, *keys: str) -> "Tree | torch.Tensor | Json":
        """What is under these keys, whole: a tree, a tensor or a JSON value; without keys, everything.

        Raises:
            KeyError: there is nothing.
            UsageError: it is damaged, or a part that holds some of it is missing.
            OSError: it cannot be read for another reason.
        """
        above: Tree = {} if keys else {"": {}}
        for entry in self._entries:
            if entry.keys[: len(keys)] == keys:
                put(above, ("", *entry.keys[len(keys) :]), {} if entry.kind == "group" else self._leaf(entry))
        if not above:
            raise KeyError(f"{self.path}: there is no {show_keys(keys)}")
        return above[""]

    def read_rows(self, keys: Keys, offset: int, length: int) -> torch.Tensor:
        """Some rows of a tensor; of a sharded one only the pieces are read that they are in.

        Args:
            keys: of the tensor, from the top of the tree.
            offset: the first row.
            length: how many.

        Raises:
            KeyError: there is no such tensor; ValueError: it has no such rows.
            UsageError: what was read is damaged, or a part that holds some of it is missing.
            OSError: it cannot be read for another reason.
        """
        entry = self.tensors[tuple(keys)]
        if not entry.shape or not 0 <= offset <= offset + length <= entry.shape[0]:
            raise ValueError(
                f"{self.path}: {entry.name}: expected rows of a tensor of shape {entry.shape}, "
                f"found {offset} to {offset + length}"
            )
        shape, dtype = (length, *entry.shape[1:]), getattr(torch, entry.dtype)
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        content = self._rows(entry, offset, length)
        check_bools(self.path, entry, content)
        return content.view(dtype)

    # Parts

    def check_present(self) -> None:
        """Checks that all parts are there, each of its length.

        Raises:
            UsageError: one is not; `MissingPartError` if there is none.
        """
        for number in range(len(self._parts)):
            self._parts.opened(number, self._holds[number]).close()

    def check_parts(self, first: int = 0, every: int = 1) -> None:
        """Compares the digests of parts: of all, or where processes share them, of every so many from the first on.

        Raises:
            UsageError: a part is missing or damaged.
            OSError: one cannot be read for another reason.
        """
        for number in range(first, len(self._parts), every):
            with self._parts.opened(number, self._holds[number]) as source:
                self._parts.check_digest(source, number, self._holds[number])

    @cached_property
    def _holds(self) -> list[str]:
        """What each part holds."""
        names: list[list[str]] = [[] for _ in range(len(self._parts))]
        for entry in self.tensors.values():
            for part in [] if entry.table is None else sorted(set(entry.table[:, 0].tolist())):
                names[part].append(entry.name)
        return [held(found) for found in names]

    # Reading

    def _leaf(self, entry: Entry) -> torch.Tensor | Json:
        content = self._rows(entry, 0, entry.stored[0])
        if entry.kind != "json":
            return as_saved(self.path, entry, content)
        try:
            return Json(decode_json(content.numpy().tobytes()))
        except (ValueError, RecursionError) as error:
            refuse(self.path, entry.name, "JSON", str(error))

    def _rows(self, entry: Entry, offset: int, length: int) -> torch.Tensor:
        """Rows of an entry as they are stored."""
        dtype = getattr(torch, STORED_AS[entry.dtype])
        content = allocated(self.path, (length, *entry.stored[1:]), dtype, entry.name)
        for piece in entry.pieces_between(offset, offset + length):
            start, stop = max(offset, piece.offset), min(offset + length, piece.offset + piece.rows)
            self._copy(entry, piece, start, content[start - offset : stop - offset])
        return content

    def _copy(self, entry: Entry, piece: StoredPiece, start: int, rows: torch.Tensor) -> None:
        """Copies rows from a piece, all of which is read, as its checksum is of it all."""
        is_all = len(rows) == piece.rows
        content = rows if is_all else allocated(self.path, (piece.rows, *rows.shape[1:]), rows.dtype, entry.name)
        path, source = self._file(piece, entry.name)
        read_piece(path, source, piece, entry.name, rows_of(content, 0, piece.rows))
        if not is_all:
            rows.copy_(content[start - piece.offset :][: len(rows)])

    def _file(self, piece: StoredPiece, name: str) -> tuple[Path, FileSource]:
        """Where a piece of a tensor is: in the file itself, or in a part."""
        if piece.part == HERE:
            return self.path, self._source
        return self._parts.path(piece.part), self._parts.held_open(piece.part, f"rows of {name}")
