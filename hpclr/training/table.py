"""Finished runs side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from hpclr.errors import UsageError
from hpclr.training.run_directory import RunDirectory

Summary = dict[str, Any]


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
    return summary


def comparison(summaries: Sequence[Summary], console: Console | None = None) -> None:
    """Prints the table of quantities and the table of ranks."""
    console = console or Console(highlight=False)
    console.print(_quantities(summaries))
    console.print(_ranks(summaries))


def _table(title: str, summaries: Sequence[Summary]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for summary in summaries:
        table.add_column(summary["name"], justify="right")
    return table


def _quantities(summaries: Sequence[Summary]) -> Table:
    table = _table("runs", summaries)
    rows = {
        "method": lambda s: s["method"],
        "test accuracy": lambda s: _percent((s["test"] or {}).get("accuracy")),
        "best validation accuracy": lambda s: _percent(s["best_validation"]["accuracy"]),
        "trainable parameters": lambda s: _of_dense(s["sizes"], "trainable"),
        "stored parameters": lambda s: _of_dense(s["sizes"], "stored"),
        "dense parameters": lambda s: f"{s['sizes']['dense']:,}",
        "FLOPs of a forward, a sample": lambda s: _flops(s["sizes"]),
        "bytes of gradients a step": lambda s: f"{s['sizes']['gradient_bytes']:,}",
        "bytes of optimiser state": lambda s: f"{s['sizes']['optimizer_bytes']:,}",
        "steps": lambda s: f"{s['steps']:,}",
        "seconds": lambda s: f"{s['seconds']:.1f}",
    }
    for label, cell in rows.items():
        table.add_row(label, *(cell(summary) for summary in summaries))
    return table


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"


def _of_dense(sizes: dict[str, Any], key: str) -> str:
    return f"{sizes[key]:,} ({sizes[key] / sizes['dense']:.1%})"


def _flops(sizes: dict[str, Any]) -> str:
    if sizes["flops"] is None:
        return "–"
    share = sizes["flops"] / sizes["dense_flops"]
    return f"{sizes['flops'] // sizes['flops_samples']:,} ({share:.1%})"


def _ranks(summaries: Sequence[Summary]) -> Table:
    """Every weight that may be low-rank: k of min(m, n), or dense."""
    table = _table("rank of every layer", summaries)
    by_run = [{layer["name"]: layer for layer in summary["layers"]} for summary in summaries]
    for name in dict.fromkeys(name for layers in by_run for name in layers):
        table.add_row(name, *(_rank(layers.get(name)) for layers in by_run))
    return table


def _rank(layer: dict[str, Any] | None) -> str:
    if layer is None:
        return "–"
    m, n = layer["shape"]
    return f"{layer['rank']} of {min(m, n)} ({m}×{n})" if layer["converted"] else f"dense ({m}×{n})"
