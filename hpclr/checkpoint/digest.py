"""The SHA-256 of a checkpoint, and the sidecar file that records it and commits the checkpoint.

A sidecar holds what `sha256sum FILE` prints, so that `sha256sum -c FILE.sha256` checks a
checkpoint without hpclr, whatever its name. It holds two lines only while a checkpoint is being
replaced by another of the same step: until that is over, either content is good.
"""

import hashlib
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import FileIO, RawIOBase
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import TypeAlias

from hpclr.checkpoint.failpoint import failpoint
from hpclr.errors import UsageError
from hpclr.files import write_whole

SUFFIX = ".sha256"
_BLOCK = 4 << 20  # bytes read or written at once
_LONG = 1 << 20  # pieces of so many bytes are not copied to make longer ones
_BLOCKS_BEHIND = 256  # how far hashing may fall behind: the rest, up to 1 GiB, is hashed while the disk is waited for
_LINE = re.compile(r"(\\?)([0-9a-f]{64})  (.+)")
_ESCAPED = str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r"})
_MAX_SIDECAR_BYTES = 4096


def sidecar_of(path: Path) -> Path:
    """The sidecar's path, `NAME.h5.sha256` beside `NAME.h5`."""
    return path.with_name(path.name + SUFFIX)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb", buffering=0) as file:
        return digest_of(file)


def digest_of(file: RawIOBase, advance: Callable[[int], None] = lambda count: None) -> str:
    """The SHA-256 of all bytes of an open file in hexadecimal, read in blocks of 4 MiB.

    Args:
        file: may be anywhere; it is at its end afterwards.
        advance: called with the number of bytes as they are done.
    """
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    file.seek(0)
    while count := file.readinto(block):
        digest.update(block[:count])
        advance(count)
    return digest.hexdigest()


_Bytes: TypeAlias = bytes | bytearray | memoryview


def write_hashed(path: Path, pieces: Iterable[_Bytes]) -> str:
    """Write the new file `path`, down to the disk, and hash what is written by a second thread meanwhile.

    Returns:
        The SHA-256 of the bytes that were written, in hexadecimal.

    Raises:
        OSError: the file exists or cannot be written; what was written of it is left there.
    """
    with path.open("xb", buffering=0) as file, _Hasher() as hasher:
        for block in _blocks(pieces):
            hasher.follow(block)
            _write(file, block)
            failpoint("in_data")
        failpoint("after_data")
        os.fsync(file.fileno())
    return hasher.hexdigest()


class _Hasher(Thread):
    """Hashes blocks of bytes in a thread, some way behind the one that hands them over."""

    def __init__(self) -> None:
        super().__init__(name="hpclr-digest", daemon=True)  # whatever interrupts, it holds up no exit
        self._digest = hashlib.sha256()
        self._blocks: Queue[_Bytes | None] = Queue(_BLOCKS_BEHIND)
        self._error: BaseException | None = None

    def __enter__(self) -> "_Hasher":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._blocks.put(None)
        self.join()

    def follow(self, block: _Bytes) -> None:
        """Hash this block next; waits if too many are waiting already."""
        self._blocks.put(block)

    def hexdigest(self) -> str:
        """The digest of all blocks, after the `with` block."""
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()

    def run(self) -> None:
        """The thread: takes blocks up to None, whatever happens, so that `follow` never waits for good."""
        while (block := self._blocks.get()) is not None:
            try:
                self._digest.update(block)
            except BaseException as error:
                self._error = error


def _blocks(pieces: Iterable[_Bytes]) -> Iterator[_Bytes]:
    """The same bytes in blocks: long pieces are cut without being copied, short ones are put together."""
    together = bytearray()
    for piece in pieces:
        is_long = len(piece) >= _LONG
        if not is_long:
            together += piece
        if is_long or len(together) >= _BLOCK:
            yield together
            together = bytearray()
        if is_long:
            view = memoryview(piece)
            yield from (view[first : first + _BLOCK] for first in range(0, len(view), _BLOCK))
    yield together


def _write(file: FileIO, block: _Bytes) -> None:
    """All of a block: on a file without a buffer, one call may write less."""
    rest = memoryview(block)
    while rest:
        rest = rest[file.write(rest) :]


def write_sidecar(path: Path, *digests: str) -> None:
    """Record that the content of `path` has one of `digests`; atomic."""
    lines = "".join(_line(digest, path.name) + "\n" for digest in digests)
    write_whole(sidecar_of(path), os.fsencode(lines))


def _line(digest: str, name: str) -> str:
    """What `sha256sum` prints, which marks a line with an escaped name by a backslash at its start."""
    escaped = name.translate(_ESCAPED)
    mark = "" if escaped == name else "\\"
    return f"{mark}{digest}  {escaped}"


def read_sidecar(path: Path) -> list[str]:
    """The digests recorded for the checkpoint `path`: one, or two while it is being replaced.

    Raises:
        UsageError: the sidecar is missing, damaged, or names another file.
    """
    sidecar = sidecar_of(path)
    if not sidecar.is_file():
        raise UsageError(
            f"{path}: there is no {sidecar.name} beside it, so the checkpoint was never committed or was copied "
            f"without its digest; expected a line as `sha256sum {shlex.quote(path.name)}` prints it. Copy the sidecar "
            "too; without it, `hpclr verify --without-digest` examines the file, and `inspect`, `evaluate`, "
            "`export` and `spectrum` read it with --untrusted."
        )
    with sidecar.open("rb") as file:
        content = file.read(_MAX_SIDECAR_BYTES)
    return _parse(sidecar, path.name, content)


def check_digest(path: Path) -> None:
    """Check the content of the checkpoint `path` against its sidecar.

    Raises:
        UsageError: the sidecar is missing or damaged, or the content has another digest.
    """
    recorded = read_sidecar(path)
    check_found(path, sha256_of(path), recorded, path.stat().st_size)


def check_found(path: Path, found: str, recorded: Sequence[str], size: int) -> None:
    """Compare the digest of the `size` bytes that were read from `path` with those recorded.

    Raises:
        UsageError: it is none of them.
    """
    if found not in recorded:
        raise UsageError(
            f"{path}: the content has changed since it was saved: expected sha256 {' or '.join(recorded)} "
            f"(from {path.name}{SUFFIX}), found {found} over {size} bytes. "
            "Use another checkpoint, or fetch this one again from a good copy."
        )


def _parse(sidecar: Path, name: str, content: bytes) -> list[str]:
    """The digests in the bytes of a sidecar, which must be exactly one or two lines for `name`."""
    text = os.fsdecode(content)
    names = {"": name, "\\": name.translate(_ESCAPED)}
    lines = [_LINE.fullmatch(line) for line in text.removesuffix("\n").split("\n")]
    digests = [line[2] for line in lines if line and line[3] == names[line[1]]]
    if text.endswith("\n") and len(digests) == len(lines) and len(digests) in (1, 2):
        return digests
    quoted = shlex.quote(name)
    raise UsageError(
        f"{sidecar}: the sidecar is damaged or belongs to another file: expected the line "
        f"'{_line('<64 hexadecimal digits>', name)}', found {text[:120]!r}. Use another checkpoint; if you renamed "
        f"this one yourself, write the sidecar anew with `sha256sum {quoted} > {shlex.quote(sidecar.name)}`."
    )
