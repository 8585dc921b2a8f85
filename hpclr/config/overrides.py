"""Overrides from the command line: `section.key=value`, laid over a document before it is checked."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpclr.config import describe, yaml12
from hpclr.config.schema import OIALR_AUTO, RunFile
from hpclr.config.yaml12 import Document, Path
from hpclr.errors import UsageError

# What a class of torch.optim still has a use for when an override changes the class. Of classes that
# are not named here nothing is assumed beyond the options that they all have.
_EVERY_OPTIMIZER = ("name", "lr", "weight_decay")
_OPTIMIZER_KEYS = {
    "sgd": ("momentum", "nesterov"),
    "rmsprop": ("momentum", "eps"),
    "adagrad": ("eps",),
    "adadelta": ("eps",),
    **dict.fromkeys(("adam", "adamw", "adamax", "nadam", "radam"), ("betas", "eps")),
}


@dataclass(frozen=True)
class Override:
    """One override.

    Attributes:
        path: The keys on the way to the value.
        document: The value, and how messages call the override.
    """

    path: tuple[str, ...]
    document: Document


def parse(text: str) -> Override:
    """Take `section.key=value` apart; the value is YAML.

    Raises:
        UsageError: It has no such form, or its value is no YAML.
    """
    source = f"override {text!r}"
    keys, equals, value = text.partition("=")
    path = tuple(keys.strip().split("."))
    if not equals or not all(path) or len(path) > yaml12.MAX_DEPTH:
        raise UsageError(f"{source} must have the form section.key=value, such as optimizer.lr=1e-3")
    return Override(path, yaml12.read(value, source))


def apply(document: Document, texts: Sequence[str]) -> Document:
    """The document with every override laid over it, the last one on top.

    Where an override changes what a section is (`method.name=dense`, `method.auto=true`), the document's own keys
    that mean nothing there any more are dropped first. An override below a plain value turns it into a section.

    Raises:
        UsageError: An override has not the right form, or the document has no sections.
    """
    overrides = [parse(text) for text in texts]
    root, places = copy.deepcopy(document.value), dict(document.places)
    for override in {override.path: override for override in overrides}.values():  # the last of each
        _drop_what_loses_its_meaning(root, override)
    for override in overrides:
        places = _places(root, places, override)
        *above, key = override.path
        _section(root, above)[key] = override.document.value
    return Document(root, places, document.source)


def _section(root: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The section at `path`, made where there is none."""
    for key in path:
        if not isinstance(root.get(key), dict):
            root[key] = {}
        root = root[key]
    return root


def _places(root: dict[str, Any], places: dict[Path, str], override: Override) -> dict[Path, str]:
    """The places once the override is applied: its value's and those of the sections it makes."""
    path = override.path
    kept = {other: place for other, place in places.items() if other[: len(path)] != path}
    above = [path[:end] for end in range(1, len(path))]
    made = [section for section in above if not isinstance(_find(root, section), dict)]
    return {**kept, **dict.fromkeys([*made, path], override.document.source)}


def _find(root: Any, path: Sequence[str]) -> Any:
    for key in path:
        root = root.get(key) if isinstance(root, dict) else None
    return root


def _drop_what_loses_its_meaning(root: dict[str, Any], override: Override) -> None:
    *above, key = override.path
    section = _find(root, above)
    if isinstance(section, dict):
        keep = _still_valid(above, section, key, override.document.value)
        for name in section.keys() - keep:
            del section[name]


def _still_valid(above: list[str], section: dict[str, Any], key: str, value: Any) -> set[str]:
    """The keys of `section` that stay when its `key` becomes `value`."""
    if above == ["optimizer"] and key == "name":
        return _valid_for_optimizer(section, str(value).lower())
    if above == ["method"] and key == "auto" and value is True:
        return section.keys() - OIALR_AUTO.keys()
    kinds = _kinds(above)
    new = describe.choose(kinds, {key: value}) if len(kinds) > 1 else None
    if new is None or new is describe.choose(kinds, section):
        return set(section)
    return set(describe.fields(new))


def _valid_for_optimizer(section: dict[str, Any], name: str) -> set[str]:
    if name == str(section.get("name", "adamw")).lower():
        return set(section)
    return {*_EVERY_OPTIMIZER, *_OPTIMIZER_KEYS.get(name, ())}


def _kinds(path: Sequence[str]) -> list[describe.Kind]:
    """The kinds of the section at `path` of a run file."""
    kinds: list[describe.Kind] = [RunFile]
    for key in path:
        fields = [describe.fields(kind).get(key) for kind in kinds]
        kinds = [found for field in fields if field for found in describe.kinds(field.type)]
    return kinds
