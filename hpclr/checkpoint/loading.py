"""Reading a single checkpoint, wherever it lies."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpclr.checkpoint.digest import check_digest, read_sidecar
from hpclr.checkpoint.reader import read_attrs, read_tree, read_verified
from hpclr.checkpoint.tree import Tree
from hpclr.errors import UsageError


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read: the step it was saved at, its file, its content."""

    step: int
    path: Path
    tree: Tree


def load_file(
    path: Path, only: str | None = None, *, verify: bool = True, digests: Sequence[str] | None = None
) -> Loaded:
    """Read one checkpoint, wherever it lies.

    Args:
        path: the HDF5 file.
        only: read this top-level key of the tree alone.
        verify: check the file against its `.sha256` first; without, a damaged file may be read. Parts are checked
            against the file then, if it is read as a whole.
        digests: the SHA-256 digests that the file may have, instead of those in its `.sha256`.

    Raises:
        UsageError: missing, damaged, without its digest, or not a checkpoint that this hpclr reads.
    """
    try:
        return read_whole(path, only, verify, digests)
    except OSError as error:
        raise UsageError(
            f"{path}: the checkpoint cannot be read: {error.strerror or error}. Check the file."
        ) from error


def read_whole(path: Path, only: str | None, verify: bool, digests: Sequence[str] | None = None) -> Loaded:
    """As `load_file`, but for an OSError, which stays one."""
    if verify and only is None and path.is_file():
        attrs, tree = read_verified(path, digests or read_sidecar(path))
        return Loaded(int(attrs["step"]), path, tree)
    if verify and path.is_file():
        check_digest(path)
    attrs = read_attrs(path)
    return Loaded(int(attrs["step"]), path, read_tree(path, only))
