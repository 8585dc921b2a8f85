"""Plots of lines: quantities over steps or time, spectra, and points of runs."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpclr.report.axes import Axis, axis_over, compact
from hpclr.report.canvas import (
    BOTTOM,
    TOP,
    WIDTH,
    Plot,
    bottom_axis,
    colour,
    end_names,
    left_axis,
    look,
    names_width,
    svg,
)
from hpclr.report.markup import Markup, element, joined
from hpclr.report.thinning import Point, averaged, thinned

_HEIGHT = 300.0
_LEFT = 54.0
_COLUMNS = 360  # to which long series are thinned: about one a pixel
_MEANS = 60  # of noisy series
_FEW = 24  # points, which are shown as such


@dataclass(frozen=True)
class Mark:
    """Where another attempt goes on.

    Attributes:
        at: x.
        text: beside it.
        title: what it is, for who points at it.
    """

    at: float
    text: str
    title: str


@dataclass(frozen=True)
class Line:
    """A line of a plot.

    Attributes:
        name: at its end, and in the numbers.
        points: in the order of x.
        number: of its look.
        marks: the attempts.
        noisy: draw its values pale, and the means of sixty parts of the plot's width over them.
        colour: instead of that of its look.
    """

    name: str
    points: Sequence[Point]
    number: int = 0
    marks: Sequence[Mark] = ()
    noisy: bool = False
    colour: str | None = None

    @property
    def look(self) -> dict[str, object]:
        """Attributes of its path."""
        return look(self.number) if self.colour is None else {"class_": "curve", "stroke": self.colour}

    @property
    def has_means(self) -> bool:
        """Whether it is shown by means, too."""
        return self.noisy and len(self.points) > 2 * _MEANS


@dataclass(frozen=True)
class Words:
    """What stands at a plot.

    Attributes:
        name: as `Plot.name`.
        title: above it, with the unit.
        x: label of the horizontal axis.
        note: as `Plot.note`.
        form: how values are written at the vertical axis.
    """

    name: str
    title: str
    x: str
    note: str = ""
    form: Callable[[float], str] = compact


def line_plot(
    words: Words,
    lines: Sequence[Line],
    *,
    from_zero: bool = False,
    apart_at_marks: bool = False,
    guide: float | None = None,
) -> Plot | None:
    """Draws lines that have points; None if none has.

    Args:
        words: at the plot.
        lines: in the order of their looks.
        from_zero: let the vertical axis begin at zero; else it may be logarithmic.
        apart_at_marks: draw nothing from the last point before a mark to the first after it: nobody worked then.
        guide: a value at which to draw a dashed line.
    """
    drawn = [line for line in lines if line.points]
    if not drawn:
        return None
    right = WIDTH - names_width(line.name for line in drawn)
    bottom = _HEIGHT - BOTTOM
    shown = [(line, thinned(line.points, _COLUMNS)) for line in drawn]
    ends_of_x = [line.points[end][0] for line in drawn for end in (0, -1)]
    whole = all(float(value).is_integer() for value in ends_of_x)  # steps
    x = axis_over(ends_of_x, _LEFT, right, from_zero=True, whole=whole)
    y = axis_over(
        [*(value for _, points in shown for _, value in points), *([] if guide is None else [guide])], bottom, TOP,
        may_be_logarithmic=not from_zero, from_zero=from_zero, margin=0.03,
    )  # fmt: skip
    curves = [_curve(line, points, x, y, apart_at_marks) for line, points in shown]
    ends = [(y.at(points[-1][1]), line.name, line.look) for line, points in shown]
    picture = svg(
        words.name, words.title, _description(words, shown), _HEIGHT,
        bottom_axis(x, TOP, bottom, words.x, compact),
        left_axis(y, _LEFT, right, words.form),
        *(_marks(line, x, bottom) for line in drawn),
        *curves,
        None if guide is None else element("path", d=f"M{_LEFT:.1f} {y.at(guide):.1f}H{right:.1f}", class_="guide"),
        end_names(ends, right + 6, TOP, bottom),
    )  # fmt: skip
    rows = [(line.name, *point) for line, points in shown for point in points]
    return Plot(words.name, picture, ("line", words.x, words.title), rows, _note(words, drawn, shown, y))


def _curve(line: Line, points: Sequence[Point], x: Axis, y: Axis, apart: bool) -> Markup:
    breaks = sorted(mark.at for mark in line.marks) if apart else []
    title = element("title", line.name)
    if line.has_means:
        raw = element("path", d=_path(points, x, y, breaks), class_=f"raw s{colour(line.number)}")
        means = _path(averaged(line.points, _MEANS), x, y, breaks)
        return joined(raw, element("path", title, d=means, **line.look))
    path = element("path", title, d=_path(points, x, y, breaks), **line.look)
    shown = points if len(points) <= _FEW and line.colour is None else []
    return joined(path, *(_dot(x.at(a), y.at(b), line.number) for a, b in shown))


def _dot(x: float, y: float, number: int) -> Markup:
    return element("circle", cx=x, cy=y, r=2.6, class_=f"f{colour(number)}")


def _path(points: Sequence[Point], x: Axis, y: Axis, breaks: Sequence[float]) -> str:
    """A line through points, taken up anew after each break."""
    parts, piece = [], -1
    for a, b in points:
        now = bisect_right(breaks, a)
        parts.append(f"{'L' if now == piece else 'M'}{x.at(a):.1f} {y.at(b):.1f}")
        piece = now
    return "".join(parts)


def _marks(line: Line, x: Axis, bottom: float) -> Markup:
    """Dotted lines, with their texts where there is room."""
    drawn: list[Markup] = []
    last = -100.0
    for mark in line.marks:
        place = x.at(mark.at)
        if not _LEFT - 1 <= place <= x.end + 1:
            continue
        title = element("title", mark.title)
        drawn.append(
            element("path", title, d=f"M{place:.1f} {TOP:.1f}V{bottom:.1f}", class_=f"mark s{colour(line.number)}")
        )
        if place - last > 40:
            drawn.append(element("text", mark.text, x=place, y=TOP - 4, class_="middle"))
            last = place
    return joined(*drawn)


def _description(words: Words, shown: Sequence[tuple[Line, Sequence[Point]]]) -> str:
    """The plot in words: where each line begins and ends."""
    ends = [
        f"{line.name}: from {words.form(points[0][1])} at {compact(points[0][0])} to {words.form(points[-1][1])} at "
        f"{compact(points[-1][0])}"
        for line, points in shown[:20]
    ]
    return f"{words.title}, over {words.x}. {'; '.join(ends)}."


def _note(words: Words, drawn: Sequence[Line], shown: Sequence[tuple[Line, Sequence[Point]]], y: Axis) -> str:
    notes = [words.note]
    if any(line.has_means for line in drawn):
        notes.append("Pale: every value. Strong: the means of sixty parts of the width.")
    if any(len(points) < len(line.points) for line, points in shown):
        notes.append("Of each column of the picture, first, lowest, highest and last value are drawn.")
    if any(line.marks for line in drawn):
        notes.append("Dotted: another attempt.")
    if y.logarithmic:
        notes.append("Logarithmic axis.")
    return " ".join(filter(None, notes))


@dataclass(frozen=True)
class Spot:
    """A run among others.

    Attributes:
        name: of the run.
        number: of its look.
        y: the score.
        stored: parameters.
        trainable: parameters at the end.
    """

    name: str
    number: int
    y: float
    stored: float
    trainable: float


def scatter_plot(words: Words, spots: Sequence[Spot]) -> Plot:
    """Scores against sizes: a full circle at the parameters stored, a hollow one at those trained."""
    right, bottom = WIDTH - names_width(spot.name for spot in spots), _HEIGHT - BOTTOM
    sizes = [size for spot in spots for size in (spot.stored, spot.trainable)]
    x = axis_over(sizes, _LEFT, right, may_be_logarithmic=True, margin=0.06)
    y = axis_over([spot.y for spot in spots], bottom, TOP, margin=0.12)
    ends = [(y.at(spot.y), spot.name, look(spot.number)) for spot in spots]
    facts = "; ".join(
        f"{spot.name}: {words.form(spot.y)} with {compact(spot.stored)} stored, {compact(spot.trainable)} trainable"
        for spot in spots[:20]
    )
    picture = svg(
        words.name, words.title, f"{words.title}, over {words.x}. {facts}.", _HEIGHT,
        bottom_axis(x, TOP, bottom, words.x, compact),
        left_axis(y, _LEFT, right, words.form),
        *(_spot(spot, x, y) for spot in spots),
        end_names(ends, right + 6, TOP, bottom),
    )  # fmt: skip
    rows = [(spot.name, spot.stored, spot.trainable, spot.y) for spot in spots]
    return Plot(words.name, picture, ("run", "stored", "trainable", words.title), rows, words.note)


def _spot(spot: Spot, x: Axis, y: Axis) -> Markup:
    stored, trainable, height = x.at(spot.stored), x.at(spot.trainable), y.at(spot.y)
    n = colour(spot.number)
    return joined(
        element("path", d=f"M{trainable:.1f} {height:.1f}H{stored:.1f}", **look(spot.number, "link")),
        element("circle", cx=trainable, cy=height, r=4.5, class_=f"hollow s{n}"),
        element("circle", element("title", spot.name), cx=stored, cy=height, r=4.5, class_=f"f{n}"),
    )
