"""What a check has found out: a line of the page."""

from typing import Literal

import msgspec

Level = Literal["ok", "warning", "failure"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "failure")


class Finding(msgspec.Struct, frozen=True):
    """A line.

    Attributes:
        level: a failure is what a run would fail by; a warning may cost time, or fail other runs.
        about: what was looked at, in a word or two.
        text: what was found.
        advice: what to do.
        same: what must be the same on all nodes, such as a version; "" if there is nothing.
        measured: numbers by name.
    """

    level: Level
    about: str
    text: str
    advice: str = ""
    same: str = ""
    measured: dict[str, float] = {}


def ok(about: str, text: str, *, same: str = "", measured: dict[str, float] | None = None) -> Finding:
    """Nothing is wrong."""
    return Finding("ok", about, text, same=same, measured=measured or {})


def warning(about: str, text: str, advice: str) -> Finding:
    """Something may cost time, or fail other runs."""
    return Finding("warning", about, text, advice)


def failure(about: str, text: str, advice: str) -> Finding:
    """A run would fail here."""
    return Finding("failure", about, text, advice)


def worst(levels: list[Level]) -> Level:
    """The worst of several levels; ok of none."""
    return max(levels, key=LEVELS.index, default="ok")
