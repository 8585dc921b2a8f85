"""A sweep file, and the runs that it stands for.

Each run is the run file with some keys changed, checked as a whole; what is wrong is said of all runs at once.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import structs

from hpclr.cluster.sweep.files import (
    MOST_POINTS,
    Point,
    Setting,
    all_of,
    leaves,
    name_in,
    read_base,
    read_document,
    run_with,
    wrong,
)
from hpclr.cluster.sweep.names import run_name
from hpclr.config import RunFile
from hpclr.config.yaml12 import Document
from hpclr.errors import UsageError

_KEYS = ("run", "name", "grid", "list")
_FORM = (
    "a sweep file has `run:` with the path of a run file, and `grid:` with keys such as optimizer.lr and lists of "
    "their values, or `list:` with items such as {method.name: dense}, or both; and `name:` if it is to have another "
    "than the file's"
)


@dataclass(frozen=True)
class Sweep:
    """Runs that belong together, such as those of a sweep file, read and checked.

    Attributes:
        name: what the names of its runs begin with.
        points: its runs, each once; of a sweep file in its order: first the grid, then the list.
        command: what trains them.
    """

    name: str
    points: tuple[Point, ...]
    command: Literal["sweep", "compare"] = "sweep"

    @property
    def kind(self) -> str:
        """What they are together, for a person."""
        return "sweep" if self.command == "sweep" else "comparison"

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
    document = read_document(path, "sweep file", _FORM)
    _check_form(document)
    name = name_in(document, path, "sweep")
    base = read_base(document, path)
    points = all_of(_settings(document), lambda settings: _point(name, base, settings), document.source)
    return Sweep(name, _distinct(points, started))


def value_at(run: RunFile, key: str) -> Any:
    """The value that a run file has under `section.key`; None where it has no such key."""
    found = msgspec.to_builtins(run)
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _check_form(document: Document) -> None:
    """Whether each part is of its kind; what is in it the run file's schema judges."""
    value = document.value
    for key in value:
        if key not in _KEYS:
            raise UsageError(f"{document.place((key,))}: {key} is not a key of a sweep file; {_FORM}")
    if not value.get("grid") and not value.get("list"):
        raise UsageError(f"{document.source} says of no key what values it takes; {_FORM}")
    _check_grid(document, value.get("grid", {}))
    _check_list(document, value.get("list", []))


def _check_grid(document: Document, grid: Any) -> None:
    if not isinstance(grid, dict):
        raise wrong(document, ("grid",), "a section of keys such as optimizer.lr", grid)
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise wrong(document, ("grid", key), "a list of the values that the key takes", values)


def _check_list(document: Document, listed: Any) -> None:
    if not isinstance(listed, list):
        raise wrong(document, ("list",), "a list of items such as {method.name: dense}", listed)
    for index, item in enumerate(listed):
        if not isinstance(item, dict):
            raise wrong(document, ("list", index), "keys and values such as {method.name: dense}", item)


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
    run = run_with(base, settings, name)
    keys = [leaf for key, value, _ in settings for leaf in leaves(key, value)]
    values = {key: value_at(run, key) for key in keys}
    return Point(structs.replace(run, name=run_name(name, values)), values)


def _distinct(points: Sequence[Point], started: Callable[[str], bool]) -> tuple[Point, ...]:
    """Each run once, however it is written; of its names always the same one, whatever comes first."""
    groups: dict[bytes, list[Point]] = {}
    for point in points:
        groups.setdefault(msgspec.json.encode(structs.replace(point.run, name="run")), []).append(point)
    return tuple(min(group, key=lambda p: (not started(p.name), -len(p.values), p.name)) for group in groups.values())
