"""Walking through a file of `format.py` with h5py alone, and refusing everything else.

HDF5 files may hold links out of the file, types that run code when they are read, and claims of
sizes that no memory holds. So every object is looked at before it is read, within budgets: what is
not of the layout is refused, and nothing is allocated that the file has no bytes for. torch is not
imported here, so that a small process can do it.
"""

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NoReturn

import h5py
import numpy as np
from h5py import h5, h5a, h5d, h5g, h5l, h5o, h5p, h5s, h5t, h5z

from hpclr.checkpoint.entry import Entry
from hpclr.checkpoint.format import FORMAT, PART_FORMAT, PARTS, SHARDED_VERSION, STORED_AS, TABLE_COLUMNS
from hpclr.checkpoint.parts import Part
from hpclr.checkpoint.source import FileSource, Source, check_start, read_at
from hpclr.checkpoint.table import MAX_PARTS, fault_of_table, parts_of_json
from hpclr.checkpoint.tree import MAX_DEPTH, decode_json, show_keys, unquote_name
from hpclr.errors import UsageError

MAX_OBJECTS = 1_000_000
MAX_JSON_BYTES = 256 << 20
_MAX_NAME_BYTES = 4096
_MAX_ATTRIBUTE_BYTES = 1024
_MAX_ROOT_ATTRIBUTES = 64
_BYTES_PER_PART = 128  # in the list of them, at most
_MAX_CHUNK_BYTES = 8 << 20  # of version 1, which wrote 4 MiB
_BLOCK = 4 << 20  # bytes read at once

_TYPES = {name: h5t.py_create(np.dtype(name).newbyteorder("<")) for name in set(STORED_AS.values())}
_LAYOUTS = {h5d.COMPACT: "compact", h5d.CONTIGUOUS: "contiguous", h5d.CHUNKED: "chunked", h5d.VIRTUAL: "virtual"}
_KINDS: dict[str, Literal["tensor", "json", "sharded"]] = {"tensor": "tensor", "json": "json", "sharded": "sharded"}
_STUMBLES = (OSError, RuntimeError, ValueError, TypeError, KeyError, OverflowError, SystemError)
_NUMBER_OR_TEXT = (h5t.INTEGER, h5t.FLOAT, h5t.STRING)


class OlderVersionError(UsageError):
    """A good file, but of a version that cannot be read in the way that is asked for."""


class NewerVersionError(UsageError):
    """The file is in order, but of a version of the format that this hpclr does not know yet."""


@contextmanager
def opened(path: Path, source: Source | None = None) -> "Iterator[Scan]":
    """A file, once its start and its root attributes are found to be right.

    Whatever HDF5 stumbles over inside the block is a UsageError; so the block does nothing but read.

    Args:
        path: the file, as messages call it.
        source: its bytes, if they are not to be read from there; it stays open.

    Raises:
        UsageError: the file is missing, or not of this format; `NewerVersionError` if it is newer.
        OSError: it cannot be read for a reason that is not its content.
    """
    with nullcontext(source) if source else FileSource(path) as source:
        check_start(path, source)
        source.quiet = True
        try:
            with h5py.File(source, "r") as file:
                yield Scan(path, source, file)
        except Exception as error:
            if source.fault is not None:  # then the file is not to blame, whatever it looks like
                raise source.fault from error
            if not isinstance(error, _STUMBLES):
                raise
            raise UsageError(
                f"{path}: HDF5 cannot read the file, it is damaged or was not written by hpclr: {error}. "
                "Use another checkpoint."
            ) from error
        finally:
            source.quiet = False
        if source.fault is not None:
            raise source.fault


class Scan:
    """One open file.

    Attributes:
        path: of the file.
        version: of the format.
        attrs: the root attributes.
        parts: the files that hold the rows of sharded tensors.
    """

    def __init__(self, path: Path, source: Source, file: h5py.File) -> None:
        self.path = path
        self._source = source
        self._root = h5g.open(file.id, b"/")
        self._objects = MAX_OBJECTS
        self._bytes = source.size
        self._addresses = {h5o.get_info(self._root).addr}
        self._extents: list[tuple[int, int, str]] = []
        self.attrs = self._root_attributes()
        self.version = int(self.attrs["version"])
        self.parts: tuple[Part, ...] = ()
        if self.version >= SHARDED_VERSION:
            self.parts = self._listed_parts()
        self._left = np.array([part.bytes for part in self.parts], np.int64)

    # What is there

    def entries(self, only: str | None = None) -> Iterator[Entry]:
        """Everything in the tree, a group before what is in it, in the order in which it was saved.

        Args:
            only: one key at the top; everything else is passed over.

        Raises:
            UsageError: something is not of the format, or over a budget.
        """
        yield from self._group(self._root, (), only)
        self._check_extents()

    def refuse(self, where: str, expected: str, found: str) -> NoReturn:
        """Says what is wrong with the file."""
        refuse(self.path, where, expected, found)

    def _root_attributes(self) -> dict[str, int | float | str]:
        found = self._text(self._root, "/", "format")
        if found == PART_FORMAT:
            raise UsageError(
                f"{self.path}: expected a checkpoint, found a part of one, with the rows that one process had. "
                "Name the checkpoint itself, step-NNNNNNNN.h5, which lies beside the directory of its parts."
            )
        if found != FORMAT:
            self.refuse("/", f"the attribute format to be {FORMAT!r}", repr(found))
        version = self._attribute(self._root, "/", "version")
        if not isinstance(version, int) or version < 1:
            self.refuse("/", "a version of at least 1", repr(version))
        if version > SHARDED_VERSION:
            raise NewerVersionError(
                f"{self.path}: expected a checkpoint of format version 1 to {SHARDED_VERSION}, found version "
                f"{version}; it comes from a newer hpclr: use that one, or a checkpoint that this hpclr has written."
            )
        if not isinstance(self._attribute(self._root, "/", "step"), int):
            self.refuse("/", "an integer attribute step", repr(self._attribute(self._root, "/", "step")))
        count = h5a.get_num_attrs(self._root)
        if count > _MAX_ROOT_ATTRIBUTES:
            self.refuse("/", f"at most {_MAX_ROOT_ATTRIBUTES} attributes", str(count))
        names = [h5a.open(self._root, index=index).name.decode() for index in range(count)]
        return {name: self._attribute(self._root, "/", name) for name in names}

    def _listed_parts(self) -> tuple[Part, ...]:
        """The parts of an index, which has a dataset for them that is no entry of the tree."""
        link = PARTS.encode()
        links = self._root.links
        if not links.exists(link) or links.get_info(link).type != h5l.TYPE_HARD:
            self.refuse("/", f"a list of parts {PARTS!r} in the file", "none")
        entry = next(self._child(self._root, link, (PARTS,)))
        if entry.kind != "json" or entry.nbytes > MAX_PARTS * _BYTES_PER_PART:
            self.refuse(
                entry.name, f"a list of at most {MAX_PARTS} parts in JSON", f"{entry.kind} of {entry.nbytes} bytes"
            )
        content = np.empty(entry.stored, np.uint8)
        self.read(entry, content)
        try:
            return parts_of_json(content.tobytes())
        except ValueError as error:
            self.refuse(entry.name, "the digests and sizes of parts", str(error))

    def _group(self, group: Any, keys: tuple[str, ...], only: str | None = None) -> Iterator[Entry]:
        if len(keys) > MAX_DEPTH:
            self.refuse(show_keys(keys), f"groups nested at most {MAX_DEPTH} deep", "more")
        for link in self._links(group, keys):
            if self.parts and not keys and link == PARTS.encode():
                continue
            key = self._key(link, keys)
            if only is None or key == only:
                yield from self._child(group, link, (*keys, key))

    def _links(self, group: Any, keys: tuple[str, ...]) -> list[bytes]:
        """The names in a group, in the order in which they were made; each must lead to data in the file."""
        links: dict[bytes, int] = {}
        wrong: list[tuple[bytes, int]] = []

        def note(name: bytes, info: Any) -> bool | None:
            self._objects -= 1
            if name in links or self._objects < 0 or len(name) > _MAX_NAME_BYTES or info.type != h5l.TYPE_HARD:
                wrong.append((name, info.type))
                return True  # ends the iteration; an exception must not pass through HDF5
            links[name] = info.type
            return None

        ordered = group.get_create_plist().get_link_creation_order() & h5p.CRT_ORDER_TRACKED
        group.links.iterate(note, info=True, idx_type=h5.INDEX_CRT_ORDER if ordered else h5.INDEX_NAME)
        if wrong:
            self._refuse_link(show_keys(keys), *wrong[0])
        return list(links)

    def _refuse_link(self, where: str, name: bytes, kind: int) -> NoReturn:
        if self._objects < 0:
            self.refuse(where, f"at most {MAX_OBJECTS:,} objects in a file", "more")
        if len(name) > _MAX_NAME_BYTES:
            self.refuse(where, f"names of at most {_MAX_NAME_BYTES} bytes", f"one of {len(name)}: {name[:40]!r}…")
        if kind != h5l.TYPE_HARD:
            self.refuse(where, "data inside the file", f"a soft or external link {name!r}")
        self.refuse(where, "each name once", f"{name!r} twice")

    def _key(self, link: bytes, keys: tuple[str, ...]) -> str:
        try:
            return unquote_name(link.decode("utf-8"))
        except ValueError as error:
            self.refuse(show_keys(keys), "names as the format writes keys", f"{link[:80]!r} ({error})")

    def _child(self, group: Any, link: bytes, keys: tuple[str, ...]) -> Iterator[Entry]:
        """The object behind a link, which must be the only one to it."""
        info = h5o.get_info(group, link)
        if info.rc != 1 or info.addr in self._addresses:
            self.refuse(show_keys(keys), "an object with one name", f"one with {max(info.rc, 2)}")
        self._addresses.add(info.addr)
        self._extents.append((info.addr, info.addr + 1, "the description of " + show_keys(keys)))
        child = h5o.open(group, link)
        if isinstance(child, h5g.GroupID):
            yield Entry(keys, "group")
            yield from self._group(child, keys)
        elif isinstance(child, h5d.DatasetID):
            yield self._leaf(child, keys)
        else:
            self.refuse(show_keys(keys), "a group or a dataset", "a named type")

    def _leaf(self, dataset: Any, keys: tuple[str, ...]) -> Entry:
        where = show_keys(keys)
        kind = self._kind(dataset, where)
        dtype = self._text(dataset, where, "dtype") if kind != "json" else "uint8"
        if dtype not in STORED_AS:
            self.refuse(where, f"the attribute dtype to be one of {', '.join(STORED_AS)}", repr(dtype))
        if kind == "sharded":
            return self._sharded(dataset, keys, dtype)
        stored, nbytes = self._extent(dataset, where, STORED_AS[dtype])
        if kind == "json" and not (len(stored) == 1 and nbytes <= MAX_JSON_BYTES):
            self.refuse(where, f"JSON on one axis, of at most {MAX_JSON_BYTES:,} bytes", f"the shape {stored}")
        shape = self._shape(dataset, where, stored)
        if self.version == 1:
            self._check_chunks(dataset, where, nbytes)
            return Entry(keys, kind, dtype, shape, stored, nbytes, dataset=dataset)
        offset = self._check_place(dataset, where, nbytes)
        return Entry(keys, kind, dtype, shape, stored, nbytes, offset, self._crc32(dataset, where))

    def _sharded(self, dataset: Any, keys: tuple[str, ...], dtype: str) -> Entry:
        """A tensor whose rows are in parts: its dataset is the table that says where."""
        where = show_keys(keys)
        stored, nbytes = self._extent(dataset, where, "int64")
        if len(stored) != 2 or stored[1] != TABLE_COLUMNS:
            self.refuse(where, f"a table of {TABLE_COLUMNS} columns", f"the shape {stored}")
        place, crc32 = self._check_place(dataset, where, nbytes), self._crc32(dataset, where)
        table = np.empty(stored, "<i8")
        self.read(Entry(keys, "tensor", "int64", stored, stored, nbytes, place, crc32), table)
        shape = self._attribute(dataset, where, "shape")
        if not (isinstance(shape, list) and shape and all(isinstance(size, int) and size > 0 for size in shape)):
            self.refuse(where, "the shape of a tensor that has rows", repr(shape))
        self._check_table(where, table, shape, np.dtype(STORED_AS[dtype]).itemsize)
        size = math.prod(shape) * np.dtype(STORED_AS[dtype]).itemsize
        return Entry(keys, "sharded", dtype, tuple(shape), tuple(shape), size, table=table)

    def _check_table(self, where: str, table: np.ndarray[Any, Any], shape: list[int], itemsize: int) -> None:
        """All rows must be there once, and nobody may claim more data than the parts have bytes."""
        row = math.prod(shape[1:]) * itemsize
        sizes = [part.bytes for part in self.parts]
        if shape[0] * row > sum(sizes):
            self.refuse(where, f"a tensor no larger than the {sum(sizes)} bytes of all parts", f"the shape {shape}")
        if fault := fault_of_table(table, shape[0], row, sizes):
            self.refuse(where, *fault)
        np.subtract.at(self._left, table[:, 0], table[:, 2] * row)
        if self._left.min() < 0:
            self.refuse(where, "no more data than its part has bytes", f"{-self._left.min()} too many")

    def _kind(self, dataset: Any, where: str) -> Literal["tensor", "json", "sharded"]:
        kind = self._text(dataset, where, "kind")
        if kind not in _KINDS or (kind == "sharded" and not self.parts):
            expected = "'tensor', 'json' or 'sharded'" if self.parts else "'tensor' or 'json'"
            self.refuse(where, f"the attribute kind to be {expected}", repr(kind))
        return _KINDS[kind]

    def _extent(self, dataset: Any, where: str, stored_as: str) -> tuple[tuple[int, ...], int]:
        """Shape and bytes of a dataset, which must be of this type."""
        found, space = dataset.get_type(), dataset.get_space()
        if found.committed() or not found.equal(_TYPES[stored_as]):
            described = f"class {found.get_class()} of {found.get_size()} bytes"
            self.refuse(where, f"the type {stored_as}", "a shared type" if found.committed() else described)
        if space.get_simple_extent_type() != h5s.SIMPLE:
            self.refuse(where, "a dataset with axes", "one without")
        shape = space.get_simple_extent_dims()
        return shape, math.prod(shape) * np.dtype(stored_as).itemsize

    def _shape(self, dataset: Any, where: str, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape: that of the dataset, or another beside the stand-in of shape (1,)."""
        if not h5a.exists(dataset, b"shape"):
            return stored
        shape = self._attribute(dataset, where, "shape")
        without_elements = isinstance(shape, list) and 0 in shape and min(shape) >= 0
        if stored != (1,) or not (shape == [] or without_elements):
            found = f"{shape} stored as {stored}"
            self.refuse(where, "a shape without axes or without elements, stored as (1,)", found)
        return tuple(shape)

    def _check_chunks(self, dataset: Any, where: str, nbytes: int) -> None:
        """Version 1: chunks, each with HDF5's own checksum."""
        plan = dataset.get_create_plist()
        layout, filters = _storage(plan)
        if (layout, filters) != ("chunked", [h5z.FILTER_FLETCHER32]):
            found = f"{layout} storage, filters {filters}"
            self.refuse(where, "chunks with a fletcher32 checksum and no other filter", found)
        chunk = math.prod(plan.get_chunk()) * dataset.get_type().get_size()
        if chunk > _MAX_CHUNK_BYTES:
            self.refuse(where, f"chunks of at most {_MAX_CHUNK_BYTES} bytes", str(chunk))
        stored = dataset.get_storage_size()
        if not 0 < nbytes < stored <= self._bytes:
            found = f"{nbytes} bytes of data, {stored} stored, {self._bytes} left in the file"
            self.refuse(where, "data no larger than what the file stores for it", found)
        self._bytes -= stored

    def _check_place(self, dataset: Any, where: str, nbytes: int) -> int:
        """Version 2: one piece of the file, as long as the data."""
        plan = dataset.get_create_plist()
        layout, filters = _storage(plan)
        if (layout, filters, plan.get_external_count()) != ("contiguous", [], 0):
            found = f"{layout} storage, filters {filters}, {plan.get_external_count()} other files"
            self.refuse(where, "contiguous storage in the file without filters", found)
        offset = dataset.get_offset()
        if offset is None or nbytes < 1 or dataset.get_storage_size() != nbytes or offset + nbytes > self._source.size:
            found = f"{nbytes} from {offset} on in a file of {self._source.size}"
            self.refuse(where, "at least one byte of data, all of it in the file", found)
        self._extents.append((offset, offset + nbytes, where))
        return int(offset)

    def _crc32(self, dataset: Any, where: str) -> int:
        value = self._attribute(dataset, where, "crc32")
        if not isinstance(value, int):
            self.refuse(where, "a number as attribute crc32", repr(value))
        return value

    def _check_extents(self) -> None:
        """No two things may lie in one place: what was read as one would be another's."""
        end, before = 0, ""
        for start, stop, what in sorted(self._extents):
            if start < end:
                self.refuse(what, f"a place of its own from byte {end} on", f"byte {start}, inside {before}")
            end, before = stop, what

    # What it holds

    def read(self, entry: Entry, content: np.ndarray[Any, Any]) -> None:
        """Reads all data of an entry into an array of its stored shape, and checks it.

        Raises:
            UsageError: the data is damaged.
        """
        if entry.offset is None:
            entry.dataset.read(h5s.ALL, h5s.ALL, content)  # HDF5 compares the checksums
            return
        buffer = content.reshape(-1).view(np.uint8).data
        self.check_crc32(entry, zlib.crc32(buffer[: read_at(self._source, entry.offset, buffer)]))

    def blocks(self, entry: Entry) -> Iterator[np.ndarray[Any, Any]]:
        """All data of an entry, in flat pieces of a few MB, so that it need not fit into memory.

        The checksum is only compared after the last one (version 2).

        Raises:
            UsageError: the data is damaged.
        """
        if entry.offset is None:
            dataset = h5py.Dataset(entry.dataset)
            yield from (dataset[chunk].reshape(-1) for chunk in dataset.iter_chunks())
            return
        checksum = 0
        for start in range(0, entry.nbytes, _BLOCK):
            block = np.empty(min(_BLOCK, entry.nbytes - start), np.uint8)
            read_at(self._source, entry.offset + start, block.data)
            checksum = zlib.crc32(block.data, checksum)
            yield block.view(entry.numpy_dtype)
        self.check_crc32(entry, checksum)

    def json(self, entry: Entry, content: np.ndarray[Any, Any]) -> Any:
        """The value in the data of a JSON entry.

        Raises:
            UsageError: it is no JSON.
        """
        data = content.tobytes()
        try:
            return decode_json(data)
        except (ValueError, RecursionError) as error:
            self.refuse(entry.name, "JSON", f"{data[:60]!r} ({error})")

    def check_crc32(self, entry: Entry, found: int) -> None:
        """Compares the checksum of what was read with that in the file.

        Raises:
            UsageError: they differ.
        """
        if found != entry.crc32:
            self.refuse(entry.name, f"data with the checksum crc32 {entry.crc32:#010x}", f"{found:#010x}")

    # Attributes

    def _text(self, node: Any, where: str, name: str) -> str:
        value = self._attribute(node, where, name)
        if not isinstance(value, str):
            self.refuse(where, f"a text as attribute {name}", repr(value))
        return value

    def _attribute(self, node: Any, where: str, name: str) -> Any:
        """An attribute as int, float, str, or as list of ints."""
        if not h5a.exists(node, name.encode()):
            self.refuse(where, f"an attribute {name}", "none")
        attribute = h5a.open(node, name.encode())
        kind, space = attribute.get_type(), attribute.get_space()
        shape = space.get_simple_extent_dims() if space.get_simple_extent_type() != h5s.NULL else (0,)
        size = math.prod(shape) * kind.get_size()
        is_plain = kind.get_class() in _NUMBER_OR_TEXT and not kind.committed()
        if not is_plain or size > _MAX_ATTRIBUTE_BYTES or (dtype := kind.dtype).kind not in "Siuf":
            expected = f"the attribute {name} to be a number or a text of at most {_MAX_ATTRIBUTE_BYTES} bytes"
            self.refuse(where, expected, f"{size} bytes of class {kind.get_class()}")
        content = np.empty(shape, dtype)
        attribute.read(content)
        value = content.tolist()
        return value.decode("utf-8") if isinstance(value, bytes) else value


def refuse(path: Path, where: str, expected: str, found: str) -> NoReturn:
    """Says what is wrong with a file."""
    raise UsageError(
        f"{path}: {where}: expected {expected}, found {found}. The file is damaged or was not written "
        "by hpclr: use another checkpoint."
    )


def _storage(plan: Any) -> tuple[str, list[int]]:
    """How a dataset is stored, and the numbers of its filters."""
    filters = [plan.get_filter(index)[0] for index in range(plan.get_nfilters())]
    return _LAYOUTS.get(plan.get_layout(), "unknown"), filters
