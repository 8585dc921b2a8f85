"""The picture of a comparison: what a metric costs in parameters, in operations and in time, method by method."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from hpclr.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("svg", "png", "pdf")

# Okabe and Ito's colours, which the colour-blind tell apart; without yellow, which paper does not show.
COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the picture is the same everywhere
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "svg.hashsalt": "hpclr",  # else the names of its parts are random
    "svg.fonttype": "path",
}
METADATA: dict[str, dict[str, Any]] = {
    "svg": {"Date": None},
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "ModDate": None},
}
_SIZE = (11.0, 3.8)  # inches
_NARROWEST = 0.1  # of an axis of costs, as a share of what is in its middle: less would make much of little
_MARKER = 6  # points, its size
_BESIDE, _ABOVE = 5, 4  # points from the middle of a marker to its label


class Series(NamedTuple):
    """The runs of a method.

    Attributes:
        label: of the method.
        scores: the metric on the test split, one a run.
        stored: parameters, one a run that has them.
        flops: of training, likewise.
        curves: for each run its validations: seconds of training and metric.
    """

    label: str
    scores: Sequence[float]
    stored: Sequence[float]
    flops: Sequence[float]
    curves: Sequence[Sequence[tuple[float, float]]]


def picture_of(kind: str, title: str, metric: str, series: Sequence[Series]) -> bytes:
    """Draws a comparison; the same data give the same bytes.

    Args:
        kind: one of `FORMATS`.
        title: above all.
        metric: what the scores are, as it stands at their axis.
        series: those that have scores, in the order of the table, which gives them their colours and markers.

    Raises:
        UsageError: if matplotlib is not installed.
    """
    content = io.BytesIO()
    with matplotlib_style():
        _drawn(title, metric, series).savefig(content, format=kind, dpi=200, metadata=METADATA[kind])
    return content.getvalue()


@contextmanager
def matplotlib_style() -> Iterator[None]:
    """Whatever the user's own settings are."""
    try:
        from matplotlib import style
    except ImportError as error:
        raise UsageError(
            f"a picture needs matplotlib, which cannot be imported ({error}); install the extra `report`: "
            "pip install 'hpclr[report]'"
        ) from error
    with style.context(["default", _STYLE]):
        yield


def _drawn(title: str, metric: str, series: Sequence[Series]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    figure.suptitle(title, parse_math=False)
    stored, flops, time = figure.subplots(1, 3)
    _points(stored, series, lambda one: one.stored)
    stored.set_xlabel("stored parameters")
    stored.set_ylabel(f"test {metric}")
    _points(flops, series, lambda one: one.flops)
    flops.set_xlabel("FLOPs of training")
    _curves(time, series)
    time.set_xlabel("seconds of training")
    time.set_ylabel(f"validation {metric}")
    figure.draw_without_rendering()  # lays out the panels, so that it is known where the labels are
    for panel in (stored, flops):
        _spread_out(panel, figure.dpi / 72)
    return figure


def _look(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}


def _points(panel: "Axes", series: Sequence[Series], costs: Callable[[Series], Sequence[float]]) -> None:
    """Means with what they vary by in both directions, labels beside them."""
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import EngFormatter, MaxNLocator

    shown = [(number, one) for number, one in enumerate(series) if costs(one) and one.scores]
    middles = {one.label: fmean(costs(one)) for _, one in shown}
    for number, one in shown:
        x, y = middles[one.label], fmean(one.scores)
        vary = [_spread(values) for values in (costs(one), one.scores)]
        panel.errorbar(x, y, xerr=vary[0], yerr=vary[1], **_look(number), markersize=_MARKER, capsize=2.5, linewidth=1)
        inwards = -1 if x > (min(middles.values()) + max(middles.values())) / 2 else 1
        panel.annotate(
            one.label, (x, y), (inwards * _BESIDE, _ABOVE), textcoords="offset points", parse_math=False,
            ha="left" if inwards > 0 else "right", fontsize=9, color=_look(number)["color"],
            path_effects=[withStroke(linewidth=2.5, foreground="white")],  # readable on others' error bars
        )  # fmt: skip
    panel.margins(x=0.2, y=0.2)
    _widen(panel)
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.xaxis.set_major_locator(MaxNLocator(4))
    if not shown:
        _say_nothing(panel)


def _widen(panel: "Axes") -> None:
    """Gives the axis of costs its least width."""
    low, high = panel.get_xlim()
    middle = (low + high) / 2
    if high - low < _NARROWEST * middle:
        panel.set_xlim(middle * (1 - _NARROWEST / 2), middle * (1 + _NARROWEST / 2))


def _curves(panel: "Axes", series: Sequence[Series]) -> None:
    """The mean over the runs, validation by validation, in a band from the lowest to the highest."""
    for number, one in enumerate(series):
        columns = list(zip(*one.curves, strict=False))  # runs of unequal length: as far as all go
        if not columns:
            continue
        seconds = [fmean(time for time, _ in column) for column in columns]
        values = [[value for _, value in column] for column in columns]
        look = _look(number)
        panel.plot(
            seconds, list(map(fmean, values)), **look, markersize=4, linewidth=1.2, markevery=1 + len(values) // 12
        )
        panel.fill_between(
            seconds, list(map(min, values)), list(map(max, values)), color=look["color"], alpha=0.15, lw=0
        )
    if not panel.lines:
        _say_nothing(panel)
        return
    drawn = [one.label for one in series if any(one.curves)]
    for text in panel.legend(panel.lines, drawn, frameon=False).get_texts():
        text.set_parse_math(False)


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _say_nothing(panel: "Axes") -> None:
    panel.set_xticks([])
    panel.set_yticks([])
    panel.text(0.5, 0.5, "not known", transform=panel.transAxes, ha="center", va="center", color="#666666")


def _spread_out(panel: "Axes", dots: float) -> None:
    """Moves labels up that would lie on another or on a marker; `dots` make a point."""
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

    labels = [text for text in panel.texts if isinstance(text, Annotation)]
    middles = [panel.transData.transform(text.xy) for text in labels]
    placed = [Bbox([middle - _MARKER / 2 * dots, middle + _MARKER / 2 * dots]) for middle in middles]
    for text in sorted(labels, key=lambda text: text.get_window_extent().y0):
        box = text.get_window_extent()
        up = 0.0
        for other in sorted(placed, key=lambda other: other.y0):
            if box.translated(0, up).overlaps(other):
                up = other.y1 - box.y0 + 1
        placed.append(box.translated(0, up))
        text.set_position((text.xyann[0], _ABOVE + up / dots))
