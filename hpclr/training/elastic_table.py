"""What `hpclr evaluate --rank-fraction` has found, for people."""

from rich.console import Console
from rich.table import Table

from hpclr.output import on_one_line
from hpclr.training.elastic import AtRank, Curve
from hpclr.training.scores import METRICS


def show_curve(curve: Curve, split: str, console: Console | None = None) -> None:
    """Prints a line for each share of full rank: scores, parameters, operations of a forward pass of a sample."""
    metrics = [name for name in METRICS if name in curve.points[0].score.values]
    table = Table(title=f"{on_one_line(str(curve.checkpoint))}: {split}", title_justify="left")
    for column in ("rank", *metrics, "parameters", "of dense", "FLOPs", "of dense"):
        table.add_column(column, justify="right")
    for point in curve.points:
        scores = [f"{point.score.values[name]:{METRICS[name].form}}" for name in metrics]
        table.add_row(f"{point.fraction:g}", *scores, *_sizes(point))
    console = console or Console(highlight=False, markup=False, emoji=False)
    console.print(table)
    if curve.note:
        console.print(curve.note)


def _sizes(point: AtRank) -> tuple[str, ...]:
    sizes, flops, dense = point.sizes, point.sizes.flops or 0, point.sizes.dense_flops or 0
    return (
        f"{sizes.stored:,}",
        f"{sizes.stored_share:.1%}",
        f"{flops / point.samples:,.0f}",
        f"{flops / dense:.1%}" if dense else "–",
    )
