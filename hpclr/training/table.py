"""Finished runs side by side, one by one or averaged over seeds."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from hpclr.errors import UsageError
from hpclr.training.run_directory import RunDirectory
from hpclr.training.scores import METRICS

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
    ("trainable parameters", lambda s: s["sizes"]["trainable"], ",.0f"),
    ("  of dense", lambda s: s["sizes"]["trainable"] / s["sizes"]["dense"], ".1%"),
    ("stored parameters", lambda s: s["sizes"]["stored"], ",.0f"),
    ("  of dense", lambda s: s["sizes"]["stored"] / s["sizes"]["dense"], ".1%"),
    ("dense parameters", lambda s: s["sizes"]["dense"], ",.0f"),
    ("FLOPs of a forward, a sample", lambda s: _divided(s, "flops", "flops_samples"), ",.0f"),
    ("  of dense", lambda s: _divided(s, "flops", "dense_flops"), ".1%"),
    ("FLOPs of training", lambda s: _cost(s, "training_flops"), ".3g"),
    ("  of dense", lambda s: _share(s, "training_flops", "dense_training_flops"), ".1%"),
    ("bytes of gradients a step", lambda s: s["sizes"]["gradient_bytes"], ",.0f"),
    ("  mean of all steps", lambda s: _cost(s, "gradient_bytes_mean"), ",.0f"),
    ("bytes of optimiser state", lambda s: s["sizes"]["optimizer_bytes"], ",.0f"),
    ("  the most at any time", lambda s: _cost(s, "optimizer_bytes_peak"), ",.0f"),
    ("bytes of memory in training", lambda s: _cost(s, "peak_memory_bytes"), ",.0f"),
    ("steps", lambda s: s["steps"], ",.0f"),
    ("seconds", lambda s: s["seconds"], ".1f"),
)


def _scores(columns: Columns) -> list[tuple[str, Value, str]]:
    """The metrics of the runs' tasks, on the test split and, where the run was best, on the validation split."""
    summaries = [summary for group in columns.values() for summary in group]
    return [
        (f"{heading} {name}", partial(_score, split, name), metric.form)
        for name, metric in METRICS.items()
        for split, heading in (("test", "test"), ("best_validation", "best validation"))
        if name != "loss" and any(name in summary["test"] for summary in summaries)
    ]


def _score(split: str, name: str, summary: Summary) -> float | None:
    found: float | None = summary[split].get(name)
    return found


def _divided(summary: Summary, key: str, by: str) -> float | None:
    """A quotient of two sizes; None where the operations could not be counted."""
    sizes = summary["sizes"]
    return None if sizes[key] is None or not sizes[by] else sizes[key] / sizes[by]


def _cost(summary: Summary, key: str) -> float | None:
    """A part of the cost; None where it is not known, as in summaries that do not have it yet."""
    value: float | None = summary.get("cost", {}).get(key)
    return value


def _share(summary: Summary, key: str, whole: str) -> float | None:
    part, total = _cost(summary, key), _cost(summary, whole)
    return None if part is None or not total else part / total


def _quantities(columns: Columns) -> Table:
    table = Table(title="runs", title_justify="left")
    table.add_column("")
    for heading in columns:
        table.add_column(heading, justify="right")
    table.add_row("method", *(group[0]["method"] for group in columns.values()))
    for label, value, form in (*_scores(columns), *QUANTITIES):
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
