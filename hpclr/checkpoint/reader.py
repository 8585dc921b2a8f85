"""Reading a file of `format.py`, and refusing everything else.

HDF5 files may hold links out of the file, types that run code when they are read, and claims of
sizes that no memory holds. So every object is looked at before it is read: what is not of the
layout is refused, and no more is allocated than the file has bytes.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
import torch
from h5py import h5a, h5d, h5o, h5z

from hpclr.checkpoint.format import FORMAT, STORED_AS, VERSION
from hpclr.checkpoint.tree import MAX_DEPTH, Json, Tree, decode_json, unquote_name
from hpclr.errors import RetryableError, UsageError

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_MAX_ATTRIBUTE_BYTES = 1024


class NewerVersionError(UsageError):
    """The file is in order, but of a version of the format that this hpclr does not know yet."""


def read_attrs(path: Path) -> dict[str, int | float | str]:
    """The root attributes: `format`, `version`, `step`, and what the writer added.

    Raises:
        UsageError: the file is missing, or not of this format; `NewerVersionError` if it is newer.
    """
    with _opened(path) as file:
        return _Reader(path).root(file)


def read_tree(path: Path, only: str | None = None) -> Tree:
    """The tree in a file; tensors are on the CPU, of the dtype, shape and bits that were saved.

    Args:
        path: the file. Its digest is not looked at here: see `load_file`.
        only: one key of the tree; the result is the tree with this key alone, little else is read.

    Raises:
        UsageError: the file is missing, not of this format, damaged, or has no key `only`.
    """
    with _opened(path) as file:
        reader = _Reader(path)
        reader.root(file)
        tree = reader.group(file, MAX_DEPTH, only)
    if only is not None and only not in tree:
        raise UsageError(f"{path}: expected an entry {only!r} at the top of the checkpoint, found none")
    return tree


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """The HDF5 file; whatever HDF5 stumbles over inside the block becomes a UsageError."""
    _check_signature(path)
    try:
        with h5py.File(path, "r", locking=False) as file:  # a committed checkpoint is never written again
            yield file
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{path}: HDF5 cannot read the file, it is damaged or was not written by hpclr: {error}. "
            "Use another checkpoint."
        ) from error


def _check_signature(path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"{path}: expected a checkpoint, found {'no file' if path.exists() else 'nothing'} there")
    with path.open("rb") as file:
        start = file.read(len(_SIGNATURE))
    if start != _SIGNATURE:
        hint = (
            " (a file of torch.save? it is not read, as it can run code)" if start.startswith((b"PK", b"\x80")) else ""
        )
        raise UsageError(
            f"{path}: expected an HDF5 file, which starts with {_SIGNATURE!r}, found {start!r}{hint}. "
            "Name a checkpoint written by hpclr."
        )


class _Reader:
    """Reads one file, within the budget of bytes that the file's own length sets."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.budget = path.stat().st_size

    def root(self, file: h5py.File) -> dict[str, int | float | str]:
        """The root attributes, once format and version are found to be right."""
        found = self.text(file, "format")
        if found != FORMAT:
            self.refuse("/", f"the attribute format to be {FORMAT!r}", repr(found))
        version = self.attribute(file, "version")
        if not isinstance(version, int) or version < 1:
            self.refuse("/", "a version of at least 1", repr(version))
        if version > VERSION:
            raise NewerVersionError(
                f"{self.path}: expected a checkpoint of format version 1 to {VERSION}, found version {version}; "
                "it comes from a newer hpclr: use that one, or a checkpoint that this hpclr has written."
            )
        if not isinstance(self.attribute(file, "step"), int):
            self.refuse("/", "an integer attribute step", repr(self.attribute(file, "step")))
        return {name: self.attribute(file, name) for name in file.attrs}

    def group(self, group: h5py.Group, depth: int, only: str | None = None) -> Tree:
        """The tree below a group, or the part of it under the key `only`."""
        if depth < 0:
            self.refuse(group.name, f"groups nested at most {MAX_DEPTH} deep", "more")
        tree: Tree = {}
        for link in group:
            key = unquote_name(link)
            if only is None or key == only:
                tree[key] = self.child(group, link, depth)
        return tree

    def child(self, group: h5py.Group, link: str, depth: int) -> Tree | torch.Tensor | Json:
        """The object behind a link, which must be the only one to it."""
        where = f"{group.name.rstrip('/')}/{link}"
        if not isinstance(group.get(link, getlink=True), h5py.HardLink):
            self.refuse(where, "data inside the file", "a soft or external link")
        info = h5o.get_info(group.id, link.encode())
        if info.rc != 1:
            self.refuse(where, "an object with one name", f"one with {info.rc}")
        child = group[link]
        if isinstance(child, h5py.Group):
            return self.group(child, depth - 1)
        if not isinstance(child, h5py.Dataset):
            self.refuse(where, "a group or a dataset", type(child).__name__)
        return self.leaf(child)

    def leaf(self, dataset: h5py.Dataset) -> torch.Tensor | Json:
        """The tensor or the JSON value in a dataset."""
        kind = self.text(dataset, "kind")
        if kind == "json":
            return Json(self.json(dataset))
        if kind != "tensor":
            self.refuse(dataset.name, "the attribute kind to be 'tensor' or 'json'", repr(kind))
        return self.tensor(dataset)

    def json(self, dataset: h5py.Dataset) -> Any:
        data = self.bits(dataset, "uint8").numpy().tobytes()
        try:
            return decode_json(data)
        except (ValueError, RecursionError) as error:
            self.refuse(dataset.name, "JSON", f"{data[:60]!r} ({error})")

    def tensor(self, dataset: h5py.Dataset) -> torch.Tensor:
        dtype = self.text(dataset, "dtype")
        if dtype not in STORED_AS:
            self.refuse(dataset.name, f"the attribute dtype to be one of {', '.join(STORED_AS)}", repr(dtype))
        bits = self.bits(dataset, STORED_AS[dtype])
        if dtype == "bool" and bits.max() > 1:
            self.refuse(dataset.name, "bool values 0 and 1", str(int(bits.max())))
        return self.shaped(dataset, bits).view(getattr(torch, dtype))

    def shaped(self, dataset: h5py.Dataset, bits: torch.Tensor) -> torch.Tensor:
        """A 0-dimensional or an empty tensor from its stand-in of shape (1,); others as they are."""
        if not h5a.exists(dataset.id, b"shape"):
            return bits
        shape = self.attribute(dataset, "shape")
        without_elements = isinstance(shape, list) and 0 in shape and min(shape) >= 0
        if bits.shape != (1,) or not (shape == [] or without_elements):
            found = f"{shape} stored as {tuple(bits.shape)}"
            self.refuse(dataset.name, "a shape without axes or without elements, stored as (1,)", found)
        return bits[: math.prod(shape)].reshape(shape)

    def bits(self, dataset: h5py.Dataset, dtype: str) -> torch.Tensor:
        """The content of a dataset as it is stored; nothing is allocated before all is checked."""
        self.check_storage(dataset, np.dtype(dtype).newbyteorder("<"))
        content = self.allocated(dataset, getattr(torch, dtype))
        dataset.read_direct(content.numpy())
        return content

    def allocated(self, dataset: h5py.Dataset, dtype: torch.dtype) -> torch.Tensor:
        try:
            return torch.empty(dataset.shape, dtype=dtype)
        except (RuntimeError, MemoryError) as error:
            raise RetryableError(
                f"{self.path}: {dataset.name}: not enough memory for a tensor of shape {dataset.shape}: {error}. "
                "The file is in order; ask for more memory."
            ) from error

    def check_storage(self, dataset: h5py.Dataset, dtype: np.dtype[Any]) -> None:
        if dataset.dtype != dtype:
            self.refuse(dataset.name, f"the type {dtype}", f"{dataset.dtype}")
        plan = dataset.id.get_create_plist()
        filters = [plan.get_filter(index)[0] for index in range(plan.get_nfilters())]
        if plan.get_layout() != h5d.CHUNKED or filters != [h5z.FILTER_FLETCHER32]:
            self.refuse(dataset.name, "chunks with a fletcher32 checksum and no other filter", f"filters {filters}")
        stored, needed = dataset.id.get_storage_size(), math.prod(dataset.shape) * dtype.itemsize
        if not 0 < needed < stored <= self.budget:
            found = f"{needed} bytes of data, {stored} stored, {self.budget} left in the file"
            self.refuse(dataset.name, "data no larger than what the file stores for it", found)
        self.budget -= stored

    def text(self, node: h5py.Group | h5py.Dataset, name: str) -> str:
        value = self.attribute(node, name)
        if not isinstance(value, str):
            self.refuse(node.name, f"a text as attribute {name}", repr(value))
        return value

    def attribute(self, node: h5py.Group | h5py.Dataset, name: str) -> Any:
        """An attribute as int, float, str, or as list of ints."""
        if not h5a.exists(node.id, name.encode()):
            self.refuse(node.name, f"an attribute {name}", "none")
        attribute = h5a.open(node.id, name.encode())
        dtype, shape = attribute.dtype, attribute.shape
        size = math.prod(shape) * dtype.itemsize
        if dtype.kind not in "Siuf" or size > _MAX_ATTRIBUTE_BYTES:
            expected = f"the attribute {name} to be a number or a text of at most {_MAX_ATTRIBUTE_BYTES} bytes"
            self.refuse(node.name, expected, f"{size} bytes of type {dtype}")
        content = np.empty(shape, dtype)
        attribute.read(content)
        value = content.tolist()
        return value.decode("utf-8") if isinstance(value, bytes) else value

    def refuse(self, where: str, expected: str, found: str) -> NoReturn:
        raise UsageError(
            f"{self.path}: {where}: expected {expected}, found {found}. The file is damaged or was not written "
            "by hpclr: use another checkpoint."
        )
