"""A comparison: a run file with each of several methods, or a comparison file that says more of them."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from msgspec import structs

from hpclr.cluster.comparison.starts import DEFAULT_METHODS, method_names, starting_point
from hpclr.cluster.sweep.files import (
    LONGEST_NAME,
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
from hpclr.config import RunFile
from hpclr.config.check import check
from hpclr.config.describe import show
from hpclr.config.overrides import apply, parse
from hpclr.config.schema import Dense
from hpclr.config.yaml12 import Document
from hpclr.errors import UsageError

Equal = Literal["steps", "time", "flops"]

_KEYS = ("run", "name", "seeds", "equal", "methods")
_FORM = (
    "a comparison file has `run:` with the path of a run file, and `methods:` with labels and, below each, keys of "
    "that method such as cutoff: 0.1, `name:` of the method if the label is none, and `set:` with other keys of the "
    "run file such as optimizer.lr; and `seeds:`, `equal:` and `name:`"
)
_SEED = "train.seed"
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")  # with a name of 64, a run's name has 128 characters at most
_RESERVED = ("-time", "-flops")  # ends of names of runs with another's budget


class Wanted(NamedTuple):
    """What the command line says; None: nothing."""

    methods: Sequence[str] | None = None
    seeds: int | None = None
    equal: Equal | None = None
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class Comparison:
    """Runs to be compared, read and checked.

    Attributes:
        name: what the names of its runs begin with.
        equal: what the methods have in common.
        entries: runs at equal steps by the label of their method, one a seed, of which all have the same.
    """

    name: str
    equal: Equal
    entries: Mapping[str, tuple[Point, ...]]

    @property
    def reference(self) -> str | None:
        """The label of what others are compared with: `dense`, else the first that is; None if there is none."""
        dense = [label for label, points in self.entries.items() if isinstance(points[0].run.method, Dense)]
        return "dense" if "dense" in dense else next(iter(dense), None)


class _Entry(NamedTuple):
    """A method under a label, and what is said of it."""

    label: str
    method: str
    place: str
    settings: Sequence[Setting]


def load_comparison(path: Path, wanted: Wanted) -> Comparison:
    """Reads a comparison file and the run file that it names, or a run file alone.

    Args:
        path: either of them.
        wanted: what the command line says, which counts before what a comparison file says.

    Raises:
        UsageError: one of them cannot be read or is wrong, or a run that they describe is; names all that is wrong.
    """
    document = read_document(path, "file", "a comparison is made of a run file or a comparison file")
    is_run_file = {"run", "methods"}.isdisjoint(document.value)
    described = _of_run_file(document, wanted) if is_run_file else _checked(document)
    base = apply(document if is_run_file else read_base(document, path), wanted.overrides)
    run = check(base)
    named = is_run_file or any(parse(text).path == ("name",) for text in wanted.overrides)
    name = _short(run.name, base) if named else name_in(document, path, "comparison")
    entries = _chosen([_entry(described, label) for label in described.value["methods"]], wanted.methods)
    seeds = range(run.train.seed, run.train.seed + (wanted.seeds or _seeds(described)))
    asked = _each(entries, seeds, document)
    points = iter(all_of(asked, lambda one: _point(name, base, run, *one), document.source))
    found = {entry.label: tuple(itertools.islice(points, len(seeds))) for entry in entries}
    comparison = Comparison(name, wanted.equal or described.value.get("equal", "steps"), found)
    _check_budget(comparison)
    return comparison


def _of_run_file(document: Document, wanted: Wanted) -> Document:
    """The comparison file that a run file stands for."""
    return Document({"methods": dict.fromkeys(wanted.methods or DEFAULT_METHODS)}, {}, document.source)


def _checked(document: Document) -> Document:
    """Whether each part is of its kind; what is in it the run file's schema judges."""
    for key in document.value:
        if key not in _KEYS:
            raise UsageError(f"{document.place((key,))}: {key} is not a key of a comparison file; {_FORM}")
    methods = document.value.get("methods")
    if not isinstance(methods, dict) or not methods:
        raise wrong(document, ("methods",), "a section with a label for each method", methods)
    equal = document.value.get("equal", "steps")
    if equal not in get_args(Equal):
        raise wrong(document, ("equal",), f"one of {', '.join(get_args(Equal))}", equal)
    return document


def _seeds(document: Document) -> int:
    """Bools are whole numbers to Python, and to nobody else."""
    seeds = document.value.get("seeds", 3)
    if type(seeds) is not int or seeds < 1:
        raise wrong(document, ("seeds",), "a whole number >= 1, how many runs each method has", seeds)
    return seeds


def _short(name: str, base: Document) -> str:
    if len(name) > LONGEST_NAME:
        raise UsageError(
            f"{base.place(('name',))}: name has {len(name)} characters; in a comparison, whose runs add to it, it may "
            f"have {LONGEST_NAME}. Give a shorter one, with name=…"
        )
    return name


def _entry(document: Document, label: str) -> _Entry:
    path, section = ("methods", label), document.value["methods"][label]
    if not _LABEL.fullmatch(label) or label.endswith(_RESERVED):
        form = f"at most 32 letters, digits, '.', '_' and '-', not ending in {' or '.join(_RESERVED)}"
        raise wrong(document, path, f"called by a label of {form}", label)
    section = {} if section is None else section
    if not isinstance(section, dict):
        raise wrong(document, path, "a section of the method's keys, {} if there are none", section)
    others = section.get("set", {})
    if not isinstance(others, dict):
        raise wrong(document, (*path, "set"), "a section of other keys of the run file such as optimizer.lr", others)
    own = {key: value for key, value in section.items() if key not in ("name", "set")}
    keys = [Setting(f"method.{key}", value, document.place((*path, key))) for key, value in own.items()]
    more = [Setting(key, value, document.place((*path, "set", key))) for key, value in others.items()]
    return _Entry(label, _method(document, label, section), document.place(path), [*keys, *more])


def _method(document: Document, label: str, section: Mapping[str, Any]) -> str:
    method = section.get("name", label)
    if method in method_names():
        return str(method)
    path = ("methods", label, *(["name"] if "name" in section else []))
    raise UsageError(
        f"{document.place(path)}: {'.'.join(path)}: {show(method)} is no method, which are "
        f"{', '.join(method_names())}. Which one it is, `name:` below a label says."
    )


def _chosen(entries: Sequence[_Entry], labels: Sequence[str] | None) -> list[_Entry]:
    """Those that the command line names, in its order."""
    known = {entry.label: entry for entry in entries}
    for label in labels or ():
        if label not in known:
            raise UsageError(f"--methods: there is no {label!r}; give some of {', '.join(known)}, with commas between")
    return [known[label] for label in dict.fromkeys(labels or known)]


def _each(entries: Sequence[_Entry], seeds: Sequence[int], document: Document) -> list[tuple[_Entry, int]]:
    count = len(entries) * len(seeds)
    if count > MOST_POINTS:
        raise UsageError(f"{document.source} stands for {count} runs, expected at most {MOST_POINTS}")
    return list(itertools.product(entries, seeds))


def _point(name: str, base: Document, run: RunFile, entry: _Entry, seed: int) -> Point:
    """The run of a method with a seed; the run file's own method keeps its settings, others get a starting point."""
    settings = [*entry.settings]
    for setting in settings:
        _check_setting(setting)
    if entry.method != run.method.name:
        auto = any(setting.key == "method.auto" and setting.value is True for setting in settings)
        start = starting_point(entry.method, base.value.get("method", {}), auto=auto)
        settings.insert(0, Setting("method", start, entry.place))
    point = run_with(base, [*settings, Setting(_SEED, seed, "")], f"{name}-{entry.label}-seed-{seed}")
    return Point(point, {"label": entry.label, _SEED: seed})


def _check_setting(setting: Setting) -> None:
    """What methods have in common none of them sets."""
    for key in leaves(setting.key, setting.value):
        if key == _SEED:
            common = "all methods have the same seeds"
        elif key in ("train.steps", "train.epochs"):
            common = "all methods begin with the same length, which the run file says"
        elif key.startswith("data."):
            common = "methods are compared on the same data, read in the same way"
        else:
            continue
        raise UsageError(f"{setting.place}: {key} cannot be set here: {common}")


def with_budget(point: Point, name: str, kind: Equal, steps: int) -> Point:
    """The same run in another number of steps.

    Args:
        point: at equal steps.
        name: of the comparison.
        kind: whose budget it has: time or flops.
        steps: how many.
    """
    label, seed = point.values["label"], point.values[_SEED]
    train = structs.replace(point.run.train, steps=steps, epochs=None)
    run = structs.replace(point.run, name=f"{name}-{label}-{kind}-seed-{seed}", train=train)
    return Point(run, {**point.values, "equal": kind})


def _check_budget(comparison: Comparison) -> None:
    """Whether others can have dense's budget."""
    if comparison.equal == "steps":
        return
    if comparison.reference is None:
        raise UsageError(
            f"equal {comparison.equal} means as much as dense training takes, but dense is not among the methods: "
            f"{', '.join(comparison.entries)}. Add it."
        )
    tired = [label for label, points in comparison.entries.items() if points[0].run.validation.patience is not None]
    if tired:
        raise UsageError(
            f"validation.patience ends runs when it sees fit, so that they cannot be given equal {comparison.equal}: "
            f"{', '.join(tired)}. Set it to null, with validation.patience=null."
        )
