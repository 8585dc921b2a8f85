"""The runs of a sweep in a table: what is varied, what came of it, and how far each run is."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import structs
from rich.console import Console
from rich.table import Table

from hpclr.cluster.sweep.files import Point
from hpclr.cluster.sweep.points import Sweep, value_at
from hpclr.cluster.sweep.standing import Standing
from hpclr.config.describe import show
from hpclr.files import write_asked
from hpclr.training.scores import METRICS, judged_by

_SEED = "train.seed"
_NONE = "–"
_LOG_WIDTH = 200
# Heading, form and place in `summary.json` of what is shown besides the metric.
_QUANTITIES = (
    ("steps", ",.0f", ("steps",)),
    ("seconds", ",.1f", ("seconds",)),
    ("trainable", ",.0f", ("sizes", "trainable")),
    ("stored", ",.0f", ("sizes", "stored")),
    ("dense", ",.0f", ("sizes", "dense")),
)


class Row(NamedTuple):
    """A run, with what is varied and what came of it; None: not known yet."""

    point: Point
    values: list[Any]
    results: list[float | None]
    standing: Standing


class Results:
    """The results of a sweep, the best first and unfinished runs last.

    Args:
        sweep: the sweep.
        standings: how far its runs are, by name.
    """

    def __init__(self, sweep: Sweep, standings: Mapping[str, Standing]) -> None:
        metrics = {judged_by(point.run) for point in sweep.points}
        self._metric = metrics.pop() if len(metrics) == 1 else "loss"  # which every task has
        self._keys = sweep.keys
        self._rows = sorted((self._row(point, standings[point.name]) for point in sweep.points), key=self._place)

    def _row(self, point: Point, standing: Standing) -> Row:
        places = (("test", self._metric), *(place for _, _, place in _QUANTITIES))
        results = [found(standing.summary, place) for place in places]
        results[1] = results[1] if results[1] is not None or not standing.step else standing.step
        return Row(point, [value_at(point.run, key) for key in self._keys], results, standing)

    def _place(self, row: Row) -> tuple[bool, float]:
        return self._order(row.results[0])

    def _order(self, value: float | None) -> tuple[bool, float]:
        """The best first; unfinished runs keep their order."""
        return (True, 0.0) if value is None else (False, -value if METRICS[self._metric].higher_is_better else value)

    @property
    def _headings(self) -> list[str]:
        return [f"test {self._metric}", *(heading for heading, _, _ in _QUANTITIES)]

    @property
    def _forms(self) -> list[str]:
        return [METRICS[self._metric].form, *(form for _, form, _ in _QUANTITIES)]

    def show(self, console: Console | None = None) -> None:
        """Prints the runs and, where some differ in their seeds only, the means over these."""
        console = console or _console()
        table = _table("runs", self._keys, [*self._headings, "state"])
        for row in self._rows:
            cells = [_number(value, form) for value, form in zip(row.results, self._forms, strict=True)]
            table.add_row(*map(_text, row.values), *cells, row.standing.words)
        console.print(table)
        groups = self._seeds()
        if any(len(group) > 1 for group in groups):
            console.print(self._means(groups))

    def write(self, file: Path) -> None:
        """Writes the runs as CSV: names, varied keys, results as they are, states.

        Raises:
            UsageError: if it cannot be written.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["name", *self._keys, *(heading.replace(" ", "_") for heading in self._headings), "state"])
        for row in self._rows:
            writer.writerow([row.point.name, *map(_raw, row.values), *map(_raw, row.results), row.standing.words])
        write_asked(file, text.getvalue().encode())

    def _seeds(self) -> list[list[Row]]:
        """Runs that differ in their seeds only, together."""
        groups: dict[bytes, list[Row]] = {}
        for row in self._rows:
            run = row.point.run
            alike = structs.replace(run, name="run", train=structs.replace(run.train, seed=0))
            groups.setdefault(msgspec.json.encode(alike), []).append(row)
        return list(groups.values())

    def _means(self, groups: Sequence[Sequence[Row]]) -> Table:
        keys = [key for key in self._keys if key != _SEED]
        table = _table("mean ± standard deviation over seeds", keys, [*self._headings, "n"])
        for group in sorted(groups, key=lambda rows: self._order(_mean(_scores(rows)))):
            values = [value for key, value in zip(self._keys, group[0].values, strict=True) if key != _SEED]
            done = [row.results for row in group if row.standing.finished]
            columns = zip(*done, strict=True) if done else ([] for _ in self._forms)
            cells = [_spread(list(column), form) for column, form in zip(columns, self._forms, strict=True)]
            table.add_row(*map(_text, values), *cells, f"{len(done)} of {len(group)}")
        return table


def _table(title: str, keys: Sequence[str], headings: Sequence[str]) -> Table:
    """Headings have two lines where that makes them narrower."""
    table = Table(title=title, title_justify="left")
    for key in keys:
        table.add_column(key.replace(".", ".\n", 1), overflow="fold")
    for heading in headings:
        justify: Literal["left", "right"] = "left" if heading == "state" else "right"
        table.add_column(heading.replace(" ", "\n"), justify=justify, overflow="fold")
    return table


def _console() -> Console:
    """A log may be wider than the 80 columns that rich gives it."""
    console = Console(highlight=False, markup=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, emoji=False, width=_LOG_WIDTH)


def found(summary: Mapping[str, Any] | None, place: Sequence[str]) -> float | None:
    """A number of a summary; None where there is none."""
    value: Any = summary
    for key in place:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, (int, float)) else None


def _scores(rows: Sequence[Row]) -> list[float | None]:
    """Of those that are finished."""
    return [row.results[0] for row in rows if row.standing.finished]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _number(value: float | None, form: str) -> str:
    return _NONE if value is None else f"{value:{form}}"


def _spread(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    spread = f" ± {stdev(known):{form}}" if len(known) > 1 and stdev(known) > 0 else ""
    return _number(_mean(known), form) + spread


def _text(value: Any) -> str:
    return value if isinstance(value, str) else _NONE if value is None else show(value)


def _raw(value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float)):
        return value
    return msgspec.json.encode(value).decode()
