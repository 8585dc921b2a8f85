"""`hpclr inspect`: what a checkpoint holds, without importing anything it names."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hpclr.checkpoint import Tree
from hpclr.lowrank.adapters import rank_stored
from hpclr.lowrank.product import Factors
from hpclr.lowrank.spectra import core_of, singular_values
from hpclr.output import printable
from hpclr.training.evaluation import load_run, malformed_named
from hpclr.training.scores import shown
from hpclr.training.state import Position, from_tree, position_of
from hpclr.training.stored_weights import Adapters, once, place_of, stored_weights

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 24


def show_checkpoint(
    checkpoint: Path, *, best: bool = False, untrusted: bool = False, console: Console | None = None
) -> None:
    """Prints step, origin, sizes, and rank and spectrum of every factored layer.

    Args:
        checkpoint: a file or a run directory.
        best: of a run directory, the best checkpoint on validation instead of the newest.
        untrusted: as `load_checkpoint`.
        console: where to print.

    Raises:
        UsageError: if there is no such checkpoint, or it is damaged or malformed.
    """
    console = console or Console(highlight=False, markup=False, emoji=False)
    loaded, run = load_run(checkpoint, best=best, untrusted=untrusted)
    with malformed_named(loaded.path):
        stored = stored_weights(loaded.tree, loaded.path, average=False, merge=False)
        layers = _adapters(stored.adapters, stored.state) if stored.adapters else _layers(stored.state)
        tables = [_facts(loaded.tree, stored.state, loaded.path, run.method.name), layers]
    for table in tables:
        console.print(table)


def _facts(tree: Tree, weights: Mapping[str, Tensor], path: Path, method: str) -> Table:
    position, environment = position_of(tree), from_tree(tree["environment"])
    state = from_tree(tree["method"])["state"]
    table = Table(title=printable(str(path)), title_justify="left", show_header=False)
    rows: dict[str, Any] = {
        "step": f"{position.step:,}" + (" (finished)" if position.finished else ""),
        "seconds of training": f"{position.seconds:.1f}",
        "best validation": _best(position),
        "method": method,
        "checks failed to decompose": state.get("failures", 0),
        "stored numbers": f"{sum(value.numel() for value in once(weights.values())):,}",
        "bytes of weights": f"{sum(value.nbytes for value in once(weights.values())):,}",
        "made by": f"hpclr {environment['packages']['hpclr']}, torch {environment['packages']['torch']}, "
        f"Python {environment['python']}",
        "made on": f"{environment['host']}, {environment['device']}, {environment['threads']} threads",
        "command": " ".join(environment["command"]),
    }
    for label, value in rows.items():
        table.add_row(label, printable(str(value)))
    return table


def _best(position: Position) -> str:
    return f"{shown(position.best_scores)} at step {position.best_step}" if position.best_scores else "–"


def _layers(weights: Mapping[str, Tensor]) -> Table:
    table = Table(title="factored layers", title_justify="left")
    for column in ("layer", "shape", "rank", "σ₁", "σ_k/σ₁", "spectrum"):
        table.add_column(column)
    found: dict[object, tuple[list[str], Factors]] = {}  # a head and its embedding have the same factors
    for name, factors in factored_layers(weights):
        found.setdefault(place_of(factors.sigma), ([], factors))[0].append(name)
    for names, factors in found.values():
        shape = f"{factors.u.shape[0]}×{factors.vh.shape[1]}"
        table.add_row(printable(" = ".join(names)), shape, str(len(factors.sigma)), *_spectrum(factors))
    return table


def _adapters(adapters: Adapters, weights: Mapping[str, Tensor]) -> Table:
    table = Table(title="adapters", title_justify="left")
    for column in ("layer", "adapter", "weight", "rank", "numbers"):
        table.add_column(column)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    for name, entry in adapters.items():
        numbers = sum(weights[key].numel() for key in entry.parts.values())
        shape = "×".join(map(str, shapes[entry.weight]))
        table.add_row(printable(name), entry.form, shape, str(rank_stored(entry, shapes)), f"{numbers:,}")
    return table


def factored_layers(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Factors]]:
    """The layers that a state dict holds as factors, by the names of their entries."""
    for name, core in weights.items():
        match = re.fullmatch(r"((?:.*[._])?)(?:sigma|s)", name)
        if match and {f"{match[1]}u", f"{match[1]}vh"} <= weights.keys():
            yield match[1].rstrip("._"), Factors(weights[f"{match[1]}u"], core, weights[f"{match[1]}vh"])


def _spectrum(factors: Factors) -> tuple[str, str, str]:
    """The largest singular value of the weight, the smallest relative to it, and all as bars."""
    if not all(torch.isfinite(factor).all() for factor in factors):
        return "not finite", "–", "–"
    s = singular_values(core_of(*factors))
    ratio = float(s[-1] / s[0]) if s[0] > 0 else 0.0
    return f"{float(s[0]):.4g}", f"{ratio:.3f}", sparkline(s)


def sparkline(s: Tensor, width: int = WIDTH) -> str:
    """The singular values, largest first, as bars relative to the largest, at most `width` of them."""
    step = max(1, -(-len(s) // width))
    top = float(s[0]) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int(float(value) / top * len(BARS)))] for value in s[::step])
