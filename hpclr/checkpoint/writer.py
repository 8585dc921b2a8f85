"""Writing a tree as an HDF5 file, in one pass over its tensors' memory.

HDF5 lays the file out in memory: it places and describes every dataset but never sees the data.
What it made and the tensors, each in its place, are then written as one stream of bytes, which is
hashed on the way.
"""

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any, TypeAlias

import h5py
import msgspec
import numpy as np
import torch
from h5py import h5d, h5p

from hpclr.checkpoint.digest import write_hashed
from hpclr.checkpoint.format import FORMAT, PART_FORMAT, PARTS, SHARDED_VERSION, STORED_AS, VERSION
from hpclr.checkpoint.parts import Part, PartReport, PieceReport
from hpclr.checkpoint.sharding import IndexLike, Keys, Sharded, part_tree, pieces_in
from hpclr.checkpoint.skeleton import Skeleton
from hpclr.checkpoint.tree import MAX_DEPTH, Json, Piece, TreeLike, dtype_name, encode_json, quote_name

_THREADS = 3
"""Threads that take checksums; zlib makes about 3 GB/s in each."""

_ALIGNED_FROM, _ALIGNMENT = 4096, 64
"""Datasets of so many bytes begin at a multiple of 64: they can be used where they lie in a buffer."""

_BYTES_PER_OBJECT = 1024
"""An upper estimate of what HDF5 adds to a dataset or a group: headers, attributes, links, gaps; names aside."""

_BYTES_PER_PART = 128
"""An upper estimate of its entry in the list of parts."""


@dataclass(eq=False)
class _Leaf:
    """What becomes a dataset; `crc32` and `offset` are found while the file is laid out."""

    content: torch.Tensor | bytes
    sharded: Sharded | None = None  # whose table is the content
    crc32: int | None = None
    offset: int = -1

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the dataset. Scalars and tensors without elements are stored as one element beside their true shape."""
        if isinstance(self.content, bytes):
            return (len(self.content),)
        return tuple(self.content.shape) if self.content.dim() and self.content.numel() else (1,)

    @cached_property
    def stored_as(self) -> np.dtype[Any]:
        """The type of the dataset's elements."""
        name = "uint8" if isinstance(self.content, bytes) else STORED_AS[dtype_name(self.content.dtype)]
        return np.dtype(name).newbyteorder("<")

    @property
    def size(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * self.stored_as.itemsize

    @property
    def in_place(self) -> bool:
        """Whether `data` is the tensor's own memory rather than a copy."""
        content = self.content
        if isinstance(content, bytes):
            return True
        return content.is_cpu and content.is_contiguous() and not (content.is_conj() or content.is_neg())

    def data(self) -> memoryview:
        """The bytes to be stored."""
        if isinstance(self.content, bytes):
            return memoryview(self.content)
        plain = self.content.resolve_conj().resolve_neg().cpu().contiguous()
        if not plain.numel():
            plain = torch.zeros(1, dtype=plain.dtype)
        bits = plain.reshape(-1).view(getattr(torch, self.stored_as.name)).numpy()
        return bits.astype(self.stored_as, copy=False).view(np.uint8).data

    def attributes(self) -> dict[str, Any]:
        """Those of the dataset."""
        attrs: dict[str, Any] = {"kind": np.bytes_("json"), "crc32": np.array(self.crc32, np.uint32)}
        if isinstance(self.content, torch.Tensor):
            attrs |= {"kind": np.bytes_("tensor"), "dtype": np.bytes_(dtype_name(self.content.dtype))}
            if self.shape != self.content.shape:
                attrs["shape"] = np.array(self.content.shape, np.int64)
        if self.sharded is not None:
            attrs |= {"kind": np.bytes_("sharded"), "dtype": np.bytes_(self.sharded.dtype)}
            attrs["shape"] = np.array(self.sharded.shape, np.int64)
        return attrs


_Checked: TypeAlias = dict[str, "_Checked | _Leaf"]


def write_tree(path: Path, tree: IndexLike, attrs: Mapping[str, int | float], parts: Sequence[Part] = ()) -> str:
    """Write a tree to the new file `path`, down to the disk.

    The file is not removed if that fails; the store does this, and makes it atomic. The tensors must
    not change meanwhile. Those that are not contiguous in host memory are copied, one after the other.

    Args:
        path: must not exist.
        tree: dictionaries of dictionaries, tensors (any device and strides) and `Json` values.
        attrs: root attributes: an integer `step`, and others if wanted.
        parts: the files that hold the rows of sharded tensors, if `tree` is of `index_tree`.

    Returns:
        The SHA-256 of the file in hexadecimal.

    Raises:
        TypeError: a leaf or key of a kind that cannot be stored; ValueError: a value that cannot.
        OSError: the disk is full, or the file cannot be written for another reason.
    """
    _check_attrs(attrs)
    checked = _check(tree, "", MAX_DEPTH)
    if parts:
        listed = json.dumps(msgspec.to_builtins(parts), separators=(",", ":")).encode()
        checked = {PARTS: _Leaf(listed), **checked}
    version = SHARDED_VERSION if parts else VERSION
    return _write(path, checked, {"format": np.bytes_(FORMAT), "version": np.int64(version)} | _stored(attrs))


def write_part(path: Path, tree: TreeLike, step: int, process: int, processes: int) -> PartReport:
    """Write the rows that a process has of the sharded tensors in a tree to the new file `path`, down to the disk.

    The file is not removed if that fails. The tensors must not change meanwhile.

    Args:
        path: must not exist; where it goes then is told by `PartReport.name`.
        tree: as for `write_tree`; nothing but the `Piece`s in it counts, and each process has one of each tensor.
        step: optimiser steps done.
        process: number of this process.
        processes: how many write a part.

    Raises:
        TypeError: a tensor of a kind that cannot be stored; ValueError: a piece that does not fit its tensor.
        OSError: the disk is full, or the file cannot be written for another reason.
    """
    pieces = pieces_in(tree)
    checked = _check(part_tree(pieces), "", MAX_DEPTH)
    attrs = {"step": step, "process": process, "processes": processes}
    _check_attrs(attrs)
    start = {"format": np.bytes_(PART_FORMAT), "version": np.int64(SHARDED_VERSION)}
    digest = _write(path, checked, start | _stored(attrs))
    leaves = _leaves(checked)
    reports = [_reported(keys, piece, next(leaves) if piece.tensor.numel() else None) for keys, piece in pieces]
    return PartReport(step, process, processes, Part(digest, path.stat().st_size), reports)


def _reported(keys: Keys, piece: Piece, leaf: _Leaf | None) -> PieceReport:
    """What the index needs to know of a piece, of which there is a dataset if it has rows."""
    rows, place, crc32 = (piece.tensor.shape[0], leaf.offset, leaf.crc32 or 0) if leaf else (0, 0, 0)
    return PieceReport(keys, dtype_name(piece.tensor.dtype), tuple(piece.shape), piece.offset, rows, place, crc32)


def size_on_disk(tree: IndexLike, parts: int = 0) -> int:
    """About how many bytes `write_tree` will write, with so many parts, not less; raises as it for a wrong tree."""
    return _BYTES_PER_OBJECT + _BYTES_PER_PART * parts + _size_of(_check(tree, "", MAX_DEPTH))


def size_of_part(tree: TreeLike) -> int:
    """About how many bytes `write_part` will write, not less; raises as it does for a wrong tree."""
    return size_on_disk(part_tree(pieces_in(tree)))


# What may be stored


def _check_attrs(attrs: Mapping[str, int | float]) -> None:
    step = attrs.get("step")
    if not isinstance(step, int) or step < 0 or {"format", "version"} & attrs.keys():
        raise ValueError(
            "root attributes: expected an integer step of at least 0 and neither format nor version, "
            f"found {dict(attrs)}"
        )


def _stored(attrs: Mapping[str, int | float]) -> dict[str, Any]:
    return {name: np.int64(value) if isinstance(value, int) else np.float64(value) for name, value in attrs.items()}


def _check(tree: IndexLike, where: str, depth: int) -> _Checked:
    """The tree with quoted names and encoded JSON, so that nothing but the disk can fail afterwards."""
    if depth < 0:
        raise ValueError(f"{where}: expected groups nested at most {MAX_DEPTH} deep, found more; flatten the tree")
    checked: _Checked = {}
    for key, node in tree.items():
        checked[_checked_name(key, where)] = _checked_node(node, f"{where}/{key}", depth)
    return checked


def _checked_name(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{where or '/'}: expected keys of type str, found {key!r} ({type(key).__name__})")
    name = quote_name(key)
    try:
        length = len(name.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise ValueError(f"{where or '/'}: expected a key in Unicode, found {key!r}") from error
    if length > 4096:
        raise ValueError(f"{where or '/'}: expected keys of at most 4096 bytes, found one of {length}: {key[:40]!r}…")
    return name


def _checked_node(node: Any, where: str, depth: int) -> "_Checked | _Leaf":
    if isinstance(node, torch.Tensor):
        return _Leaf(_checked_tensor(node, where))
    if isinstance(node, Json):
        return _Leaf(encode_json(node.value, where))
    if isinstance(node, Sharded):
        return _Leaf(node.table, node)
    if isinstance(node, Mapping):
        return _check(node, where, depth - 1)
    advice = "save it with the reports of all parts" if isinstance(node, Piece) else "wrap plain values as Json(value)"
    raise TypeError(f"{where}: expected a dictionary, a tensor or a Json value, found {type(node).__name__}; {advice}")


def _checked_tensor(tensor: torch.Tensor, where: str) -> torch.Tensor:
    name = dtype_name(tensor.dtype)
    if name in STORED_AS and tensor.layout == torch.strided and tensor.device.type != "meta":
        return tensor.detach()
    raise TypeError(
        f"{where}: expected a dense tensor of one of {', '.join(STORED_AS)}, found {name}, layout {tensor.layout}, "
        f"device {tensor.device}; convert it before saving"
    )


def _leaves(tree: _Checked) -> Iterator[_Leaf]:
    for node in tree.values():
        if isinstance(node, _Leaf):
            yield node
        else:
            yield from _leaves(node)


def _size_of(tree: _Checked) -> int:
    """Bytes of all below a group, with an upper estimate of what HDF5 adds; it stores names once or twice."""
    return sum(
        _BYTES_PER_OBJECT + 2 * len(name.encode()) + (node.size if isinstance(node, _Leaf) else _size_of(node))
        for name, node in tree.items()
    )


# Laying out and writing


def _write(path: Path, checked: _Checked, attrs: Mapping[str, Any]) -> str:
    """The file with these root attributes; returns its SHA-256."""
    leaves = list(_leaves(checked))
    _take_checksums(leaves)
    skeleton = _laid_out(checked, attrs)
    return write_hashed(path, _pieces(skeleton, sorted(leaves, key=lambda leaf: leaf.offset)))


def _take_checksums(leaves: Sequence[_Leaf]) -> None:
    """Checksums of the data, by several threads; one of them makes all copies, so that there is one at a time."""
    in_place = sorted((leaf for leaf in leaves if leaf.in_place), key=lambda leaf: leaf.size)
    shares = [in_place[first :: _THREADS - 1] for first in range(_THREADS - 1)]
    threads = [Thread(target=_take_checksums_of, args=(share,)) for share in shares if share]
    for thread in threads:
        thread.start()
    _take_checksums_of([leaf for leaf in leaves if not leaf.in_place])
    for thread in threads:
        thread.join()


def _take_checksums_of(leaves: Sequence[_Leaf]) -> None:
    for leaf in leaves:
        leaf.crc32 = zlib.crc32(leaf.data())


def _laid_out(tree: _Checked, attrs: Mapping[str, Any]) -> Skeleton:
    """The file without its data, of which every leaf learns the offset."""
    skeleton = Skeleton()
    alignment = {"alignment_threshold": _ALIGNED_FROM, "alignment_interval": _ALIGNMENT}
    with h5py.File(skeleton, "w", libver=("v110", "v110"), track_order=True, **alignment) as file:
        for name, value in attrs.items():
            file.attrs[name] = value
        _add_group(file, tree)
    return skeleton


def _add_group(group: h5py.Group, tree: _Checked) -> None:
    for name, node in tree.items():
        if isinstance(node, _Leaf):
            _add_dataset(group, name, node)
        else:
            _add_group(group.create_group(name, track_order=True), node)


def _add_dataset(group: h5py.Group, name: str, leaf: _Leaf) -> None:
    dataset = group.create_dataset(name, leaf.shape, leaf.stored_as, dcpl=_only_placed())
    for attribute, value in leaf.attributes().items():
        dataset.attrs[attribute] = value
    leaf.offset = dataset.id.get_offset()


def _only_placed() -> h5p.PropDCID:
    """Properties of a dataset that gets its place when it is created, and no content."""
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_layout(h5d.CONTIGUOUS)
    properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5d.FILL_TIME_NEVER)
    return properties


def _pieces(skeleton: Skeleton, leaves: Sequence[_Leaf]) -> Iterator[bytes | memoryview]:
    """All bytes of the file, in order; `leaves` in the order of their places."""
    end = 0
    for leaf in leaves:
        yield skeleton.between(end, leaf.offset)
        yield leaf.data()
        end = leaf.offset + leaf.size
    yield skeleton.between(end, skeleton.size)
