"""Reading a checkpoint file as tensors; `scan.py` finds out what is in it and refuses what should not be."""

import hashlib
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpclr.checkpoint.digest import check_found
from hpclr.checkpoint.format import STORED_AS
from hpclr.checkpoint.scan import Entry, NewerVersionError, Scan, opened
from hpclr.checkpoint.source import FileSource, MemorySource, check_start
from hpclr.checkpoint.tree import Json, Tree
from hpclr.errors import RetryableError, UsageError

__all__ = ["NewerVersionError", "read_attrs", "read_tree", "read_verified"]

_BLOCK = 8 << 20  # bytes read at once
_THREADS = 4  # that take checksums; zlib makes about 3 GB/s in each
_ALIGNMENT = 64  # bytes; a tensor that lies otherwise in the file is copied


def read_attrs(path: Path) -> dict[str, int | float | str]:
    """The root attributes: `format`, `version`, `step`, and what the writer added.

    Raises:
        UsageError: the file is missing, or not of this format; `NewerVersionError` if it is newer.
        OSError: it cannot be read for a reason that is not its content.
    """
    with opened(path) as scan:
        return scan.attrs


def read_tree(path: Path, only: str | None = None) -> Tree:
    """The tree in a file; tensors are on the CPU, of the dtype, shape and bits that were saved.

    Args:
        path: the file. Its digest is not looked at here: see `load_file`; every tensor's checksum is.
        only: one key of the tree; the result is the tree with this key alone, little else is read.

    Raises:
        UsageError: the file is missing, not of this format, damaged, or has no key `only`.
        RetryableError: a tensor does not fit into memory.
        OSError: the file cannot be read for a reason that is not its content.
    """
    with opened(path) as scan:
        tree = _tree(scan, only, lambda entry: _read(scan, entry))
    if only is not None and only not in tree:
        raise UsageError(f"{path}: expected an entry {only!r} at the top of the checkpoint, found none")
    return tree


def read_verified(path: Path, digests: Sequence[str]) -> tuple[dict[str, int | float | str], Tree]:
    """The root attributes and the whole tree of a file that has one of these digests, read once.

    HDF5 sees the bytes only after their digest was found to be right, and they are the same bytes. Tensors are views
    of one buffer that holds the file (version 2): it lives for as long as any of them, so clone what is to outlive
    the rest.

    Args:
        path: the file.
        digests: SHA-256 in hexadecimal, as `digest.read_sidecar` gives them.

    Raises:
        UsageError: the file is missing, has another length or digest than recorded, or is not of this format.
        RetryableError: it does not fit into memory.
        OSError: it cannot be read for a reason that is not its content.
    """
    content, digest = _read_and_hash(path)
    check_found(path, digest, digests, len(content))
    with (
        ThreadPoolExecutor(_THREADS) as threads,
        opened(path, MemorySource(content.numpy().data)) as scan,
    ):
        checksums: list[tuple[Entry, Future[int]]] = []

        def leaf(entry: Entry) -> torch.Tensor | Json:
            if entry.offset is None or entry.kind == "json":
                return _read(scan, entry)
            part = content[entry.offset : entry.offset + entry.nbytes]
            checksums.append((entry, threads.submit(zlib.crc32, part.numpy().data)))
            return _as_saved(scan, entry, part if entry.offset % _ALIGNMENT == 0 else part.clone())

        tree = _tree(scan, None, leaf)
        for entry, checksum in checksums:
            scan.check_crc32(entry, checksum.result())
        return scan.attrs, tree


def _read_and_hash(path: Path) -> tuple[torch.Tensor, str]:
    """The bytes of a file and their SHA-256, taken by a second thread behind the reading one."""
    digest = hashlib.sha256()
    with FileSource(path) as source, ThreadPoolExecutor(1) as behind:
        check_start(path, source)  # before memory is taken for a size that is wrong
        source.seek(0)
        content = _allocated(path, (source.size,), torch.uint8)
        view, done = content.numpy().data, 0
        while count := source.readinto(view[done : done + _BLOCK]):
            behind.submit(digest.update, view[done : done + count])
            done += count
    return content[:done], digest.hexdigest()


def _tree(scan: Scan, only: str | None, leaf: Callable[[Entry], torch.Tensor | Json]) -> Tree:
    tree: Tree = {}
    for entry in scan.entries(only):
        group: Any = tree
        for key in entry.keys[:-1]:
            group = group[key]
        group[entry.keys[-1]] = {} if entry.kind == "group" else leaf(entry)
    return tree


def _read(scan: Scan, entry: Entry) -> torch.Tensor | Json:
    content = _allocated(scan.path, entry.stored, getattr(torch, STORED_AS[entry.dtype]), entry.name)
    scan.read(entry, content.numpy())
    if entry.kind == "tensor":
        return _as_saved(scan, entry, content)
    return Json(scan.json(entry, content.numpy()))


def _as_saved(scan: Scan, entry: Entry, data: torch.Tensor) -> torch.Tensor:
    """A tensor of its dtype and shape from its data as it is stored."""
    if entry.dtype == "bool" and data.max() > 1:
        scan.refuse(entry.name, "bool values 0 and 1", str(int(data.max())))
    flat = data.reshape(-1).view(getattr(torch, entry.dtype))
    return flat[: np.prod(entry.shape, dtype=int)].reshape(entry.shape)


def _allocated(path: Path, shape: tuple[int, ...], dtype: torch.dtype, name: str = "") -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=dtype)
    except (RuntimeError, MemoryError) as error:
        raise RetryableError(
            f"{path}: {name or 'the file'}: not enough memory for a tensor of shape {shape}: {error}. "
            "Ask for more memory; `hpclr verify` checks the file with little."
        ) from error
