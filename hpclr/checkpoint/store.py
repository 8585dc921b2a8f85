"""A directory of checkpoints, one file a step, that always holds a valid one once one was saved.

A save writes under a hidden name, waits for the disk, renames, and writes the digest beside it
last: the digest commits. Loading believes a file only after its digest was found to be right. So
it does not matter at which instant the process dies. Order is by step, never by a file's time.
One process at a time may save, load the newest or sweep in a directory.
"""

import errno
import json
import logging
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from hpclr.checkpoint.digest import SUFFIX, check_digest, read_sidecar, sha256_of, sidecar_of, write_sidecar
from hpclr.checkpoint.failpoint import failpoint
from hpclr.checkpoint.reader import NewerVersionError, read_attrs, read_tree, read_verified
from hpclr.checkpoint.tree import Tree, TreeLike
from hpclr.checkpoint.writer import size_on_disk, write_tree
from hpclr.errors import RetryableError, UsageError
from hpclr.files import synchronise, write_whole

logger = logging.getLogger("hpclr.checkpoint")

_NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,})\.h5")
_SIDECAR_NAME = re.compile(_NAME.pattern + re.escape(SUFFIX))
_TEMPORARY = ".tmp-"
_TRASH = ".trash-"
_BEST = "best.json"
_MAX_BEST_BYTES = 4096
_PAUSE = 0.5
_VANISHED = (errno.ENOENT, errno.ESTALE)
_REMEDIES = {
    errno.ENOSPC: "Free space there",
    errno.EDQUOT: "Your quota is used up, whatever the file system has left: free space or have the quota raised",
    errno.EFBIG: "Files may not become so large: have that limit raised (`ulimit -f` shows it)",
    errno.EROFS: "The file system is mounted read-only, some are after a fault: have it mounted writable again",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Make the directory writable for the user who runs this"),
    errno.EIO: "The disk, or the network to it, has failed: have it looked after",
    errno.ESTALE: "The file server no longer knows the directory: have it mounted again",
    errno.ENOENT: "The run directory has vanished: put it back, or have its file system mounted",
}


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
        verify: check the file against its `.sha256` first; without, a damaged file may be read.
        digests: the SHA-256 digests that the file may have, instead of those in its `.sha256`.

    Raises:
        UsageError: missing, damaged, without its digest, or not a checkpoint that this hpclr reads.
    """
    try:
        return _read(path, only, verify, digests)
    except OSError as error:
        raise UsageError(
            f"{path}: the checkpoint cannot be read: {error.strerror or error}. Check the file."
        ) from error


def _read(path: Path, only: str | None, verify: bool, digests: Sequence[str] | None = None) -> Loaded:
    if verify and only is None and path.is_file():
        attrs, tree = read_verified(path, digests or read_sidecar(path))
        return Loaded(int(attrs["step"]), path, tree)
    if verify and path.is_file():
        check_digest(path)
    attrs = read_attrs(path)
    return Loaded(int(attrs["step"]), path, read_tree(path, only))


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: made at the first save; its parent must exist.
        keep: how many of the newest to keep, at least 2; the best one is kept beside them.
        guard: called before a save changes what others see; raises if the directory is no longer the caller's.
    """

    def __init__(self, directory: Path, keep: int = 3, guard: Callable[[], None] = lambda: None) -> None:
        if keep < 2:
            raise UsageError(
                f"checkpoint.keep: expected at least 2, found {keep}: with a single checkpoint, a damaged file "
                "would be the end of the run. Keep 2 or more."
            )
        self.directory = directory
        self.keep = keep
        self.guard = guard

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, if there is one."""
        return self.directory / f"step-{step:08d}.h5"

    def steps(self) -> list[int]:
        """The steps of the committed checkpoints, ascending; their digests are not checked here."""
        return [step for step in self._files() if sidecar_of(self.path(step)).exists()]

    def best(self) -> Path | None:
        """The checkpoint saved last as the best one, or None."""
        step = self._best_step()
        return self.path(step) if step is not None and step in self.steps() else None

    def save(self, step: int, tree: TreeLike, *, metric: float | None = None, best: bool = False) -> Path:
        """Save a tree; when this returns, it is on the disk and will be found again.

        A checkpoint of the same step is replaced; until that is over, the old one stays valid.

        Args:
            step: optimiser steps done.
            tree: what to save; see `write_tree`.
            metric: what the model is judged by, noted in the file.
            best: keep this checkpoint, and no longer the best one before it, beyond the newest ones.

        Returns:
            The checkpoint's file.

        Raises:
            TypeError, ValueError: the tree cannot be stored; nothing is written.
            RetryableError: the disk is full, the directory not writable or gone. Earlier
                checkpoints are as they were.
        """
        size = size_on_disk(tree)
        attrs: dict[str, int | float] = {"step": step} | ({} if metric is None else {"metric": float(metric)})
        try:
            self._commit(step, tree, attrs, size)
            if best:
                self._record_best(step, metric)
        except OSError as error:
            raise self._save_failed(step, size, error) from error
        self._retain(step)
        return self.path(step)

    def load_newest(self) -> Loaded | None:
        """Read the newest valid checkpoint; None if none was ever committed.

        Files that were never committed, and checkpoints that are damaged, are set aside as `.bad` beside a
        `.bad.reason`, with a warning.

        Raises:
            UsageError: checkpoints were committed, but none is valid; or the newest is of a newer format.
            RetryableError: a file cannot be read for a reason that is not its content.
        """
        try:
            return self._newest()
        except OSError as error:
            if error.errno not in _VANISHED:
                raise self._load_failed(error) from error
            logger.warning("%s: listed anew, because a file vanished: %s", self.directory, error)
        try:  # a file server's view of a directory may lag behind
            return self._newest()
        except OSError as error:
            raise self._load_failed(error) from error

    def load(self, step: int, patience: float = 60.0) -> Loaded:
        """Read the checkpoint of a step that another process, perhaps on another host, has found to be good.

        Args:
            step: of the checkpoint.
            patience: seconds to wait until a network file system shows it here as well.

        Raises:
            UsageError: it is damaged as it is seen from here.
            RetryableError: it does not appear, or cannot be read.
        """
        deadline = time.monotonic() + patience
        while True:
            try:
                return self._load_if_there(step)
            except OSError as error:
                if error.errno not in _VANISHED or time.monotonic() > deadline:
                    raise self._load_failed(error) from error
            self._entries()  # listing a directory makes a client of a file server ask anew
            time.sleep(_PAUSE)

    def sweep(self) -> list[str]:
        """Remove what killed saves and deletions left behind; returns the names of what was removed."""
        left = [path for path in self._entries() if path.name.startswith((_TEMPORARY, _TRASH))]
        swept = [path for path in left if not path.is_dir()]
        swept += self._sidecars_of_deleted()
        for path in swept:
            path.unlink(missing_ok=True)
        if swept:
            logger.info("%s: removed what a killed process left: %s", self.directory, ", ".join(p.name for p in swept))
        return [path.name for path in swept]

    # Saving

    def _commit(self, step: int, tree: TreeLike, attrs: dict[str, int | float], size: int) -> None:
        path = self.path(step)
        temporary = path.with_name(f"{_TEMPORARY}{path.name}-{secrets.token_hex(4)}")  # nobody else's, ever
        self.directory.mkdir(exist_ok=True)  # not its parents: a run directory that has gone must not come back empty
        self._check_space(size)
        failpoint("before_data")
        made: os.stat_result | None = None
        try:
            digest = write_tree(temporary, tree, attrs)
            made = temporary.stat()
            failpoint("after_digest")
            self.guard()
            self._announce_replacement(path, digest)
            failpoint("after_announcement")
            os.replace(temporary, path)
            failpoint("after_rename")
            synchronise(self.directory)
            failpoint("before_commit")
            self.guard()
            write_sidecar(path, digest)
        except BaseException:
            self._withdraw(path, temporary, made)
            raise
        failpoint("after_commit")

    def _withdraw(self, path: Path, temporary: Path, made: os.stat_result | None) -> None:
        """Remove what a failed save has made, unless it is committed; what stays is swept at the next start."""
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
            if made is not None and os.path.samestat(path.stat(), made) and not sidecar_of(path).exists():
                path.unlink(missing_ok=True)

    def _announce_replacement(self, path: Path, digest: str) -> None:
        """Let the sidecar of a checkpoint about to be replaced allow both contents."""
        if not (path.exists() and sidecar_of(path).exists()):
            return
        try:
            recorded = read_sidecar(path)
        except UsageError:  # a damaged sidecar protects nothing
            return
        if (present := sha256_of(path)) in recorded:
            write_sidecar(path, present, digest)

    def _check_space(self, size: int) -> None:
        if shutil.disk_usage(self.directory).free < size:
            self._retain()  # `keep` may have been lowered to make room
        if shutil.disk_usage(self.directory).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _record_best(self, step: int, metric: float | None) -> None:
        finite = metric if metric is not None and math.isfinite(metric) else None
        write_whole(self.directory / _BEST, (json.dumps({"step": step, "metric": finite}) + "\n").encode())

    def _save_failed(self, step: int, size: int, error: OSError) -> RetryableError:
        remedy = _REMEDIES.get(error.errno or 0, "Check that the file system is mounted and works")
        try:
            free = f"{shutil.disk_usage(self.directory).free / 1e6:.1f} MB free"
        except OSError:
            free = "free space unknown"
        return RetryableError(
            f"{self.path(step)}: the checkpoint of step {step} could not be saved: {error.strerror or error}; it needs "
            f"{size / 1e6:.1f} MB, {free}. Earlier checkpoints are untouched. {remedy}."
        )

    # Retention

    def _retain(self, saved: int | None = None) -> None:
        """Delete all but the newest, the best and the one just saved; a fault is a warning, as the save is done."""
        try:
            kept = {*self.steps()[-self.keep :], self._best_step(), saved}
            for step in self.steps():
                if step not in kept:
                    self._delete(self.path(step))
        except OSError as error:
            logger.warning("%s: old checkpoints could not be deleted: %s", self.directory, error)

    def _delete(self, path: Path) -> None:
        """The data goes first, in one rename: a file that lost its digest would look like a save cut short."""
        trash = path.with_name(_TRASH + path.name)
        os.replace(path, trash)
        failpoint("in_retention")
        sidecar_of(path).unlink()
        trash.unlink()

    def _best_step(self) -> int | None:
        path = self.directory / _BEST
        if not path.is_file():
            return None
        try:
            with path.open("rb") as file:
                step = json.loads(file.read(_MAX_BEST_BYTES))["step"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            logger.warning("%s: which checkpoint is the best cannot be read: %r", path, error)
            return None
        return step if isinstance(step, int) else None

    # Loading

    def _newest(self) -> Loaded | None:
        """The newest valid checkpoint of those listed now; raises OSError if one cannot be read."""
        self._set_aside_uncommitted()
        for step in reversed(self.steps()):
            try:
                return self._load_if_there(step)
            except NewerVersionError:
                raise
            except UsageError as error:
                self._set_aside(step, str(error))
        self._refuse_to_start_over()
        return None

    def _load_if_there(self, step: int) -> Loaded:
        """The checkpoint of a step; FileNotFoundError if what was listed has vanished: such a one is not damaged."""
        try:
            return self._load(step)
        except NewerVersionError:
            raise
        except UsageError:
            for path in (self.path(step), sidecar_of(self.path(step))):
                path.stat()
            raise

    def _load(self, step: int) -> Loaded:
        failpoint("before_load")
        loaded = _read(self.path(step), only=None, verify=True)
        if loaded.step != step:
            raise UsageError(f"{loaded.path}: expected the checkpoint of step {step}, found that of {loaded.step}")
        return loaded

    def _load_failed(self, error: OSError) -> RetryableError:
        return RetryableError(
            f"{error.filename or self.directory}: the checkpoint cannot be read: {error}. Check that the file system "
            "is mounted and the file readable, then start again; or move the file away to use the one before."
        )

    def _set_aside_uncommitted(self) -> None:
        committed = self.steps()
        for step in self._files():
            if step not in committed:
                self._set_aside(step, f"{self.path(step)}: it was never committed, the save was cut short")

    def _set_aside(self, step: int, reason: str) -> None:
        """Rename a checkpoint to `.bad`; the digest first, so that what remains is not taken as committed."""
        path, bad = self.path(step), self._free_name(self.path(step))
        try:
            write_whole(bad.with_name(bad.name + ".reason"), (reason + "\n").encode())
            if sidecar_of(path).exists():
                os.replace(sidecar_of(path), bad.with_name(bad.name + SUFFIX))
            os.replace(path, bad)
        except OSError as error:  # a directory of somebody else's: go on to the checkpoint before
            logger.warning("checkpoint not used, and it cannot be set aside (%s): %s", error, reason)
        else:
            logger.warning("checkpoint set aside as %s: %s", bad.name, reason)

    def _free_name(self, path: Path) -> Path:
        """`NAME.bad`, or `NAME.bad2` and so on if a bad one of this step is there already."""
        taken = [entry.name for entry in self._entries()]
        names = (f"{path.name}.bad{number if number > 1 else ''}" for number in count(1))
        return path.with_name(next(name for name in names if not any(other.startswith(name) for other in taken)))

    def _refuse_to_start_over(self) -> None:
        """A digest without a valid checkpoint, also one set aside, means that something was committed here."""
        pattern = re.compile(rf"{_NAME.pattern}(\.bad\d*)?{re.escape(SUFFIX)}")
        lost = [path.name for path in self._entries() if pattern.fullmatch(path.name)]
        if lost:
            raise UsageError(
                f"{self.directory}: expected a valid checkpoint to continue from, found none among the {len(lost)} "
                f"that were saved there (the .bad.reason files say why). Put a good copy of a checkpoint and of its "
                f"{SUFFIX} there, or start over in another run directory."
            )

    # The directory

    def _entries(self) -> list[Path]:
        try:
            return sorted(self.directory.iterdir())
        except FileNotFoundError:
            return []
        except (NotADirectoryError, PermissionError) as error:
            if not self.directory.exists():  # what stands above it is no directory: the run's business
                return []
            raise UsageError(
                f"{self.directory}: expected a directory of checkpoints that may be read: {error.strerror}. "
                "Move away what is there, or have it made readable."
            ) from error

    def _files(self) -> list[int]:
        """The steps of which there is a data file, committed or not, ascending."""
        return self._steps_named(_NAME)

    def _steps_named(self, pattern: re.Pattern[str]) -> list[int]:
        matches = [pattern.fullmatch(path.name) for path in self._entries()]
        return sorted(int(match[1]) for match in matches if match)

    def _sidecars_of_deleted(self) -> list[Path]:
        """Sidecars without data, as a deletion cut short leaves them: there is always a newer checkpoint then."""
        newest = max(self.steps(), default=0)
        orphans = set(self._steps_named(_SIDECAR_NAME)) - set(self._files())
        return [sidecar_of(self.path(step)) for step in sorted(orphans) if step < newest]
