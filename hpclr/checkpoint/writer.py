"""Writing a tree as an HDF5 file."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import torch

from hpclr.checkpoint.format import FORMAT, STORED_AS, VERSION
from hpclr.checkpoint.sink import Sink
from hpclr.checkpoint.tree import MAX_DEPTH, Json, TreeLike, encode_json, quote_name

_CHUNK_BYTES = 4 << 20
"""A checksum is computed over a chunk; 4 MiB was the fastest to write and to read."""

_BYTES_PER_DATASET = 1024
"""An upper estimate of what HDF5 adds to a dataset: headers, attributes, links."""

_Checked: TypeAlias = dict[str, "_Checked | torch.Tensor | bytes"]
_Leaf: TypeAlias = torch.Tensor | bytes


def write_tree(path: Path, tree: TreeLike, attrs: Mapping[str, int | float]) -> None:
    """Write a tree to the new file `path`, down to the disk.

    The file is not removed if that fails; the store does this, and makes it atomic.

    Args:
        path: must not exist.
        tree: dictionaries of dictionaries, tensors (any device and strides) and `Json` values.
        attrs: root attributes: an integer `step`, and others if wanted.

    Raises:
        TypeError: a leaf or key of a kind that cannot be stored; ValueError: a value that cannot.
        OSError: the disk is full, or the file cannot be written for another reason.
    """
    _check_attrs(attrs)
    checked = _check(tree, "", MAX_DEPTH)
    with Sink(path) as sink:
        # The file is new and ours alone, so no lock is needed; on some parallel file systems there is none.
        with h5py.File(sink, "w", libver=("v110", "v110"), track_order=True) as file:
            file.attrs["format"] = np.bytes_(FORMAT)
            file.attrs["version"] = np.int64(VERSION)
            for name, value in attrs.items():
                file.attrs[name] = np.int64(value) if isinstance(value, int) else np.float64(value)
            _write_group(file, checked)
        sink.commit()


def size_on_disk(tree: TreeLike) -> int:
    """About how many bytes `write_tree` will write, not less; raises as it does for a wrong tree."""
    leaves = _leaves(_check(tree, "", MAX_DEPTH))
    return 2 * _BYTES_PER_DATASET + sum(_leaf_bytes(leaf) + _BYTES_PER_DATASET for leaf in leaves)


def _check_attrs(attrs: Mapping[str, int | float]) -> None:
    step = attrs.get("step")
    if not isinstance(step, int) or step < 0 or {"format", "version"} & attrs.keys():
        raise ValueError(
            "root attributes: expected an integer step of at least 0 and neither format nor version, "
            f"found {dict(attrs)}"
        )


def _check(tree: TreeLike, where: str, depth: int) -> _Checked:
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


def _checked_node(node: Any, where: str, depth: int) -> Any:
    if isinstance(node, torch.Tensor):
        return _checked_tensor(node, where)
    if isinstance(node, Json):
        return encode_json(node.value, where)
    if isinstance(node, Mapping):
        return _check(node, where, depth - 1)
    raise TypeError(
        f"{where}: expected a dictionary, a tensor or a Json value, found {type(node).__name__}; "
        "wrap plain values as Json(value)"
    )


def _checked_tensor(tensor: torch.Tensor, where: str) -> torch.Tensor:
    name = dtype_name(tensor.dtype)
    if name in STORED_AS and tensor.layout == torch.strided and tensor.device.type != "meta":
        return tensor.detach()
    raise TypeError(
        f"{where}: expected a dense tensor of one of {', '.join(STORED_AS)}, found {name}, layout {tensor.layout}, "
        f"device {tensor.device}; convert it before saving"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32: how the attribute `dtype` spells it."""
    return str(dtype).removeprefix("torch.")


def _leaves(tree: _Checked) -> Iterator[_Leaf]:
    for node in tree.values():
        if isinstance(node, dict):
            yield from _leaves(node)
        else:
            yield node


def _leaf_bytes(leaf: _Leaf) -> int:
    """Bytes of the data with its checksums; the last chunk is stored in full."""
    if isinstance(leaf, bytes):
        return len(leaf) + 4
    shape = _dataset_shape(leaf)
    chunk = _chunk_shape(shape, leaf.element_size())
    chunks = math.prod(-(-size // part) for size, part in zip(shape, chunk, strict=True))
    return chunks * (math.prod(chunk) * leaf.element_size() + 4)


def _write_group(group: h5py.Group, tree: _Checked) -> None:
    for name, node in tree.items():
        if isinstance(node, dict):
            _write_group(group.create_group(name, track_order=True), node)
        elif isinstance(node, bytes):
            _write_dataset(group, name, np.frombuffer(node, np.uint8), kind="json")
        else:
            _write_tensor(group, name, node)


def _write_tensor(group: h5py.Group, name: str, tensor: torch.Tensor) -> None:
    dtype = dtype_name(tensor.dtype)
    plain = tensor.resolve_conj().resolve_neg().cpu().contiguous()
    if not plain.numel():
        plain = torch.zeros(1, dtype=tensor.dtype)
    bits = plain.view(getattr(torch, STORED_AS[dtype])).numpy().reshape(_dataset_shape(tensor))
    dataset = _write_dataset(group, name, bits.astype(bits.dtype.newbyteorder("<"), copy=False), kind="tensor")
    dataset.attrs["dtype"] = np.bytes_(dtype)
    if dataset.shape != tensor.shape:
        dataset.attrs["shape"] = np.array(tensor.shape, np.int64)


def _dataset_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """HDF5 checksums chunks, and neither scalars nor empty datasets have any: those become shape (1,)."""
    return tuple(tensor.shape) if tensor.dim() and tensor.numel() else (1,)


def _write_dataset(group: h5py.Group, name: str, array: np.ndarray[Any, Any], kind: str) -> h5py.Dataset:
    chunks = _chunk_shape(array.shape, array.itemsize)
    dataset = group.create_dataset(name, data=array, chunks=chunks, fletcher32=True)
    dataset.attrs["kind"] = np.bytes_(kind)
    return dataset


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Whole rows, as many as fit into a chunk; leading axes are cut first, into parts of equal size."""
    chunk = list(shape)
    for axis, size in enumerate(shape):
        row_bytes = itemsize * math.prod(shape[axis + 1 :])
        if size * row_bytes <= _CHUNK_BYTES:
            break
        rows = max(1, _CHUNK_BYTES // row_bytes)
        chunk[axis] = math.ceil(size / math.ceil(size / rows))
    return tuple(chunk)
