"""Preparing data: from a source in any known format to one HDF5 file, block by block."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpclr.data.hashing import Stream, key
from hpclr.data.layout import CONSECUTIVE, FIELDS, SPLITS, Array, fault_in
from hpclr.data.order import permute
from hpclr.data.readers import open_source
from hpclr.data.source import Block, Source
from hpclr.data.teamwork import Team, all_blocks
from hpclr.data.writer import DatasetWriter, replacing
from hpclr.errors import UsageError

Progress = Callable[[int, int], None]  # rows done, rows in all

_VALID_FRACTION = 0.1  # of the training split, where the source has no validation split of its own
_TARGETS = {"train": ("train", "valid"), "valid": ("valid", "test"), "test": ("test",)}  # part → splits it goes to
_DROPPED = -1


def prepare(
    reader: str,
    source: Path | None,
    out: Path,
    *,
    valid_fraction: float | None = None,
    seed: int = 0,
    image_size: int | None = None,
    limit: int | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
    team: Team | None = None,
) -> dict[str, int]:
    """Writes a data set as a dataset file, which is there whole at the end or not at all.

    Args:
        reader: one of `hpclr.data.readers.READERS`.
        source: the file or folder to read; None for data that comes with a package.
        out: the file to write.
        valid_fraction: share of the training samples that become the validation split, chosen by `seed`; by
            default 0.1, or 0 where the source has such a split.
        seed: chooses the validation samples, and those that `limit` keeps.
        image_size: side in pixels to which pictures are brought.
        limit: at most so many samples of each split: a random choice, of a time series or text one stretch.
        force: replace `out` if it is there.
        progress: called after every block.
        team: processes that read a share of the blocks with `hpclr.data.teamwork.read_share`; the file is the same.

    Returns:
        split → number of samples, rows or tokens in the file.

    Raises:
        UsageError: for a source, an option or an output file that cannot be used; names file and index.
        RetryableError: if the disk is full or fails.
    """
    _check_free(out, force)
    data = open_source(reader, source, image_size)
    roles = _roles(data, _valid_fraction(data, valid_fraction), seed, limit)
    sizes = {split: count for split in SPLITS if (count := _count(roles, split))}
    rows = sum(sizes.values())
    labels = 8 if "y" in FIELDS[data.task] else 0
    size_bytes = rows * (int(np.prod(data.row_shape)) * np.dtype(data.dtype).itemsize + labels)
    with replacing(out, size_bytes) as temporary:
        with DatasetWriter(temporary, data, sizes) as writer:
            for part in data.parts:
                _copy(data, part, roles, writer, progress, team)
            writer.finish()
        _check_free(out, force)
    return sizes


def _check_free(out: Path, force: bool) -> None:
    if out.is_dir():
        raise UsageError(f"{out}: is a directory. Name the HDF5 file to write, such as {out / 'data.h5'}")
    if out.exists() and not force:
        raise UsageError(f"{out}: the file exists already. Give --force to replace it, or name another file.")


def _valid_fraction(source: Source, asked: float | None) -> float:
    own = "valid" in source.parts
    if asked and own:
        raise UsageError(
            f"--valid-fraction {asked}: the source has a validation split of {source.parts['valid'].size} rows. "
            "Leave the option out to use that one."
        )
    if asked is not None and not 0 <= asked < 1:
        raise UsageError(f"--valid-fraction: expected 0 or more and less than 1, found {asked}")
    if asked is None:
        return 0.0 if own else _VALID_FRACTION
    return asked


@dataclass(frozen=True)
class _Drawn:
    """The rows of a part go where it was drawn for each."""

    roles: Array  # for each row the index, in _TARGETS, of the split it goes to, or _DROPPED

    def count(self, target: int) -> int:
        return int(np.count_nonzero(self.roles == target))

    def of(self, first: int, last: int) -> Array:
        return self.roles[first:last]


@dataclass(frozen=True)
class _Stretches:
    """Rows in a row stay together; as this holds no array, a text may be any length."""

    bounds: tuple[range, ...]  # for each target the rows that go to it

    def count(self, target: int) -> int:
        return len(self.bounds[target]) if target < len(self.bounds) else 0

    def of(self, first: int, last: int) -> Array:
        rows = np.arange(first, last)
        roles = np.full(last - first, _DROPPED)
        for target, kept in enumerate(self.bounds):
            roles[(rows >= kept.start) & (rows < kept.stop)] = target
        return roles


_Roles = dict[str, _Drawn | _Stretches]  # for every part


def _roles(source: Source, valid_fraction: float, seed: int, limit: int | None) -> _Roles:
    """Which split every row of every part goes to."""
    if limit is not None and limit < 1:
        raise UsageError(f"--limit: expected at least 1, found {limit}")
    sizes = {name: part.size for name, part in source.parts.items()}
    for part, size in sizes.items():
        if not size:
            raise UsageError(f"the source has no sample in its {part} split; expected at least 1")
    if source.task in CONSECUTIVE:
        return _consecutive(sizes, limit or max(sizes.values()))
    roles: _Roles = {}
    for number, (part, size) in enumerate(sizes.items()):
        kept = min(size, limit or size)
        held_out = _held_out(valid_fraction, kept) if part == "train" and valid_fraction else 0
        order = permute(key(seed, number, Stream.SPLIT), np.arange(kept), size)
        roles[part] = _Drawn(_drawn(order, size, held_out))
    return roles


def _consecutive(sizes: dict[str, int], limit: int) -> _Roles:
    """One stretch around the end of train: what validation leaves of its rows goes to test, so that there is no gap."""
    train, valid, test = (min(sizes.get(split, 0), limit) for split in SPLITS)
    of_valid = min(test, sizes.get("valid", 0) - valid)
    bounds = {
        "train": (range(sizes["train"] - train, sizes["train"]),),
        "valid": (range(valid), range(valid, valid + of_valid)),
        "test": (range(test - of_valid),),
    }
    return {part: _Stretches(bounds[part]) for part in sizes}


def _drawn(order: Array, size: int, held_out: int) -> Array:
    """Roles (size,) of which the rows in `order` are kept, the first of them for validation."""
    roles = np.full(size, _DROPPED, dtype=np.int8)
    roles[order] = 0
    roles[order[:held_out]] = 1
    return roles


def _held_out(fraction: float, kept: int) -> int:
    count = max(1, round(fraction * kept))
    if count >= kept:
        raise UsageError(
            f"--valid-fraction {fraction} of {kept} training samples is {count}, which leaves none to train on. "
            "Take a smaller fraction, or more samples."
        )
    return count


def _count(roles: _Roles, split: str) -> int:
    """Rows that go to a split, from whichever part."""
    return sum(roles[part].count(_TARGETS[part].index(split)) for part in roles if split in _TARGETS[part])


def _copy(
    source: Source,
    part: str,
    roles: _Roles,
    writer: DatasetWriter,
    progress: Progress,
    team: Team | None,
) -> None:
    """Checks and writes one part of the source."""
    names = list(source.parts)
    before = sum(source.parts[name].size for name in names[: names.index(part)])
    total = sum(known.size for known in source.parts.values())
    done = 0
    for block in all_blocks(source, part, team):
        count = len(block.arrays[FIELDS[source.task][0]])
        _check(block, len(source.names))
        where = roles[part].of(done, done + count)
        for index, split in enumerate(_TARGETS[part]):
            rows = where == index
            if rows.any():
                writer.append(split, {field: values[rows] for field, values in block.arrays.items()})
        done += count
        progress(before + done, total)
    _check_complete(source, part, done)


def _check(block: Block, classes: int) -> None:
    fault = fault_in(block.arrays, classes)
    if fault is not None:
        row, what = fault
        raise UsageError(
            f"{block.file}: sample {block.first + row} (from 0): {what}. Nothing was written; "
            "repair or remove the sample."
        )


def _check_complete(source: Source, part: str, done: int) -> None:
    expected = source.parts[part].size
    if done != expected:
        raise UsageError(
            f"{source.origin}: the {part} split ends early: expected {expected} rows, found {done}. "
            "Fetch the data again."
        )
