"""How fast a node writes and reads files: where runs live, and for temporary files."""

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hpclr.cluster.doctor.finding import Finding, failure, ok
from hpclr.cluster.doctor.space import size
from hpclr.cluster.doctor.storage import kind, scratch

_BLOCK = 4 << 20  # bytes
_BLOCKS, _PASSES = 8, 3
_LONGEST = 2.0  # seconds of writing, after which there are enough blocks


def examine(directory: Path) -> Iterator[Finding]:
    """Both places, one after the other."""
    yield _speed("run disk", directory)
    yield _speed("own disk", Path(tempfile.gettempdir()))


def _speed(about: str, directory: Path) -> Finding:
    wrote = read = written = 0.0
    right = True
    try:
        with scratch(directory) as inside:
            for _ in range(_PASSES):  # the best counts: others use the disk too
                written, speed, digest = _write(inside / "blocks")
                wrote = max(wrote, speed)
                speed, found = _read(inside / "blocks")
                read, right = max(read, speed), right and found == digest
    except OSError as error:
        return failure(about, f"{directory}: {error.strerror or error}", "See the lines on files and space.")
    if not right:
        return failure(
            about, f"{directory}: what was read is not what was written", "Do not use it; tell the administrators."
        )
    speeds = {f"{about} write": wrote, f"{about} read": read}
    text = f"{directory} ({kind(directory)}): {size(written)} written at {wrote:.0f}, read at {read:.0f} MB/s"
    return ok(about, text, measured=speeds)


def _write(path: Path) -> tuple[int, float, bytes]:
    """Bytes written, MB/s with the fsync at the end, digest."""
    digest, block = hashlib.sha256(), os.urandom(_BLOCK)
    began, written, took = time.monotonic(), 0, 0.0
    with path.open("wb", buffering=0) as file:
        while written < _BLOCKS * _BLOCK and time.monotonic() - began < _LONGEST:
            written += file.write(block)
        os.fsync(file.fileno())
        took = time.monotonic() - began
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else memory is read, not the disk
    for _ in range(written // _BLOCK):
        digest.update(block)
    return written, written / took / 1e6, digest.digest()


def _read(path: Path) -> tuple[float, bytes]:
    """MB/s and digest."""
    parts: list[bytes] = []
    began = time.monotonic()
    with path.open("rb", buffering=0) as file:
        while part := file.read(_BLOCK):
            parts.append(part)
    took = time.monotonic() - began
    return sum(map(len, parts)) / took / 1e6, hashlib.sha256(b"".join(parts)).digest()
