"""What a dataset file must look like, checked by its names, shapes and types alone."""

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from hpclr.data.layout import (
    DTYPES,
    EXPECTED,
    FIELDS,
    FORMAT,
    NAMES,
    RANKS,
    SPLITS,
    STATISTICS,
    VERSION,
    decode_json,
    text,
)
from hpclr.errors import UsageError


def task_of(path: Path, file: h5py.File) -> str:
    """What a file is for: "classification", "forecasting" or "language".

    Raises:
        UsageError: if it is no dataset file.
    """
    found = {name: text(file.attrs.get(name, "missing")) for name in ("format", "version", "task")}
    if found["format"] != FORMAT or found["version"] != str(VERSION) or found["task"] not in FIELDS:
        raise UsageError(
            f"{path}: expected the root attributes format='{FORMAT}', version={VERSION}, "
            f"task={' or '.join(map(repr, FIELDS))}, found {found}. "
            "Write the file with `hpclr data prepare`, or as docs/data.md says."
        )
    return found["task"]


def check_structure(path: Path, file: h5py.File, task: str) -> None:
    """Refuses a file whose datasets are not those of its task, or do not fit one another.

    Raises:
        UsageError: naming every part that is missing or malformed.
    """
    problems = [problem for split in SPLITS for problem in _split_problems(file, split, task)]
    problems += _names_problems(file, task)
    if not problems:
        problems = _agreement_problems(file, task)
    if problems:
        raise UsageError(
            f"{path}: not a usable dataset: {'; '.join(problems)}. Expected: {EXPECTED[task]}. "
            "Write the file with `hpclr data prepare`, or as docs/data.md says."
        )


def _split_problems(file: h5py.File, split: str, task: str) -> Iterator[str]:
    if split not in file:
        if split != "valid":
            yield f"/{split} is missing"
        return
    for field in FIELDS[task]:
        yield from _field_problems(file, f"{split}/{field}", field)


def _field_problems(file: h5py.File, name: str, field: str) -> Iterator[str]:
    found = _dataset(file, name)
    if found is None:
        yield f"/{name} is missing"
        return
    if found.ndim not in RANKS[field]:
        yield f"/{name} has {found.ndim} dimensions, expected {' or '.join(map(str, RANKS[field]))}"
    elif not found.size:
        yield f"/{name} is empty, its shape is {found.shape}"
    if str(found.dtype) not in DTYPES[field]:
        yield f"/{name} is {found.dtype}, expected {' or '.join(DTYPES[field])}"


def _names_problems(file: h5py.File, task: str) -> Iterator[str]:
    for statistic in STATISTICS[task]:
        found = _dataset(file, statistic)
        if found is None or found.ndim != 1 or found.dtype.kind != "f":
            yield f"/{statistic} {_is_what(found)}, expected (C,) float64"
    name = NAMES[task]
    found = _dataset(file, name)
    if found is None or found.dtype != np.uint8:
        yield f"/{name} {_is_what(found)}, expected the bytes of a JSON list"
    elif not _is_list_of_names(found):
        yield f"/{name} is not the JSON text of a list of at least one string"


def _is_what(found: h5py.Dataset | None) -> str:
    return "is missing" if found is None else f"is {found.shape} {found.dtype}"


def _is_list_of_names(found: h5py.Dataset) -> bool:
    try:
        names = decode_json(found[...])
    except ValueError:
        return False
    return isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)


def _agreement_problems(file: h5py.File, task: str) -> list[str]:
    """What is wrong between datasets each of which is right."""
    field = FIELDS[task][0]
    first = file["train"][field]
    problems = []
    for split in (split for split in SPLITS if split in file):
        rows = file[split][field]
        if rows.shape[1:] != first.shape[1:] or rows.dtype != first.dtype:
            problems.append(
                f"/{split}/{field} has samples {rows.shape[1:]} {rows.dtype}, "
                f"/train/{field} has {first.shape[1:]} {first.dtype}"
            )
        if "y" in FIELDS[task] and len(file[split]["y"]) != len(rows):
            problems.append(f"/{split}/{field} has {len(rows)} samples but /{split}/y {len(file[split]['y'])} labels")
    if STATISTICS[task]:
        problems += _statistics_problems(file, first.shape[1])
    if task == "forecasting" and (count := len(decode_json(file["columns"][...]))) != first.shape[1]:
        problems.append(f"/columns has {count} names, /train/series has {first.shape[1]} columns")
    return problems


def _statistics_problems(file: h5py.File, channels: int) -> Iterator[str]:
    for name in ("mean", "std"):
        values = file[name][...]
        if values.shape != (channels,):
            yield f"/{name} has {len(values)} values, expected one for each of the {channels} channels"
        elif not np.isfinite(values).all() or (name == "std" and (values <= 0).any()):
            above = ", each above 0" if name == "std" else ""
            yield f"/{name} must hold finite numbers{above}, found {values.tolist()}"


def _dataset(file: h5py.File, name: str) -> h5py.Dataset | None:
    found = file.get(name)
    return found if isinstance(found, h5py.Dataset) else None
