"""The picture of `hpclr spectrum`: every weight's singular values, what noise would give, and where rules cut."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hpclr.errors import UsageError
from hpclr.report.comparison import COLOURS, METADATA, matplotlib_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 200
_COLUMNS = 4
_PANEL = (2.8, 2.1)  # inches
_LEGEND = 0.9  # inches
_NOISE = "#888888"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


class Curve(NamedTuple):
    """One weight.

    Attributes:
        name: of its layer.
        shape: (m, n) as a matrix.
        values: its singular values, descending.
        bulk: those that noise alone would have, at even places, descending; none: its size is not known.
        edge: the largest that noise alone would have.
        ranks: rule → what it keeps.
    """

    name: str
    shape: tuple[int, int]
    values: Sequence[float]
    bulk: Sequence[float]
    edge: float
    ranks: Mapping[str, int]


def picture_of(kind: str, title: str, curves: Sequence[Curve]) -> bytes:
    """Draws a panel for each weight; the same data give the same bytes.

    Args:
        kind: one of `hpclr.report.comparison.FORMATS`.
        title: above all.
        curves: the weights, in the order of the panels.

    Raises:
        UsageError: if there is nothing to draw, or too much, or matplotlib is not installed.
    """
    if not 0 < len(curves) <= MOST_PANELS:
        raise UsageError(
            f"--plot draws 1 to {MOST_PANELS} layers, there are {len(curves)}; choose some with --layers, such as "
            "--layers 'blocks.0.*'"
        )
    content = io.BytesIO()
    with matplotlib_style():
        _drawn(title, curves).savefig(content, format=kind, dpi=150, metadata=METADATA[kind])
    return content.getvalue()


def _drawn(title: str, curves: Sequence[Curve]) -> "Figure":
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, max(2, len(curves)))  # the legend has its width
    rows = -(-len(curves) // columns)
    size = (_PANEL[0] * columns, _PANEL[1] * rows + _LEGEND)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, parse_math=False)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    for panel, curve in zip(panels, curves, strict=False):
        _panel(panel, curve)
    figure.supxlabel("direction, as a share of min(m, n)")
    figure.supylabel("singular value / largest")
    _legend(figure, list(panels[: len(curves)]))
    return figure


def _panel(panel: "Axes", curve: Curve) -> None:
    top, short = curve.values[0] or 1.0, min(curve.shape)
    panel.plot(_places(len(curve.values), short), [value / top for value in curve.values], color=COLOURS[0])
    if curve.bulk:
        bulk = [value / top for value in curve.bulk]
        panel.plot(_places(len(bulk), len(bulk)), bulk, color=_NOISE, linestyle="--", label="noise alone")
        panel.axhline(curve.edge / top, color=_NOISE, linestyle=":", label="edge of the noise")
    for number, (rule, rank) in enumerate(curve.ranks.items()):
        x, y = ((rank - 0.5) / short, curve.values[rank - 1] / top) if rank else (0.0, 1.0)
        panel.plot([x], [y], **_look(number), label=rule, linestyle="none", markersize=5, clip_on=False)
    panel.set_title(f"{curve.name}  {curve.shape[0]}×{curve.shape[1]}", fontsize=8, parse_math=False)
    panel.set_xlim(0, 1)
    panel.set_ylim(0, 1.05)


def _places(count: int, of: int) -> list[float]:
    """The middles of the first `count` of `of` even parts of the axis."""
    return [(place + 0.5) / of for place in range(count)]


def _look(number: int) -> dict[str, Any]:
    colours = COLOURS[1:]
    return {"color": colours[number % len(colours)], "marker": _MARKERS[number % len(_MARKERS)]}


def _legend(figure: "Figure", panels: Sequence["Axes"]) -> None:
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    legend = figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)), frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
