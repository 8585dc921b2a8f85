"""Finished runs side by side, one by one or averaged over seeds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from hpclr.errors import UsageError
from hpclr.training.run_directory import RunDirectory

Summary = dict[str, Any]
Columns = dict[str, list[Summary]]  # heading → the runs behind it


def read_summaries(runs: Sequence[Path]) -> list[Summary]:
    """The summaries of finished runs.

    Raises:
        UsageError: if a directory holds no run, or one that has not finished.
    """
    return [_read(RunDirectory(path)) for path in runs]


def _read(directory: RunDirectory) -> Summary:
    if not directory.exists:
        raise UsageError(f"{directory.path} is not the directory of a run (it has no run.yaml)")
    if not directory.summary.exists():
        raise UsageError(f"the run in {directory.path} has not finished; `hpclr train` with its run file continues it")
    summary: Summary = msgspec.json.decode(directory.summary.read_bytes())
    return summary | {"directory": str(directory.path)}


def comparison(summaries: Sequence[Summary], *, mean: bool = False, console: Console | None = None) -> None:
    """Prints the quantities, and the rank of every layer where runs stand alone.

    Args:
        summaries: of finished runs.
        mean: one column a method, with the mean and the standard deviation over its runs, instead of one a run.
        console: where to print.
    """
    console = console or Console(highlight=False, markup=False, emoji=False)
    columns = _by_method(summaries) if mean else _by_run(summaries)
    console.print(_quantities(columns))
    if not mean:
        console.print(_ranks(columns))


def _by_run(summaries: Sequence[Summary]) -> Columns:
    """One column a run, under its name, or under its directory where names repeat."""
    names = [summary["name"] for summary in summaries]
    return {s["name"] if names.count(s["name"]) == 1 else s["directory"]: [s] for s in summaries}


def _by_method(summaries: Sequence[Summary]) -> Columns:
    methods = dict.fromkeys(summary["method"] for summary in summaries)
    groups = {method: [s for s in summaries if s["method"] == method] for method in methods}
    return {f"{method} ({len(group)} runs)": group for method, group in groups.items()}


Value = Callable[[Summary], float | None]
QUANTITIES: tuple[tuple[str, Value, str], ...] = (
    ("test accuracy", lambda s: s["test"]["accuracy"], ".2%"),
    ("best validation accuracy", lambda s: s["best_validation"]["accuracy"], ".2%"),
    ("trainable parameters", lambda s: s["sizes"]["trainable"], ",.0f"),
    ("  of dense", lambda s: s["sizes"]["trainable"] / s["sizes"]["dense"], ".1%"),
    ("stored parameters", lambda s: s["sizes"]["stored"], ",.0f"),
    ("  of dense", lambda s: s["sizes"]["stored"] / s["sizes"]["dense"], ".1%"),
    ("dense parameters", lambda s: s["sizes"]["dense"], ",.0f"),
    ("FLOPs of a forward, a sample", lambda s: _divided(s, "flops", "flops_samples"), ",.0f"),
    ("  of dense", lambda s: _divided(s, "flops", "dense_flops"), ".1%"),
    ("bytes of gradients a step", lambda s: s["sizes"]["gradient_bytes"], ",.0f"),
    ("bytes of optimiser state", lambda s: s["sizes"]["optimizer_bytes"], ",.0f"),
    ("steps", lambda s: s["steps"], ",.0f"),
    ("seconds", lambda s: s["seconds"], ".1f"),
)


def _divided(summary: Summary, key: str, by: str) -> float | None:
    """A quotient of two sizes; None where the operations could not be counted."""
    sizes = summary["sizes"]
    return None if sizes[key] is None or not sizes[by] else sizes[key] / sizes[by]


def _quantities(columns: Columns) -> Table:
    table = Table(title="runs", title_justify="left")
    table.add_column("")
    for heading in columns:
        table.add_column(heading, justify="right")
    table.add_row("method", *(group[0]["method"] for group in columns.values()))
    for label, value, form in QUANTITIES:
        table.add_row(label, *(_cell([value(summary) for summary in group], form) for group in columns.values()))
    return table


def _cell(values: Sequence[float | None], form: str) -> str:
    """The mean, and over several runs the standard deviation where there is one to speak of."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    text = f"{fmean(known):{form}}"
    return f"{text} ± {stdev(known):{form}}" if len(known) > 1 and stdev(known) > 0 else text


def _ranks(columns: Columns) -> Table:
    """Every weight that may be low-rank: k of min(m, n), or dense."""
    table = Table(title="rank of every layer", title_justify="left")
    table.add_column("")
    for heading in columns:
        table.add_column(heading, justify="right")
    by_run = [{layer["name"]: layer for layer in summary["layers"]} for (summary,) in columns.values()]
    for name in dict.fromkeys(name for layers in by_run for name in layers):
        table.add_row(name, *(_rank(layers.get(name)) for layers in by_run))
    return table


def _rank(layer: dict[str, Any] | None) -> str:
    if layer is None:
        return "–"
    m, n = layer["shape"]
    return f"{layer['rank']} of {min(m, n)} ({m}×{n})" if layer["converted"] else f"dense ({m}×{n})"
