"""Bars that show what a whole is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpclr.report.axes import percent
from hpclr.report.canvas import WIDTH, Plot, colour, svg
from hpclr.report.lines import Words
from hpclr.report.markup import Markup, element, fitted, joined

_LEFT, _RIGHT = 10.0, 10.0
_TOP, _BAR, _EVERY = 64.0, 18.0, 58.0
# One after the other, lines this way or that, so that neighbours differ without colour.
_HATCHES = (None, "M-2 2l4 -4M0 8l8 -8M6 10l4 -4", "M0 4h8", "M-2 6l4 4M0 0l8 8M6 -2l4 4", "M4 0v8", "M0 4h8M4 0v8")


@dataclass(frozen=True)
class Bar:
    """A whole.

    Attributes:
        name: above it.
        parts: what it is made of; not negative.
    """

    name: str
    parts: Mapping[str, float]


def share_plot(words: Words, bars: Sequence[Bar]) -> Plot | None:
    """Draws bars of equal length, each with its shares in words below; None if there is none.

    Args:
        words: at the plot.
        bars: all with the same parts, in the same order.
    """
    bars = [bar for bar in bars if sum(bar.parts.values()) > 0]
    if not bars:
        return None
    kinds = list(bars[0].parts)
    said = "; ".join(f"{bar.name}: {_in_words(bar)}" for bar in bars[:20])
    picture = svg(
        words.name, words.title, f"{words.title}. {said}.", _TOP + _EVERY * len(bars),
        element("defs", *(_hatch(words.name, number) for number in range(len(kinds)))),
        _legend(words.name, kinds),
        *(_bar(words.name, bar, _TOP + number * _EVERY) for number, bar in enumerate(bars)),
    )  # fmt: skip
    rows = [(bar.name, kind, value) for bar in bars for kind, value in bar.parts.items()]
    return Plot(words.name, picture, ("run", "part", words.title), rows, words.note)


def _bar(plot: str, bar: Bar, top: float) -> Markup:
    total, x, drawn = sum(bar.parts.values()), _LEFT, []
    for number, value in enumerate(bar.parts.values()):
        width = value / total * (WIDTH - _LEFT - _RIGHT)
        drawn.append(_filled(plot, number, x, top + 5, width, _BAR))
        x += width
    name = element("text", fitted(bar.name, WIDTH - _LEFT - _RIGHT), x=_LEFT, y=top, class_="name")
    return joined(name, *drawn, element("text", _in_words(bar), x=_LEFT, y=top + _BAR + 18))


def _in_words(bar: Bar) -> str:
    total = sum(bar.parts.values())
    return " · ".join(f"{kind} {percent(round(value / total, 3))}" for kind, value in bar.parts.items())


def _legend(plot: str, kinds: Sequence[str]) -> Markup:
    width = (WIDTH - _LEFT - _RIGHT) / len(kinds)
    return joined(
        *(
            joined(
                _filled(plot, number, _LEFT + number * width, 31, 12, 12),
                element("text", kind, x=_LEFT + number * width + 17, y=41),
            )
            for number, kind in enumerate(kinds)
        )
    )


def _filled(plot: str, number: int, x: float, y: float, width: float, height: float) -> Markup:
    box = {"x": x, "y": y, "width": width, "height": height}
    plain = element("rect", class_=f"f{colour(number)}", **box)
    return plain if _HATCHES[number] is None else joined(plain, element("rect", fill=f"url(#{plot}-{number})", **box))


def _hatch(plot: str, number: int) -> Markup | None:
    path = _HATCHES[number]
    if path is None:
        return None
    return element(
        "pattern", element("path", d=path, class_="hatch"),
        id=f"{plot}-{number}", width=8, height=8, patternUnits="userSpaceOnUse",
    )  # fmt: skip
