"""What changed between the run file of a run and the one it is asked to go on with."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import msgspec

from hpclr.config.describe import show
from hpclr.config.leaves import leaves
from hpclr.config.schema import RunFile

# Key, or section, and why a run may go on with another value of it.
FREE = {
    "data.path": "the file may have moved; that it is the same data is checked by its digest",
    "data.workers": "who reads the samples changes none of them",
    "data.prefetch": "nor does when",
    "data.stage": "nor does from which disk",
    "method.svd": "who decomposes changes rounding at most; heat is approximate, and chosen as such",
    "data.in_memory": "where the samples are held changes none of them",
    "train.device": "where the arithmetic is done; another device rounds differently and is warned about",
    "train.threads": "how it is shared out; another number rounds differently and is warned about",
    "validation": "validation reads the weights and changes none; `patience` only ends a run sooner or later",
    "checkpoint": "saving changes nothing that is saved",
    "parallel": "on how many processes and by which way makes rounding errors only",
    "track": "who is told of a run changes nothing in it",
    "slurm": "a run that leaves earlier or later goes on all the same",
}
MOVING = {
    "model.weights": "a file of the same name elsewhere: it may have moved, and the run has read it when it began",
}
GROWING = {
    "train.epochs": "a run may be made longer",
    "train.steps": "a run may be made longer",
}
_ABSENT = object()


def differences(stored: RunFile, asked: RunFile) -> list[str]:
    """The keys whose change would change what the run computes.

    Args:
        stored: The run file that the run was started with.
        asked: The one it is asked to go on with.

    Returns:
        A line a key, such as "train.seed: 0 in the run, 1 now"; empty if the run may go on.
    """
    return [
        line
        for section in stored.__struct_fields__
        for line in _differences(section, getattr(stored, section), getattr(asked, section))
    ]


def _differences(section: str, stored: Any, asked: Any) -> list[str]:
    if section in FREE:
        return []
    if type(stored) is not type(asked):  # another kind of model, schedule or method
        return [_line((section,), *(getattr(kind, kind.__struct_fields__[0]) for kind in (stored, asked)))]
    before, now = (leaves(msgspec.to_builtins(values), (section,)) for values in (stored, asked))
    paths = dict.fromkeys([*before, *now])
    pairs = [(path, before.get(path, _ABSENT), now.get(path, _ABSENT)) for path in paths]
    return [_line(*pair) for pair in pairs if repr(pair[1]) != repr(pair[2]) and not _allowed(*pair)]


def _line(path: tuple[str, ...], old: Any, new: Any) -> str:
    return f"{'.'.join(path)}: {_show(old)} in the run, {_show(new)} now"


def _allowed(path: tuple[str, ...], old: Any, new: Any) -> bool:
    key = ".".join(path)
    if key in GROWING:
        return isinstance(old, int) and isinstance(new, int) and new >= old
    if key in MOVING:
        return isinstance(old, str) and isinstance(new, str) and PurePath(old).name == PurePath(new).name
    return key in FREE or path[0] in FREE


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else show(value)
