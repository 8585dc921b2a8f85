"""What all plots have: a title, axes with grid and ticks, names at the ends of lines, and the files to save."""

import base64
import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter

from hpclr.output import printable
from hpclr.report.axes import Axis
from hpclr.report.markup import Markup, element, fitted, joined, text_width, told_apart
from hpclr.report.style import COLOURS, DASHES, svg_css

WIDTH = 520.0  # of every plot, in its own units, which are pixels where there is room for them
TOP, BOTTOM = 48.0, 42.0  # room above and below the area in which is drawn
_LINE_HEIGHT = 13.0
_LONGEST_NAME = 110.0

Row = Sequence[object]


@dataclass(frozen=True)
class Plot:
    """A plot on a page.

    Attributes:
        name: of its files, and on the page; of letters, digits and hyphens.
        svg: the picture.
        header: the columns of its numbers.
        rows: the numbers, as drawn.
        note: what there is to know, below the picture.
    """

    name: str
    svg: Markup
    header: Sequence[str]
    rows: Sequence[Row]
    note: str = ""

    def svg_file(self) -> bytes:
        """The picture with its style, to be saved and put into papers."""
        style = Markup(f"<style>{svg_css()}</style>")
        head, _, rest = self.svg.partition(">")
        return f"{head}>{style}{rest}\n".encode()

    def csv_file(self) -> bytes:
        """The numbers; text that a spreadsheet would take for a formula gets an apostrophe."""
        content = io.StringIO()
        writer = csv.writer(content, lineterminator="\n")
        writer.writerows([_cell(value) for value in row] for row in (self.header, *self.rows))
        return content.getvalue().encode()


def data_uri(kind: str, content: bytes) -> str:
    """A file within a link."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def svg(name: str, title: str, description: str, height: float, *children: str | None) -> Markup:
    """A plot's picture, with the words for those who do not see it."""
    return element(
        "svg",
        element("title", title, id=f"{name}-title"),
        element("desc", description, id=f"{name}-desc"),
        element("text", title, x=8, y=20, class_="title"),
        *children,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH:g} {height:g}",
        width=f"{WIDTH:g}",
        height=f"{height:g}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )


def bottom_axis(axis: Axis, top: float, bottom: float, label: str, form: Callable[[float], str]) -> Markup:
    """Ticks, the lines of the grid and the label of a horizontal axis."""
    marks: list[Markup] = []
    for tick in axis.ticks():
        x = axis.at(tick)
        marks.append(element("path", d=f"M{x:.1f} {top:.1f}V{bottom:.1f}", class_="grid"))
        marks.append(element("text", form(tick), x=x, y=bottom + 15, class_="middle"))
    base = element("path", d=f"M{axis.begin:.1f} {bottom:.1f}H{axis.end:.1f}", class_="frame")
    middle = (axis.begin + axis.end) / 2
    return joined(*marks, base, element("text", label, x=middle, y=bottom + 32, class_="middle"))


def left_axis(axis: Axis, left: float, right: float, form: Callable[[float], str]) -> Markup:
    """Ticks and the lines of the grid of a vertical axis."""
    marks: list[Markup] = []
    for tick in axis.ticks():
        y = axis.at(tick)
        marks.append(element("path", d=f"M{left:.1f} {y:.1f}H{right:.1f}", class_="grid"))
        marks.append(element("text", form(tick), x=left - 6, y=y + 4, class_="end"))
    return joined(*marks)


def look(number: int, kind: str = "curve") -> dict[str, object]:
    """Colour and dashes of the line of a run, as attributes: no two of the first 28 are alike."""
    return {"class_": f"{kind} s{colour(number)}", "stroke_dasharray": DASHES[number // COLOURS % len(DASHES)]}


def colour(number: int) -> int:
    """The number of a run's colour."""
    return number % COLOURS


def end_names(names: Sequence[tuple[float, str, dict[str, object]]], x: float, low: float, high: float) -> Markup:
    """Names beside the ends of lines, moved apart where they would lie on one another.

    Args:
        names: y of the end, name and attributes of the line; of too many, every second, third or so is shown. Where
            they are too long, what all begin with is left out.
        x: where they begin.
        low: the least y.
        high: the greatest.
    """
    room = max(1, int((high - low) / _LINE_HEIGHT))
    short = told_apart([name for _, name, _ in names], _LONGEST_NAME)
    all_names = [(y, name, shown, attributes) for (y, name, attributes), shown in zip(names, short, strict=True)]
    placed = sorted(all_names[:: -(-len(names) // room)], key=itemgetter(0))
    drawn = [
        joined(
            element("path", d=f"M{x:.1f} {y:.1f}h12", **attributes),
            element("text", element("title", name), fitted(shown, _LONGEST_NAME), x=x + 16, y=y + 4, class_="name"),
        )
        for y, (_, name, shown, attributes) in zip(_apart([one[0] for one in placed], low, high), placed, strict=True)
    ]
    return joined(*drawn)


def names_width(names: Iterable[str]) -> float:
    """Room that `end_names` needs."""
    shown = told_apart(list(names), _LONGEST_NAME)
    return 28 + max((min(text_width(name), _LONGEST_NAME) for name in shown), default=0.0)


def _apart(places: Sequence[float], low: float, high: float) -> list[float]:
    """The places, in their order, each at least a line below the one before, and none outside."""
    down: list[float] = []
    for number, place in enumerate(places):
        last = high - (len(places) - 1 - number) * _LINE_HEIGHT
        least = down[-1] + _LINE_HEIGHT if down else low
        down.append(max(least, min(place, last)))
    return down


def _cell(value: object) -> object:
    if isinstance(value, str):
        text = printable(value)
        return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
    return f"{value:.10g}" if isinstance(value, float) else value
