"""A sweep file, and the runs that it stands for.

Each run is the run file with some keys changed, checked as a whole; what is wrong is said of all runs at once.
"""

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import structs

from hpclr.cluster.sweep.names import run_name
from hpclr.config import RunFile, yaml12
from hpclr.config.check import check
from hpclr.config.describe import expected, show
from hpclr.config.overrides import apply, parse
from hpclr.config.schema import RunName
from hpclr.config.yaml12 import Document
from hpclr.errors import UsageError

MOST_POINTS = 10_000
_MOST_FAULTS = 20
_LONGEST_NAME = 64
_KEYS = ("run", "name", "grid", "list")
_FORM = (
    "a sweep file has `run:` with the path of a run file, and `grid:` with keys such as optimizer.lr and lists of "
    "their values, or `list:` with items such as {method.name: dense}, or both; and `name:` if it is to have another "
    "than the file's"
)


class Setting(NamedTuple):
    """A value for a key of the run file, and where it stands."""

    key: str
    value: Any
    place: str


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        run: its whole run file, with the name of its own.
        values: what the sweep says of it: keys and their values, as the run file has them in the end.
    """

    run: RunFile
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the run and of its directory."""
        return self.run.name


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read and checked.

    Attributes:
        name: what the names of its runs begin with.
        points: its runs, each once, in the order of the file: first the grid, then the list.
    """

    name: str
    points: tuple[Point, ...]

    @property
    def keys(self) -> list[str]:
        """The keys that it is about."""
        return list(dict.fromkeys(key for point in self.points for key in point.values))


def load_sweep(path: Path, started: Callable[[str], bool]) -> Sweep:
    """Reads a sweep file and the run file that it names.

    Args:
        path: the sweep file.
        started: whether there is a run of this name. Where a point is written in two ways, which would give it two
            names, it keeps the one under which it was started.

    Raises:
        UsageError: one of them cannot be read or is wrong, or a run that they describe is; names all that is wrong.
    """
    document = _read(path, "sweep file")
    _check_form(document)
    name = _name(document, path)
    named = document.value["run"]
    base = _read(path.parent / named, f"run file that {document.place(('run',))} names,")
    return Sweep(name, _distinct(_points(name, base, document), started))


def value_at(run: RunFile, key: str) -> Any:
    """The value that a run file has under `section.key`; None where it has no such key."""
    found = msgspec.to_builtins(run)
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _read(path: Path, what: str) -> Document:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the {what} {path}: {getattr(error, 'strerror', None) or error}") from None
    document = yaml12.read(text, str(path))
    if not isinstance(document.value, dict):
        raise UsageError(f"{path} must hold keys and values, found {show(document.value)}; {_FORM}")
    return document


def _check_form(document: Document) -> None:
    """Whether each part is of its kind; what is in it the run file's schema judges."""
    value = document.value
    for key in value:
        if key not in _KEYS:
            raise UsageError(f"{document.place((key,))}: {key} is not a key of a sweep file; {_FORM}")
    if not isinstance(value.get("run"), str):
        raise _wrong(document, ("run",), "the path of a run file, relative to this file", value.get("run"))
    if not value.get("grid") and not value.get("list"):
        raise UsageError(f"{document.source} says of no key what values it takes; {_FORM}")
    _check_grid(document, value.get("grid", {}))
    _check_list(document, value.get("list", []))


def _check_grid(document: Document, grid: Any) -> None:
    if not isinstance(grid, dict):
        raise _wrong(document, ("grid",), "a section of keys such as optimizer.lr", grid)
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise _wrong(document, ("grid", key), "a list of the values that the key takes", values)


def _check_list(document: Document, listed: Any) -> None:
    if not isinstance(listed, list):
        raise _wrong(document, ("list",), "a list of items such as {method.name: dense}", listed)
    for index, item in enumerate(listed):
        if not isinstance(item, dict):
            raise _wrong(document, ("list", index), "keys and values such as {method.name: dense}", item)


def _wrong(document: Document, path: yaml12.Path, wanted: str, value: Any) -> UsageError:
    return UsageError(f"{document.place(path)}: {'.'.join(map(str, path))} must be {wanted}, found {show(value)}")


def _name(document: Document, path: Path) -> str:
    name = document.value.get("name", path.stem)
    try:
        name = msgspec.convert(name, RunName)
    except msgspec.ValidationError:
        pass
    else:
        if len(name) <= _LONGEST_NAME:
            return str(name)
    wanted = expected(RunName).replace("128", str(_LONGEST_NAME))
    if "name" in document.value:
        raise _wrong(document, ("name",), wanted, name)
    raise UsageError(f"{path}: the file's name becomes that of the sweep, which must be {wanted}; add `name:` to it")


def _points(name: str, base: Document, document: Document) -> list[Point]:
    """All points, also those that are equal.

    Raises:
        UsageError: with all faults of all points.
    """
    points: list[Point] = []
    faults: dict[str, int] = {}
    settings = _settings(document)
    for point in settings:
        try:
            points.append(_point(name, base, point))
        except UsageError as error:
            for fault in _faults(error):
                faults[fault] = faults.get(fault, 0) + 1
    if not faults:
        return points
    shown = [f"{fault} (in {count} of {len(settings)} runs)" for fault, count in faults.items()]
    more = [f"and {len(shown) - _MOST_FAULTS} more"] if len(shown) > _MOST_FAULTS else []
    raise UsageError("\n".join([f"runs of {document.source} are wrong:", *shown[:_MOST_FAULTS], *more]))


def _settings(document: Document) -> list[list[Setting]]:
    """What each point sets: the grid's every combination, then the list's items."""
    grid, listed = document.value.get("grid", {}), document.value.get("list", [])
    count = (math.prod(map(len, grid.values())) if grid else 0) + len(listed)
    if count > MOST_POINTS:
        raise UsageError(f"{document.source} stands for {count} runs, expected at most {MOST_POINTS}")
    axes = [[Setting(key, value, document.place(("grid", key))) for value in values] for key, values in grid.items()]
    items = [
        [Setting(key, value, document.place(("list", index, key))) for key, value in item.items()]
        for index, item in enumerate(listed)
    ]
    return [*(list(point) for point in itertools.product(*axes) if point), *items]


def _point(name: str, base: Document, settings: Sequence[Setting]) -> Point:
    """The run file with these settings; faults of a setting are said of its place in the sweep file."""
    for key, _, place in settings:
        if key == "name":
            raise UsageError(f"{place}: name cannot be varied: the runs of a sweep get names of their own")
        if not all(key.split(".")) or "=" in key or key != key.strip():
            raise UsageError(f"{place}: {show(key)} must have the form section.key, such as optimizer.lr")
    texts = {f"{key}={yaml12.write(value)}": place for key, value, place in settings}
    places = {parse(text).document.source: place for text, place in texts.items()}
    laid = apply(base, [*texts, f"name={name}"])
    run = check(replace(laid, places={path: places.get(place, place) for path, place in laid.places.items()}))
    keys = [leaf for key, value, _ in settings for leaf in _leaves(key, value)]
    values = {key: value_at(run, key) for key in keys}
    return Point(structs.replace(_settled(run), name=run_name(name, values)), values)


def _settled(run: RunFile) -> RunFile:
    """A job reads weights by their absolute path, and a run goes on with the same one only, here or there."""
    if run.model.weights is None:
        return run
    return structs.replace(run, model=structs.replace(run.model, weights=os.path.abspath(run.model.weights)))


def _leaves(key: str, value: Any) -> list[str]:
    """The keys below a section that is given as a whole."""
    if not isinstance(value, dict) or not value:
        return [key]
    return [leaf for name, item in value.items() for leaf in _leaves(f"{key}.{name}", item)]


def _faults(error: UsageError) -> list[str]:
    """Several come below a heading."""
    heading, *faults = str(error).split("\n")
    return faults or [heading]


def _distinct(points: Sequence[Point], started: Callable[[str], bool]) -> tuple[Point, ...]:
    """Each run once, however it is written; of its names always the same one, whatever comes first."""
    groups: dict[bytes, list[Point]] = {}
    for point in points:
        groups.setdefault(msgspec.json.encode(structs.replace(point.run, name="run")), []).append(point)
    return tuple(min(group, key=lambda p: (not started(p.name), -len(p.values), p.name)) for group in groups.values())
