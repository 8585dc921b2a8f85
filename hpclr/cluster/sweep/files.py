"""Files that describe several runs by another run file, and the runs that come of it."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import structs

from hpclr.config import RunFile, yaml12
from hpclr.config.check import check
from hpclr.config.describe import expected, show
from hpclr.config.overrides import apply, parse
from hpclr.config.schema import RunName
from hpclr.config.yaml12 import Document
from hpclr.errors import UsageError

MOST_POINTS = 10_000
LONGEST_NAME = 64
_MOST_FAULTS = 20

Asked = TypeVar("Asked")
Made = TypeVar("Made")


class Setting(NamedTuple):
    """A value for a key of the run file, and where it stands."""

    key: str
    value: Any
    place: str


@dataclass(frozen=True)
class Point:
    """One run of several.

    Attributes:
        run: its whole run file, with the name of its own.
        values: what tells it from the others: keys and their values, as the run file has them in the end.
    """

    run: RunFile
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the run and of its directory."""
        return self.run.name


def read_document(path: Path, what: str, form: str) -> Document:
    """The keys and values of a file.

    Args:
        path: the file.
        what: what it is called in messages.
        form: what such a file holds, for a message.

    Raises:
        UsageError: if it cannot be read, or holds no keys and values.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the {what} {path}: {getattr(error, 'strerror', None) or error}") from None
    document = yaml12.read(text, str(path))
    if not isinstance(document.value, dict):
        raise UsageError(f"{path} must hold keys and values, found {show(document.value)}; {form}")
    return document


def read_base(document: Document, path: Path) -> Document:
    """The run file that a file names with the key `run`.

    Raises:
        UsageError: if it names none, or one that cannot be read.
    """
    named = document.value.get("run")
    if not isinstance(named, str):
        raise wrong(document, ("run",), "the path of a run file, relative to this file", named)
    what = f"run file that {document.place(('run',))} names,"
    return read_document(path.parent / named, what, "a run file has sections such as model: and data:")


def wrong(document: Document, path: yaml12.Path, wanted: str, value: Any) -> UsageError:
    """The error for a value that is not what its key takes."""
    return UsageError(f"{document.place(path)}: {'.'.join(map(str, path))} must be {wanted}, found {show(value)}")


def name_in(document: Document, path: Path, what: str) -> str:
    """What the names of the runs begin with: the key `name`, else the name of the file.

    Raises:
        UsageError: if it cannot be part of a run's name.
    """
    name = document.value.get("name", path.stem)
    try:
        name = msgspec.convert(name, RunName)
    except msgspec.ValidationError:
        pass
    else:
        if len(name) <= LONGEST_NAME:
            return str(name)
    wanted = expected(RunName).replace("128", str(LONGEST_NAME))
    if "name" in document.value:
        raise wrong(document, ("name",), wanted, name)
    raise UsageError(f"{path}: the file's name becomes that of the {what}, which must be {wanted}; add `name:` to it")


def leaves(key: str, value: Any) -> list[str]:
    """The keys below a section that is given as a whole."""
    if not isinstance(value, dict) or not value:
        return [key]
    return [leaf for name, item in value.items() for leaf in leaves(f"{key}.{name}", item)]


def run_with(base: Document, settings: Sequence[Setting], name: str) -> RunFile:
    """The run file with these settings, checked; faults of a setting are said of the place where it stands.

    Raises:
        UsageError: with all faults.
    """
    for key, _, place in settings:
        if key == "name":
            raise UsageError(f"{place}: name cannot be varied: the runs get names of their own")
        if not all(key.split(".")) or "=" in key or key != key.strip():
            raise UsageError(f"{place}: {show(key)} must have the form section.key, such as optimizer.lr")
    texts = {f"{key}={yaml12.write(value)}": place for key, value, place in settings}
    places = {parse(text).document.source: place for text, place in texts.items()}
    laid = apply(base, [*texts, f"name={name}"])
    return _settled(
        check(replace(laid, places={path: places.get(place, place) for path, place in laid.places.items()}))
    )


def _settled(run: RunFile) -> RunFile:
    """A job reads weights by their absolute path, and a run goes on with the same one only, here or there."""
    if run.model.weights is None:
        return run
    return structs.replace(run, model=structs.replace(run.model, weights=os.path.abspath(run.model.weights)))


def all_of(asked: Sequence[Asked], make: Callable[[Asked], Made], source: str) -> list[Made]:
    """What is made of each.

    Raises:
        UsageError: with all faults of all of them, each once, and in how many of the runs it is.
    """
    made: list[Made] = []
    faults: dict[str, int] = {}
    for item in asked:
        try:
            made.append(make(item))
        except UsageError as error:
            for fault in _faults(error):
                faults[fault] = faults.get(fault, 0) + 1
    if not faults:
        return made
    shown = [f"{fault} (in {count} of {len(asked)} runs)" for fault, count in faults.items()]
    more = [f"and {len(shown) - _MOST_FAULTS} more"] if len(shown) > _MOST_FAULTS else []
    raise UsageError("\n".join([f"runs of {source} are wrong:", *shown[:_MOST_FAULTS], *more]))


def _faults(error: UsageError) -> list[str]:
    """Several come below a heading."""
    heading, *faults = str(error).split("\n")
    return faults or [heading]
