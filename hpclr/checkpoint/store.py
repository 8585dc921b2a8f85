"""A directory of checkpoints, one file a step, that always holds a valid one once one was saved.

A save writes under a hidden name, waits for the disk, renames, and writes the digest beside it
last: the digest commits. Loading believes a file only after its digest was found to be right. So
it does not matter at which instant the process dies. Order is by step, never by a file's time.
One process at a time may save, load the newest or sweep in a directory.

Where tensors are sharded, every process first writes its rows as a part, and the file that is
saved then is their index: until it is committed, the parts mean nothing.
"""

import errno
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TypeVar

from hpclr.checkpoint.best import read_best, record_best
from hpclr.checkpoint.digest import SUFFIX, check_digest, read_sidecar, sha256_of, sidecar_of, write_sidecar
from hpclr.checkpoint.failpoint import failpoint
from hpclr.checkpoint.loading import Loaded, read_whole
from hpclr.checkpoint.parts import (
    TEMPORARY,
    MissingPartError,
    Part,
    PartReport,
    are_whole,
    part_files,
    part_name,
    parts_directory,
    remove_parts,
)
from hpclr.checkpoint.reader import NewerVersionError, read_parts
from hpclr.checkpoint.remedies import save_failed
from hpclr.checkpoint.rows import OpenCheckpoint, open_file
from hpclr.checkpoint.scan import OlderVersionError
from hpclr.checkpoint.sharding import IndexLike, index_tree
from hpclr.checkpoint.tree import TreeLike
from hpclr.checkpoint.writer import size_of_part, size_on_disk, write_part, write_tree
from hpclr.errors import HpclrError, RetryableError, UsageError
from hpclr.files import synchronise, write_whole

T = TypeVar("T")

logger = logging.getLogger("hpclr.checkpoint")

_STEM = r"step-(\d{8}|[1-9]\d{8,})"
_NAME = re.compile(_STEM + r"\.h5")
_SIDECAR_NAME = re.compile(_NAME.pattern + re.escape(SUFFIX))
_PARTS_NAME = re.compile(_STEM + r"\.parts")
_TRASH = ".trash-"
_PAUSE = 0.5
_VANISHED = (errno.ENOENT, errno.ESTALE)


def _check_step(found: Loaded | OpenCheckpoint, step: int) -> None:
    """The file must be of the step that its name says."""
    if found.step != step:
        raise UsageError(f"{found.path}: expected the checkpoint of step {step}, found that of {found.step}")


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
        step = read_best(self.directory)
        return self.path(step) if step is not None and step in self.steps() else None

    def save(
        self,
        step: int,
        tree: TreeLike,
        *,
        parts: Sequence[PartReport] = (),
        metric: float | None = None,
        best: bool = False,
    ) -> Path:
        """Save a tree; when this returns, it is on the disk and will be found again.

        A checkpoint of the same step is replaced; until that is over, the old one stays valid.

        Args:
            step: optimiser steps done.
            tree: what to save; see `write_tree`. Instead of the `Piece`s in it, it is saved where all rows are.
            parts: if there are such, what `write_part` of this step has returned on every process, in their order.
            metric: what the model is judged by, noted in the file.
            best: keep this checkpoint, and no longer the best one before it, beyond the newest ones.

        Returns:
            The checkpoint's file.

        Raises:
            TypeError, ValueError: the tree cannot be stored, or the pieces of a tensor leave gaps or overlap; nothing
                is written.
            RetryableError: the disk is full, the directory not writable or gone. Earlier
                checkpoints are as they were; the parts are gone.
        """
        index = index_tree(tree, parts, step)
        size, listed = size_on_disk(index, len(parts)), [report.part for report in parts]
        attrs: dict[str, int | float] = {"step": step} | ({} if metric is None else {"metric": float(metric)})
        try:
            self._commit(step, index, attrs, size, listed)
            if best:
                record_best(self.directory, step, metric)
        except OSError as error:
            if parts:
                with suppress(HpclrError, OSError):
                    self.discard_parts(step)
            raise save_failed(self.path(step), step, size, error) from error
        self._retain(step, {report.name for report in parts})
        return self.path(step)

    def write_part(self, step: int, tree: TreeLike, process: int, processes: int) -> PartReport:
        """Write this process's rows of the sharded tensors in a tree; they count once `save` has the report of all.

        All processes call this, at the same time if they like; `discard_parts` if it fails on one of them.

        Args:
            step: optimiser steps done.
            tree: in which each sharded tensor is a `Piece`, the same ones on all processes; nothing else counts.
            process: number of this process.
            processes: how many there are.

        Raises:
            TypeError, ValueError: a piece cannot be stored, or does not fit its tensor; nothing is written.
            RetryableError: as `save`.
        """
        size = size_of_part(tree)
        try:
            return self._write_part(step, tree, process, processes, size)
        except OSError as error:
            raise save_failed(self.path(step), step, size, error) from error

    def discard_parts(self, step: int) -> list[Path]:
        """Remove the parts of a step that no checkpoint names, as of a save that failed; nobody may be writing any."""
        self.guard()
        in_use = self._parts_in_use(step)
        return [] if in_use is None else remove_parts(self.path(step), in_use)

    def load_newest(self) -> Loaded | None:
        """Read the newest valid checkpoint; None if none was ever committed.

        Files that were never committed, and checkpoints that are damaged, are set aside as `.bad` beside a
        `.bad.reason`, with a warning.

        Raises:
            UsageError: checkpoints were committed, but none is valid; or the newest is of a newer format.
            RetryableError: a file cannot be read for a reason that is not its content.
        """
        return self._newest(self._load)

    def open_newest(self) -> OpenCheckpoint | None:
        """Open the newest checkpoint that is valid as far as it is read: all but the content of its parts.

        These have the right length. The processes that read them check their digests too (`check_parts`); if one is
        bad, the first process calls `set_aside` and this once more.

        Raises:
            UsageError, RetryableError: as `load_newest`.
        """
        return self._newest(self._open_with_parts)

    def load(self, step: int, patience: float = 60.0) -> Loaded:
        """Read the checkpoint of a step that another process, perhaps on another host, has found to be good.

        Args:
            step: of the checkpoint.
            patience: seconds to wait until a network file system shows it here as well.

        Raises:
            UsageError: it is damaged as it is seen from here.
            RetryableError: it does not appear, or cannot be read.
        """
        return self._patiently(self._load, step, patience)

    def open(self, step: int, patience: float = 60.0, *, whole: bool = False) -> OpenCheckpoint:
        """Open the checkpoint of a step, as `load` reads it.

        Args:
            step: of the checkpoint.
            patience: seconds to wait until a network file system shows it here as well.
            whole: wait for its parts too, each of its length; else nothing of them is looked at yet.
        """
        return self._patiently(self._open_with_parts if whole else self._open, step, patience)

    def _patiently(self, read: Callable[[int], T], step: int, patience: float) -> T:
        deadline = time.monotonic() + patience
        while True:
            try:
                return self._if_there(read, step)
            except MissingPartError:
                if time.monotonic() > deadline:
                    raise
            except OSError as error:
                if error.errno not in _VANISHED or time.monotonic() > deadline:
                    raise self._load_failed(error) from error
            self._entries()  # listing a directory makes a client of a file server ask anew
            time.sleep(_PAUSE)

    def sweep(self) -> list[str]:
        """Remove what killed saves and deletions left behind; returns the names of what was removed."""
        left = [path for path in self._entries() if path.name.startswith((TEMPORARY, _TRASH))]
        swept = [path for path in left if not path.is_dir()]
        swept += self._sidecars_of_deleted()
        for path in swept:
            path.unlink(missing_ok=True)
        swept += self._sweep_parts()
        if swept:
            logger.info("%s: removed what a killed process left: %s", self.directory, ", ".join(p.name for p in swept))
        return [path.name for path in swept]

    # Saving

    def _write_part(self, step: int, tree: TreeLike, process: int, processes: int, size: int) -> PartReport:
        directory = parts_directory(self.path(step))
        temporary = directory / f"{TEMPORARY}part-{process:04d}-{secrets.token_hex(4)}"
        for place in (self.directory, directory):
            place.mkdir(exist_ok=True)
        self._check_space(size, make_room=process == 0)
        failpoint("before_part")
        try:
            report = write_part(temporary, tree, step, process, processes)
            failpoint("after_part")
            self.guard()
            os.replace(temporary, directory / report.name)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        failpoint("after_part_rename")
        synchronise(directory)
        return report

    def _commit(
        self, step: int, tree: IndexLike, attrs: dict[str, int | float], size: int, parts: Sequence[Part]
    ) -> None:
        path = self.path(step)
        temporary = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")  # nobody else's, ever
        self.directory.mkdir(exist_ok=True)  # not its parents: a run directory that has gone must not come back empty
        self._check_space(size)
        failpoint("before_data")
        made: os.stat_result | None = None
        try:
            digest = write_tree(temporary, tree, attrs, parts)
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

    def _check_space(self, size: int, *, make_room: bool = True) -> None:
        if make_room and shutil.disk_usage(self.directory).free < size:
            self._retain()  # `keep` may have been lowered to make room
        if shutil.disk_usage(self.directory).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # Retention

    def _retain(self, saved: int | None = None, parts: Container[str] = ()) -> None:
        """Delete all but the newest, the best and the one just saved; a fault is a warning, as the save is done.

        Of that one, only these parts stay: it may have replaced another one with others.
        """
        try:
            if saved is not None:
                remove_parts(self.path(saved), parts)
            kept = {*self.steps()[-self.keep :], read_best(self.directory), saved}
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
        failpoint("before_parts_go")
        remove_parts(path)

    def _sweep_parts(self) -> list[Path]:
        """Remove parts without an index, of a save or a deletion cut short, or of a checkpoint that was replaced."""
        swept: list[Path] = []
        for step in self._steps_named(_PARTS_NAME):
            if not (self.path(step).exists() and are_whole(part_files(self.path(step)))):
                swept += self.discard_parts(step)
        return swept

    def _parts_in_use(self, step: int) -> set[str] | None:
        """The names of the parts that the checkpoint of a step has; None if that cannot be known."""
        path = self.path(step)
        has_sidecar = sidecar_of(path).exists()
        if not path.exists():  # with its digest still there, it is a deletion cut short only if there is a newer one
            return None if has_sidecar and step >= max(self.steps(), default=0) else set()
        if not has_sidecar:
            return None  # it was never committed, and is set aside together with its parts
        try:
            check_digest(path)
            parts = read_parts(path)
        except (UsageError, OSError):
            return None
        return {part_name(part, number, len(parts)) for number, part in enumerate(parts)}

    # Loading

    def _newest(self, read: Callable[[int], T]) -> T | None:
        """The newest valid checkpoint; None if none was ever committed."""
        try:
            return self._newest_listed(read)
        except OSError as error:
            if error.errno not in _VANISHED:
                raise self._load_failed(error) from error
            logger.warning("%s: listed anew, because a file vanished: %s", self.directory, error)
        try:  # a file server's view of a directory may lag behind
            return self._newest_listed(read)
        except OSError as error:
            raise self._load_failed(error) from error

    def _newest_listed(self, read: Callable[[int], T]) -> T | None:
        """The newest valid checkpoint of those listed now; raises OSError if one cannot be read."""
        self._set_aside_uncommitted()
        for step in reversed(self.steps()):
            try:
                return self._if_there(read, step)
            except (NewerVersionError, OlderVersionError):
                raise
            except UsageError as error:
                self.set_aside(step, str(error))
        self._refuse_to_start_over()
        return None

    def _if_there(self, read: Callable[[int], T], step: int) -> T:
        """The checkpoint of a step; FileNotFoundError if what was listed has vanished: such a one is not damaged."""
        try:
            return read(step)
        except (NewerVersionError, OlderVersionError):
            raise
        except UsageError:
            for path in (self.path(step), sidecar_of(self.path(step))):
                path.stat()
            raise

    def _load(self, step: int) -> Loaded:
        failpoint("before_load")
        loaded = read_whole(self.path(step), only=None, verify=True)
        _check_step(loaded, step)
        return loaded

    def _open(self, step: int) -> OpenCheckpoint:
        failpoint("before_load")
        opened = open_file(self.path(step))
        _check_step(opened, step)
        return opened

    def _open_with_parts(self, step: int) -> OpenCheckpoint:
        opened = self._open(step)
        opened.check_present()
        return opened

    def _load_failed(self, error: OSError) -> RetryableError:
        return RetryableError(
            f"{error.filename or self.directory}: the checkpoint cannot be read: {error}. Check that the file system "
            "is mounted and the file readable, then start again; or move the file away to use the one before."
        )

    def _set_aside_uncommitted(self) -> None:
        committed = self.steps()
        for step in self._files():
            if step not in committed:
                self.set_aside(step, f"{self.path(step)}: it was never committed, the save was cut short")

    def set_aside(self, step: int, reason: str) -> None:
        """Rename a bad checkpoint and its parts to `.bad`, beside a `.bad.reason`, with a warning."""
        path, bad = self.path(step), self._free_name(self.path(step))
        try:
            write_whole(bad.with_name(bad.name + ".reason"), (reason + "\n").encode())
            if sidecar_of(path).exists():  # first, so that what remains is not taken as committed
                os.replace(sidecar_of(path), bad.with_name(bad.name + SUFFIX))
            if parts_directory(path).exists():  # before the data: parts without it would be swept
                os.replace(parts_directory(path), parts_directory(bad))
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
