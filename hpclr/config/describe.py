"""The schema in words: what a key expects, which kinds a section comes in, how a value is shown."""

from __future__ import annotations

import functools
import operator
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_LONGEST = 60

Kind = type[msgspec.Struct]


def bare(annotation: Any) -> tuple[Any, list[msgspec.Meta]]:
    """An annotation without its `Annotated`, and what that said."""
    metas: list[msgspec.Meta] = []
    while get_origin(annotation) is Annotated:
        annotation, *found = get_args(annotation)
        metas = [*found, *metas]
    return annotation, metas


def members(annotation: Any) -> list[Any]:
    """The alternatives of a union; the annotation itself where there is but one."""
    annotation, _ = bare(annotation)
    return list(get_args(annotation)) if get_origin(annotation) in (Union, types.UnionType) else [annotation]


def kinds(annotation: Any) -> list[Kind]:
    """The classes of sections that a key accepts."""
    return [kind for kind in members(annotation) if isinstance(kind, type) and issubclass(kind, msgspec.Struct)]


def plain(annotation: Any) -> Any:
    """What a key accepts besides sections; None if nothing."""
    if not kinds(annotation):
        return annotation
    found = [member for member in members(annotation) if member not in kinds(annotation)]
    return functools.reduce(operator.or_, found) if found else None


def fields(kind: Kind) -> dict[str, msgspec.structs.FieldInfo]:
    """The keys of a section."""
    return {field.name: field for field in msgspec.structs.fields(kind)}


def tag(kind: Kind) -> tuple[str, tuple[str, ...]]:
    """The key that tells this kind from its siblings and the values it may have; none: any value."""
    name, field = next(iter(fields(kind).items()))
    annotation, _ = bare(field.type)
    return name, get_args(annotation) if get_origin(annotation) is Literal else ()


def choose(among: list[Kind], section: dict[str, Any]) -> Kind | None:
    """The kind that a section is of, None if it is of none."""
    if len(among) == 1:
        return among[0]
    for kind in among:
        key, values = tag(kind)
        if key in section and (not values or section[key] in values):
            return kind
    return None


def choices(among: list[Kind]) -> str:
    """What to write to choose a kind, such as "name: one of dense, oialr"."""
    key, _ = tag(among[0])
    names = [name for kind in among for name in tag(kind)[1]]
    free = [fields(kind)[tag(kind)[0]] for kind in among if not tag(kind)[1]]
    others = [f"{field.name}: {expected(field.type)}" for field in free]
    return ", or ".join([f"{key}: one of {', '.join(names)}", *others])


def meaning(annotation: Any) -> str:
    """The description of a key."""
    return next(meta.description for meta in reversed(bare(annotation)[1]) if meta.description)


def expected(annotation: Any) -> str:
    """What a key accepts, such as "a whole number >= 1 or null"."""
    annotation, metas = bare(annotation)
    title = next((meta.title for meta in metas if meta.title), None)
    if title:
        return title
    if kinds(annotation):
        words = [expected(plain(annotation))] if plain(annotation) is not None else []
        return ", or ".join([*words, _expected_section(kinds(annotation))])
    if len(members(annotation)) > 1:
        return " or ".join(map(expected, members(annotation)))
    return _expected_value(annotation, metas)


def _expected_section(among: list[Kind]) -> str:
    if len(among) > 1:
        return f"a section with {choices(among)}"
    known = fields(among[0])
    needed = [name for name, field in known.items() if field.required]
    return f"a section with {', '.join(needed)}" if needed else f"a section with keys such as {next(iter(known))}"


def _expected_value(annotation: Any, metas: list[msgspec.Meta]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(arguments)}" if len(arguments) > 1 else str(arguments[0])
    if origin is tuple:
        return _expected_list(arguments)
    if origin is dict:
        return "a section of any keys"
    return f"{_WORDS[annotation]}{_bounds(metas)}"


def _expected_list(arguments: tuple[Any, ...]) -> str:
    if arguments[-1] is Ellipsis:
        return f"a list (each item {expected(arguments[0])})"
    return f"a list of {len(arguments)} items (each {expected(arguments[0])})"


def _bounds(metas: list[msgspec.Meta]) -> str:
    found = [(sign, getattr(meta, bound)) for meta in metas for bound, sign in _BOUNDS.items()]
    return " and".join(f" {sign} {limit:g}" for sign, limit in found if limit is not None)


def show(value: Any) -> str:
    """A value in a message: as it would stand in the run file, at most one short line."""
    if isinstance(value, dict):
        text = f"a section with the keys {', '.join(map(str, value))}" if value else "an empty section"
    elif isinstance(value, (list, tuple)):
        text = f"[{', '.join(map(show, value))}]"
    elif value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    else:
        text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
