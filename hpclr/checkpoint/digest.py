"""The SHA-256 of a checkpoint, and the sidecar file that records it and commits the checkpoint.

A sidecar holds what `sha256sum FILE` prints, so that `sha256sum -c FILE.sha256` checks a
checkpoint without hpclr. It holds two lines only while a checkpoint is being replaced by another
of the same step: until that is over, either content is good.
"""

import hashlib
import re
from pathlib import Path

from hpclr.errors import UsageError
from hpclr.files import write_whole

SUFFIX = ".sha256"
_BLOCK = 1 << 20
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_MAX_SIDECAR_BYTES = 4096


def sidecar_of(path: Path) -> Path:
    """The sidecar's path, `NAME.h5.sha256` beside `NAME.h5`."""
    return path.with_name(path.name + SUFFIX)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def write_sidecar(path: Path, *digests: str) -> None:
    """Record that the content of `path` has one of `digests`; atomic."""
    lines = "".join(f"{digest}  {path.name}\n" for digest in digests)
    write_whole(sidecar_of(path), lines.encode("utf-8"))


def read_sidecar(path: Path) -> list[str]:
    """The digests recorded for the checkpoint `path`: one, or two while it is being replaced.

    Raises:
        UsageError: the sidecar is missing, damaged, or names another file.
    """
    sidecar = sidecar_of(path)
    if not sidecar.is_file():
        raise UsageError(
            f"{path}: there is no {sidecar.name} beside it, so the checkpoint was never committed or was copied "
            f"without its digest; expected a line as `sha256sum {path.name}` prints it. Copy the sidecar too, or, "
            "if you trust the file, read it without verification."
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
    found = sha256_of(path)
    if found not in recorded:
        raise UsageError(
            f"{path}: the content has changed since it was saved: expected sha256 {' or '.join(recorded)} "
            f"(from {path.name}{SUFFIX}), found {found} over {path.stat().st_size} bytes. "
            "Use another checkpoint, or fetch this one again from a good copy."
        )


def _parse(sidecar: Path, name: str, content: bytes) -> list[str]:
    """The digests in the bytes of a sidecar, which must be exactly one or two lines for `name`."""
    text = content.decode("utf-8", errors="replace")
    lines = [_LINE.fullmatch(line) for line in text.removesuffix("\n").split("\n")]
    digests = [line[1] for line in lines if line and line[2] == name]
    if text.endswith("\n") and len(digests) == len(lines) and len(digests) in (1, 2):
        return digests
    raise UsageError(
        f"{sidecar}: the sidecar is damaged or belongs to another file: expected the line '<64 hexadecimal digits>  "
        f"{name}', found {text[:120]!r}. Use another checkpoint; if you renamed this one yourself, "
        f"write the sidecar anew with `sha256sum {name} > {sidecar.name}`."
    )
