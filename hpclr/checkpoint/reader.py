"""Reading a checkpoint file as tensors; `scan.py` finds out what is in it and refuses what should not be."""

import hashlib
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from hpclr.checkpoint.digest import check_found
from hpclr.checkpoint.entry import Entry
from hpclr.checkpoint.format import STORED_AS
from hpclr.checkpoint.parts import Part, Parts, held, read_piece
from hpclr.checkpoint.scan import NewerVersionError, Scan, opened, refuse
from hpclr.checkpoint.source import FileSource, MemorySource, check_start
from hpclr.checkpoint.tree import Json, Tree
from hpclr.errors import RetryableError, UsageError

__all__ = ["NewerVersionError", "read_attrs", "read_tree", "read_verified"]

_BLOCK = 8 << 20  # bytes read at once
_THREADS = 4  # that take checksums; zlib makes about 3 GB/s in each
_ALIGNMENT = 64  # bytes; a tensor that lies otherwise in the file is copied

Sharded: TypeAlias = list[tuple[Entry, torch.Tensor]]
"""Sharded tensors, each with the memory in which its rows are put together."""


def read_attrs(path: Path) -> dict[str, int | float | str]:
    """The root attributes: `format`, `version`, `step`, and what the writer added.

    Raises:
        UsageError: the file is missing, or not of this format; `NewerVersionError` if it is newer.
        OSError: it cannot be read for a reason that is not its content.
    """
    with opened(path) as scan:
        return scan.attrs


def read_parts(path: Path) -> tuple[Part, ...]:
    """The files that hold the rows of a checkpoint's sharded tensors; raises as `read_attrs` does."""
    with opened(path) as scan:
        return scan.parts


def read_tree(path: Path, only: str | None = None) -> Tree:
    """The tree in a file; tensors are on the CPU, whole, of the dtype, shape and bits that were saved.

    Args:
        path: the file. Its digest is not looked at here, nor those of its parts: see `load_file`; every tensor's
            checksum is.
        only: one key of the tree; the result is the tree with this key alone, little else is read.

    Raises:
        UsageError: the file or a part is missing, not of this format, damaged, or has no key `only`.
        RetryableError: a tensor does not fit into memory.
        OSError: the file cannot be read for a reason that is not its content.
    """
    sharded: Sharded = []
    with opened(path) as scan:
        tree = _tree(scan, only, lambda entry: _read(scan, entry, sharded))
        parts = scan.parts
    if only is not None and only not in tree:
        raise UsageError(f"{path}: expected an entry {only!r} at the top of the checkpoint, found none")
    _put_together(path, parts, sharded, digests=False)
    return tree


def read_verified(path: Path, digests: Sequence[str]) -> tuple[dict[str, int | float | str], Tree]:
    """The root attributes and the whole tree of a file that has one of these digests, read once.

    HDF5 sees the bytes only after their digest was found to be right, and they are the same bytes. Tensors are views
    of one buffer that holds the file (version 2): it lives for as long as any of them, so clone what is to outlive
    the rest. Sharded tensors are put together in memory of their own; the parts must have the digests that the file
    says.

    Args:
        path: the file.
        digests: SHA-256 in hexadecimal, as `digest.read_sidecar` gives them.

    Raises:
        UsageError: the file or a part is missing, has another length or digest than recorded, or is not of this format.
        RetryableError: it does not fit into memory.
        OSError: it cannot be read for a reason that is not its content.
    """
    content, digest = _read_and_hash(path)
    check_found(path, digest, digests, len(content))
    sharded: Sharded = []
    with (
        ThreadPoolExecutor(_THREADS) as threads,
        opened(path, MemorySource(content.numpy().data)) as scan,
    ):
        checksums: list[tuple[Entry, Future[int]]] = []

        def leaf(entry: Entry) -> torch.Tensor | Json:
            if entry.offset is None or entry.kind == "json":
                return _read(scan, entry, sharded)
            part = content[entry.offset : entry.offset + entry.nbytes]
            checksums.append((entry, threads.submit(zlib.crc32, part.numpy().data)))
            return as_saved(path, entry, part if entry.offset % _ALIGNMENT == 0 else part.clone())

        tree = _tree(scan, None, leaf)
        for entry, checksum in checksums:
            scan.check_crc32(entry, checksum.result())
        attrs, parts = scan.attrs, scan.parts
    _put_together(path, parts, sharded, digests=True)
    return attrs, tree


def _read_and_hash(path: Path) -> tuple[torch.Tensor, str]:
    """The bytes of a file and their SHA-256, taken by a second thread behind the reading one."""
    digest = hashlib.sha256()
    with FileSource(path) as source, ThreadPoolExecutor(1) as behind:
        check_start(path, source)  # before memory is taken for a size that is wrong
        source.seek(0)
        content = allocated(path, (source.size,), torch.uint8)
        view, done = content.numpy().data, 0
        while count := source.readinto(view[done : done + _BLOCK]):
            behind.submit(digest.update, view[done : done + count])
            done += count
    return content[:done], digest.hexdigest()


def _tree(scan: Scan, only: str | None, leaf: Callable[[Entry], torch.Tensor | Json]) -> Tree:
    tree: Tree = {}
    for entry in scan.entries(only):
        put(tree, entry.keys, {} if entry.kind == "group" else leaf(entry))
    return tree


def put(tree: Tree, keys: Sequence[str], node: "Tree | torch.Tensor | Json") -> None:
    """Puts something into a tree, in which the groups that it is in are already."""
    group: Any = tree
    for key in keys[:-1]:
        group = group[key]
    group[keys[-1]] = node


def _read(scan: Scan, entry: Entry, sharded: Sharded) -> torch.Tensor | Json:
    content = allocated(scan.path, entry.stored, getattr(torch, STORED_AS[entry.dtype]), entry.name)
    if entry.kind == "sharded":
        sharded.append((entry, content))
        return content.view(getattr(torch, entry.dtype))
    scan.read(entry, content.numpy())
    if entry.kind == "tensor":
        return as_saved(scan.path, entry, content)
    return Json(scan.json(entry, content.numpy()))


# Sharded tensors


def _put_together(path: Path, listed: tuple[Part, ...], sharded: Sharded, *, digests: bool) -> None:
    """Reads the rows of sharded tensors, several parts at a time."""
    parts = Parts(path, listed)
    with ThreadPoolExecutor(_THREADS) as threads:
        for done in [threads.submit(_take_from, parts, number, sharded, digests) for number in range(len(parts))]:
            done.result()
    for entry, content in sharded:
        check_bools(path, entry, content)


def _take_from(parts: Parts, number: int, sharded: Sharded, digest: bool) -> None:
    """Reads the rows that are in one part; the part's digest comes after them, as their checksums name the tensor."""
    mine = [(entry, content, piece) for entry, content in sharded for piece in entry.pieces_in(number)]
    if not (mine or digest):
        return
    holds = held([entry.name for entry, _, _ in mine])
    with parts.opened(number, holds) as source:
        for entry, content, piece in mine:
            view = rows_of(content, piece.offset, piece.rows)
            read_piece(parts.path(number), source, piece, entry.name, view)
        if digest:
            parts.check_digest(source, number, holds)


def rows_of(content: torch.Tensor, offset: int, rows: int) -> memoryview:
    """The bytes of some rows of a contiguous tensor in host memory."""
    return content[offset : offset + rows].numpy().reshape(-1).view(np.uint8).data


def as_saved(path: Path, entry: Entry, data: torch.Tensor) -> torch.Tensor:
    """A tensor of its dtype and shape from its data as it is stored."""
    check_bools(path, entry, data)
    flat = data.reshape(-1).view(getattr(torch, entry.dtype))
    return flat[: np.prod(entry.shape, dtype=int)].reshape(entry.shape)


def check_bools(path: Path, entry: Entry, data: torch.Tensor) -> None:
    """Refuses bytes that are neither 0 nor 1 where they mean truth values."""
    if entry.dtype == "bool" and data.max() > 1:
        refuse(path, entry.name, "bool values 0 and 1", str(int(data.max())))


def allocated(path: Path, shape: tuple[int, ...], dtype: torch.dtype, name: str = "") -> torch.Tensor:
    """New memory on the CPU.

    Raises:
        RetryableError: there is none.
    """
    try:
        return torch.empty(shape, dtype=dtype)
    except (RuntimeError, MemoryError) as error:
        raise RetryableError(
            f"{path}: {name or 'the file'}: not enough memory for a tensor of shape {shape}: {error}. "
            "Ask for more memory; `hpclr verify` checks the file with little."
        ) from error
