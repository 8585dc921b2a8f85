"""Heat maps: a quantity of every layer over the steps."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from hpclr.report.axes import Axis, compact
from hpclr.report.canvas import TOP, WIDTH, Plot, bottom_axis, svg
from hpclr.report.lines import Words
from hpclr.report.markup import Markup, element, fitted, joined, told_apart
from hpclr.report.raster import level, picture
from hpclr.report.thinning import Point

MOST_ROWS = 1000  # layers; more cannot be told apart
_LEFT, _RIGHT = 158.0, 58.0
_PIXELS = 620  # columns of a row: two for each unit of the width
_ROW, _LEAST_AREA, _AREA = 15.0, 90.0, 330.0  # heights: of a row, and of all of them
_NAME_HEIGHT = 11.0
_BAR = 12.0  # width of the scale


@dataclass(frozen=True)
class Row:
    """A layer.

    Attributes:
        name: its name.
        points: steps and values; each holds until the next.
        frozen_at: the step of the check at which its basis was frozen first.
    """

    name: str
    points: Sequence[Point]
    frozen_at: float | None = None


def heat_map(words: Words, rows: Sequence[Row], last_step: int, scale: tuple[float, float]) -> Plot | None:
    """Draws layers from the first, above, to the last; None if there is nothing to draw.

    Args:
        words: at the plot.
        rows: in the order of the layers.
        last_step: to which the last values hold.
        scale: the values of the darkest and the lightest colour.
    """
    rows = [row for row in rows if row.points][:MOST_ROWS]
    if not rows:
        return None
    height = min(_AREA, max(_LEAST_AREA, len(rows) * _ROW))
    bottom, right = TOP + height, WIDTH - _RIGHT
    x = Axis(0.0, max(float(last_step), rows[-1].points[-1][0], 1.0), _LEFT, right)
    cells = element(
        "image", href=picture([_pixels(row.points, x, scale) for row in rows]), x=_LEFT, y=TOP, width=right - _LEFT,
        height=height, preserveAspectRatio="none", image_rendering="pixelated",
    )  # fmt: skip
    drawn = svg(
        words.name, words.title, _description(words, rows), bottom + 42,
        bottom_axis(x, bottom, bottom + 4, words.x, compact),
        cells,
        *_layers(words, rows, x, height / len(rows)),
        _scale(words, scale, right + 10, height),
    )  # fmt: skip
    numbers = [(row.name, *point, point[0] == row.frozen_at) for row in rows for point in row.points]
    return Plot(words.name, drawn, ("layer", "step", words.title, "frozen first here"), numbers, words.note)


def _pixels(points: Sequence[Point], x: Axis, scale: tuple[float, float]) -> bytes:
    """A row: each pixel has the value of the last check before it."""
    steps = [step for step, _ in points]
    width = (x.high - x.low) / _PIXELS
    places = [bisect_right(steps, x.low + width * (pixel + 0.5)) - 1 for pixel in range(_PIXELS)]
    return bytes(level(points[place][1] if place >= 0 else None, *scale) for place in places)


def _layers(words: Words, rows: Sequence[Row], x: Axis, height: float) -> list[Markup]:
    """Names, as many as there is room for, what a pointer is told, and where bases were frozen."""
    every = max(1, -int(-_NAME_HEIGHT // height))
    names = told_apart([row.name for row in rows], _LEFT - 8)
    return [
        joined(
            _name(row, names[number], TOP + (number + 0.5) * height) if number % every == 0 else None,
            _told(words, row, x, TOP + number * height, height),
            _frozen(row, x, TOP + (number + 0.5) * height, height),
        )
        for number, row in enumerate(rows)
    ]


def _name(row: Row, name: str, middle: float) -> Markup:
    shown = fitted(name, _LEFT - 8)
    return element("text", element("title", row.name), shown, x=_LEFT - 6, y=middle + 3.5, class_="name end")


def _told(words: Words, row: Row, x: Axis, top: float, height: float) -> Markup:
    title = f"{row.name}: {words.form(row.points[0][1])} to {words.form(row.points[-1][1])}{_since(row)}"
    return element(
        "rect", element("title", title), x=x.begin, y=top, width=x.end - x.begin, height=height, class_="over"
    )


def _frozen(row: Row, x: Axis, middle: float, height: float) -> Markup | None:
    if row.frozen_at is None or not x.low <= row.frozen_at <= x.high:
        return None
    return element("circle", cx=x.at(row.frozen_at), cy=middle, r=max(0.8, min(3.0, height / 3)), class_="frozen")


def _since(row: Row) -> str:
    return "" if row.frozen_at is None else f", frozen at step {row.frozen_at:,.0f}"


def _scale(words: Words, scale: tuple[float, float], left: float, height: float) -> Markup:
    """The colours and what they stand for."""
    axis = Axis(*scale, TOP + height, TOP)
    bar = picture([bytes([level(255 - number, 0, 255)]) for number in range(256)])
    labels = [element("text", words.form(tick), x=left + _BAR + 4, y=axis.at(tick) + 4) for tick in axis.ticks(5)]
    strip = element("image", href=bar, x=left, y=TOP, width=_BAR, height=height, preserveAspectRatio="none")
    return joined(strip, *labels)


def _description(words: Words, rows: Sequence[Row]) -> str:
    last = [(row.name, row.points[-1][1]) for row in rows]
    (low, least), (high, most) = min(last, key=itemgetter(1)), max(last, key=itemgetter(1))
    return (
        f"Heat map of {len(rows)} layers over {words.x}: {words.title}. At the end least in {low} "
        f"({words.form(least)}), most in {high} ({words.form(most)})."
    )
