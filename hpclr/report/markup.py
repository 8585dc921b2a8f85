"""HTML and SVG, in which text from files is text: whatever is not `Markup` is escaped."""

import html
import os.path
from collections.abc import Sequence

from hpclr.output import printable


class Markup(str):
    """Text that is markup already; only `element`, `joined` and constants of this room make it."""

    __slots__ = ()


# Widths of characters in names, of 10.5 pixels, in DejaVu Sans, the widest of the usual fonts.
_NARROW, _NARROWEST = frozenset(" .,:;'|!ijlI()[]/-"), 4.2
_PLAIN, _USUAL = frozenset("abcdefghknopqrstuvxyz0123456789_"), 6.8
_WIDEST = 11.0
_BOUNDARIES = "/-_. "  # of words in names


def element(tag: str, *children: str | None, **attributes: object) -> Markup:
    """An element of HTML or SVG.

    Args:
        tag: its name.
        children: text, which is escaped, or `Markup`; None is left out.
        attributes: `class_` stands for `class`, an underscore for a hyphen (`text_anchor`); None is left out.
    """
    pairs = [
        f' {name.rstrip("_").replace("_", "-")}="{escaped(_number(value))}"'
        for name, value in attributes.items()
        if value is not None
    ]
    return Markup(f"<{tag}{''.join(pairs)}>{joined(*children)}</{tag}>")


def joined(*children: str | None) -> Markup:
    """Children one after the other, as in `element`."""
    return Markup("".join(child if isinstance(child, Markup) else escaped(child) for child in children if child))


def escaped(text: str) -> Markup:
    """Text as HTML and XML take it: without control characters, which XML does not have, nor ones that turn lines."""
    return Markup(html.escape(printable(text), quote=True))


def fitted(text: str, room: float) -> str:
    """As much of a name as there is room for: its beginning and its end, which is where names differ."""
    text = printable(text)
    if text_width(text) <= room:
        return text
    keep = min(len(text) - 1, int(room / _NARROWEST))
    while keep > 1 and text_width(text[: keep // 2]) + text_width(text[keep // 2 - keep :]) > room - _WIDEST:
        keep -= 1
    return f"{text[: keep // 2]}…{text[keep // 2 - keep :]}"


def told_apart(names: Sequence[str], room: float) -> list[str]:
    """Names without the words or directories that all begin with, if there is no room for one of them as it is."""
    common = os.path.commonprefix(list(names))  # noqa: RUF071 - letters are meant
    common = common[: min(map(len, names), default=0) - 1]  # something of each remains
    begin = max(map(common.rfind, _BOUNDARIES)) + 1
    if len(set(names)) < 2 or not begin or all(text_width(name) <= room for name in names):
        return list(names)
    return [f"…{name[begin:]}" for name in names]


def text_width(text: str) -> float:
    """Not less than what a name takes in a plot, in any of the usual fonts; in units of the plot."""
    return sum(_NARROWEST if c in _NARROW else _USUAL if c in _PLAIN else _WIDEST for c in text)


def _number(value: object) -> str:
    """Coordinates to a hundredth, which no screen shows better."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
