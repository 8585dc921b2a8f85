"""What the child process of `sandbox.py` does: looks at every byte of a checkpoint, and reports in JSON.

It runs on files that may have been made to do harm. So it takes limits upon itself before it opens one, holds no
more of it than a few MB, and does not import torch.
"""

import contextlib
import math
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np

from hpclr.checkpoint.digest import check_found, digest_of, read_sidecar
from hpclr.checkpoint.entry import Entry
from hpclr.checkpoint.parts import MOST_OPEN, Parts, bytes_of_parts, checked
from hpclr.checkpoint.scan import Scan, opened
from hpclr.checkpoint.source import FileSource
from hpclr.errors import HpclrError, UsageError

MEMORY = 128 << 20
"""Bytes that an examination may take beyond what Python and HDF5 themselves need."""

MAX_JSON_BYTES = 4 << 20
"""Of one value: read, it may take 30 times as much memory."""

_REPORTED = ("run", "method", "position", "sampler", "layers", "adapters", "tied")
_GROUPS = ("optimizer", "groups")
_BYTES_BETWEEN_REPORTS = 64 << 20
_OPEN_FILES = 16
_BLOCK = 4 << 20  # bytes read at once
_NOT_FINITE: dict[str, tuple[int, int]] = {
    "bfloat16": (0x7F80, 0x7F80),
    "float8_e4m3fn": (0x7F, 0x7F),
    "float8_e4m3fnuz": (0xFF, 0x80),
    "float8_e5m2": (0x7C, 0x7C),
    "float8_e5m2fnuz": (0xFF, 0x80),
}
"""torch dtype → mask and the bits under it that a value has if it is NaN or infinite."""


class Item(msgspec.Struct, frozen=True):
    """A group, a tensor or a JSON value that was found to be in order.

    Attributes:
        path: its keys from the top of the tree.
        kind: group, tensor or json.
        dtype: torch's name of a tensor's type.
        shape: of a tensor.
        bytes: of its data.
        finite: whether no value is NaN or infinite.
    """

    path: tuple[str, ...]
    kind: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    finite: bool


class Survey(msgspec.Struct, frozen=True, tag="good"):
    """What is in a checkpoint.

    Attributes:
        version: of the format.
        step: optimiser steps done, as its attribute says.
        bytes: of the file and its parts.
        sha256: of the file, in hexadecimal.
        entries: all of the tree.
        json: the texts of the JSON values that the meaning of a training run's state hangs on, with their paths.
    """

    version: int
    step: int
    bytes: int
    sha256: str
    entries: list[Item]
    json: list[tuple[tuple[str, ...], str]]


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The file is not good, and why."""

    reason: str


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """How many bytes have been looked at, of how many; each counts twice, for its digest and for its meaning."""

    done: int
    total: int


Message: TypeAlias = Survey | Refused | Progress


def main() -> None:
    """Examines the file named as first argument, without its digest if there is a second; prints messages."""
    path, without_digest = Path(sys.argv[1]), len(sys.argv) > 2
    name = os.fsencode(path).decode(errors="backslashreplace")
    try:
        result: Message = _examine(path, without_digest)
    except HpclrError as error:
        result = Refused(str(error).encode(errors="backslashreplace").decode())
    except MemoryError:
        result = Refused(f"{name}: looking at it takes more than the {MEMORY >> 20} MB of memory allowed for it")
    except OSError as error:
        result = Refused(f"{name}: the file cannot be read: {error.strerror or error}")
    _tell(result)


def _examine(path: Path, without_digest: bool) -> Survey:
    source, of_parts = FileSource(path), bytes_of_parts(path)
    _limit_resources(source.size, of_parts)
    progress = _Reporter(2 * (source.size + of_parts))
    recorded = None if without_digest else read_sidecar(path)
    digest = digest_of(source, progress.advance)
    if recorded is not None:
        check_found(path, digest, recorded, source.size)
    entries: list[Item] = []
    texts: list[tuple[tuple[str, ...], str]] = []
    with opened(path, source) as scan:
        parts = Parts(path, scan.parts)
        for entry in scan.entries():
            entries.append(_item(scan, parts, entry, texts, progress))
    _check_parts(parts, progress)
    size = source.size + sum(part.bytes for part in scan.parts)
    return Survey(scan.version, int(scan.attrs["step"]), size, digest, entries, texts)


def _check_parts(parts: Parts, progress: "_Reporter") -> None:
    """Digests of the parts, the rows in which were found to be right: that leaves what lies between them."""
    for number in range(len(parts)):
        with parts.opened(number, "rows of tensors") as source:
            parts.check_digest(source, number, "rows of tensors", progress.advance)


def _limit_resources(size: int, of_parts: int) -> None:
    """What is allowed from here on; HDF5 that runs wild is ended by the system."""
    seconds = math.ceil(time.process_time() + cpu_seconds(size, of_parts))
    _limit(resource.RLIMIT_CPU, seconds, seconds + 1)
    _limit(resource.RLIMIT_AS, *[_address_space() + MEMORY] * 2)
    _limit(resource.RLIMIT_FSIZE, 0, 0)
    _limit(resource.RLIMIT_CORE, 0, 0)
    _limit(resource.RLIMIT_NOFILE, *[_OPEN_FILES + (MOST_OPEN if of_parts else 0)] * 2)


def cpu_seconds(size: int, of_parts: int) -> float:
    """Processor time that the examination of a file of so many bytes may take, with that of its parts.

    Of parts, the file says where each piece of a tensor is, in 40 bytes; to look at it takes some 50 µs.
    """
    return 4 + (size + of_parts) / 50e6 + (size / 500e3 if of_parts else 0)


def _limit(what: int, soft: int, hard: int) -> None:
    """Sets a limit, unless a lower one is set already."""
    highest = resource.getrlimit(what)[1]
    known = highest != resource.RLIM_INFINITY
    resource.setrlimit(what, (min(soft, highest), min(hard, highest)) if known else (soft, hard))


def _address_space() -> int:
    """Bytes of address space that this process has; where the system does not tell, as many as it has with room."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return 472 << 20


def _item(
    scan: Scan, parts: Parts, entry: Entry, texts: list[tuple[tuple[str, ...], str]], progress: "_Reporter"
) -> Item:
    """Reads an entry; a JSON value that matters is added to `texts`."""
    finite, kind = True, "tensor" if entry.kind == "sharded" else entry.kind
    if entry.kind == "json":
        text = _json_text(scan, entry)
        if entry.keys[0] in _REPORTED or entry.keys == _GROUPS:
            texts.append((entry.keys, text))
    elif kind == "tensor":
        blocks = scan.blocks(entry) if entry.table is None else _blocks_of_parts(parts, entry)
        finite = _is_finite(scan, entry, blocks, progress)
    return Item(entry.keys, kind, entry.dtype, entry.shape, entry.nbytes, finite)


def _json_text(scan: Scan, entry: Entry) -> str:
    if entry.nbytes > MAX_JSON_BYTES:
        scan.refuse(entry.name, f"JSON of at most {MAX_JSON_BYTES} bytes in a file that is examined", f"{entry.nbytes}")
    content = np.empty(entry.stored, np.uint8)
    scan.read(entry, content)
    scan.json(entry, content)
    return content.tobytes().decode()


def _blocks_of_parts(parts: Parts, entry: Entry) -> Iterator[np.ndarray[Any, Any]]:
    """All data of a sharded tensor, in flat pieces of a few MB; the checksums of its rows are compared."""
    buffer = np.empty(_BLOCK, np.uint8)
    for piece in entry.pieces_between(0, entry.shape[0]):
        size = piece.rows * entry.row_bytes
        views = (buffer[: min(_BLOCK, size - start)].data for start in range(0, size, _BLOCK))
        try:
            source = parts.held_open(piece.part, f"rows of {entry.name}")
            for view in checked(parts.path(piece.part), source, piece, entry.name, views):
                yield np.frombuffer(view, entry.numpy_dtype)
        except OSError as error:  # which would be taken for one of the file that is open as well
            raise UsageError(f"{parts.path(piece.part)}: the part cannot be read: {error.strerror or error}") from error


def _is_finite(scan: Scan, entry: Entry, blocks: Iterable[np.ndarray[Any, Any]], progress: "_Reporter") -> bool:
    """Whether all values are numbers; also reads all of the data, and so checks it."""
    finite = True
    for block in blocks:
        if entry.dtype == "bool" and block.max() > 1:
            scan.refuse(entry.name, "bool values 0 and 1", str(block.max()))
        finite = finite and _all_finite(block, entry.dtype)
        progress.advance(block.nbytes)
    return finite or 0 in entry.shape


def _all_finite(block: np.ndarray[Any, Any], dtype: str) -> bool:
    if dtype in _NOT_FINITE:
        mask, pattern = _NOT_FINITE[dtype]
        return bool(((block & mask) != pattern).all())
    return block.dtype.kind not in "fc" or bool(np.isfinite(block).all())


class _Reporter:
    """Prints progress now and then."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._next = total, 0, _BYTES_BETWEEN_REPORTS

    def advance(self, count: int) -> None:
        """So many bytes more are done."""
        self._done += count
        if self._done >= self._next:
            self._next = self._done + _BYTES_BETWEEN_REPORTS
            _tell(Progress(min(self._done, self._total), self._total))


def _tell(message: Message) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()
