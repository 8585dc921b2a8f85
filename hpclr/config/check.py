"""A document against the schema: a run file, or everything that is wrong with it at once."""

from __future__ import annotations

import difflib
import functools
import math
from typing import Any

import msgspec

from hpclr.config import describe
from hpclr.config.describe import Kind, show
from hpclr.config.schema import RunFile, Section
from hpclr.config.yaml12 import Document, Path
from hpclr.errors import UsageError

_MOST_FAULTS = 20
_WRONG: Any = object()


def check(document: Document) -> RunFile:
    """The document as a run file.

    Raises:
        UsageError: Names every fault with its place, its key, and what was expected and found.
    """
    checker = _Checker(document)
    found: RunFile = checker.section([RunFile], document.value, ())
    if not checker.faults:
        return found
    if len(checker.faults) == 1:
        raise UsageError(checker.faults[0])
    shown = checker.faults[:_MOST_FAULTS]
    more = len(checker.faults) - len(shown)
    shown += [f"and {more} more"] if more else []
    raise UsageError("\n".join([f"{len(checker.faults)} faults in {document.source}:", *shown]))


class _Checker:
    def __init__(self, document: Document) -> None:
        self.document = document
        self.faults: list[str] = []

    def fault(self, path: Path, text: str) -> Any:
        self.faults.append(f"{self.document.place(path)}: {text}")
        return _WRONG

    def value(self, annotation: Any, value: Any, path: Path) -> Any:
        kinds = describe.kinds(annotation)
        if kinds and isinstance(value, dict):
            return self.section(kinds, value, path)
        plain = describe.plain(annotation)
        try:
            if plain is not None and _is_finite(value):
                return msgspec.convert(value, plain)
        except msgspec.ValidationError:
            pass  # the schema says in words what is expected better than msgspec does
        return self.fault(
            path, f"{_dotted(path)} must be {describe.expected(annotation)}, found {_found(value, plain)}"
        )

    def section(self, kinds: list[Kind], section: dict[str, Any], path: Path) -> Any:
        kind = describe.choose(kinds, section)
        if kind is None:
            return self.fault(*_unknown_kind(kinds, section, path))
        before = len(self.faults)
        known = describe.fields(kind)
        for key in [key for key in section if key not in known]:
            self.fault((*path, key), _unknown_key(kind, section, (*path, key)))
        values = {
            key: self.value(field.type, section[key], (*path, key)) for key, field in known.items() if key in section
        }
        for key, field in known.items():
            if field.required and key not in section:
                self.fault(path, f"{_dotted((*path, key))} is missing; it must be {describe.expected(field.type)}")
        return _WRONG if len(self.faults) > before else self.construct(kind, values, path)

    def construct(self, kind: Kind, values: dict[str, Any], path: Path) -> Any:
        try:
            if issubclass(kind, Section):
                kind.check_given(values)
            return kind(**values)
        except ValueError as error:  # a fault between keys
            return self.fault(path, str(error))


def _is_finite(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _dotted(path: Path) -> str:
    return ".".join(str(key) if len(str(key)) < 60 and str(key).isidentifier() else show(key) for key in path)


def _found(value: Any, plain: Any) -> str:
    """The value, and the usual remedy where there is one."""
    if value is None:
        return "nothing (null)"
    if str in describe.members(plain) and isinstance(value, (bool, int, float)):
        return f"{show(value)}; put it in quotes to make it text"
    if plain is None and isinstance(value, str):
        return f"{show(value)}; write its keys below it, indented"
    return show(value)


def _unknown_kind(kinds: list[Kind], section: dict[str, Any], path: Path) -> tuple[Path, str]:
    key, _ = describe.tag(kinds[0])
    if key not in section:
        return path, f"{_dotted((*path, key))} is missing; give {describe.choices(kinds)}"
    names = [name for kind in kinds for name in describe.tag(kind)[1]]
    path = (*path, key)
    hint = _nearest(section[key], names)
    return path, f"{_dotted(path)} cannot be {show(section[key])}{hint}; give {describe.choices(kinds)}"


def _unknown_key(kind: Kind, section: dict[str, Any], path: Path) -> str:
    *above, key = path
    owner = " of the run file"
    if above:
        name, values = describe.tag(kind)
        owner = f" of {_dotted(tuple(above))}" + (f" with {name}: {section[name]}" if values else "")
    known = list(describe.fields(kind))
    hint = _nearest(key, known) or _elsewhere(path)
    return f"{_dotted(path)} is not a key{owner}{hint}; its keys are {', '.join(known)}"


def _nearest(word: Any, known: list[str]) -> str:
    close = difflib.get_close_matches(str(word).lower(), known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def _elsewhere(path: Path) -> str:
    """A hint at the section where a key belongs."""
    *_, key = path
    sections = [section for section in _sections_by_key().get(str(key), ()) if section != path[0]]
    full = " or ".join(f"{section}.{key}" for section in sections)
    return f" (did you mean {full}?)" if full else ""


@functools.cache
def _sections_by_key() -> dict[str, tuple[str, ...]]:
    owners: dict[str, tuple[str, ...]] = {}
    for section, field in describe.fields(RunFile).items():
        keys = {key: None for kind in describe.kinds(field.type) for key in describe.fields(kind)}
        owners.update({key: (*owners.get(key, ()), section) for key in keys})
    return owners
