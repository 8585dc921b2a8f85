"""The tables of a page: what runs have come to, and in which settings they differ."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from hpclr.report.axes import compact
from hpclr.report.markup import Markup, element, joined
from hpclr.report.records import MOST
from hpclr.report.runs import Run
from hpclr.training.scores import METRICS
from hpclr.training.table import QUANTITIES

_UNKNOWN = "–"
_LONGEST = 1e15  # from which on a number is written with an exponent
Rows = list[tuple[str, list[str]]]


def summary_table(runs: Sequence[Run]) -> Markup:
    """State, scores, sizes, operations and time of runs side by side, and the settings in which they differ."""
    groups = [
        ("how it stands", [("state", [run.state for run in runs])]),
        ("scores", _scores(runs)),
        ("sizes, operations and time", _quantities(runs)),
        ("settings that differ", _settings(runs, _differ)),
    ]
    return _table(runs, [group for group in groups if group[1]])


def settings_table(runs: Sequence[Run]) -> Markup:
    """All settings."""
    return _table(runs, [("settings", _settings(runs, lambda values: True))])


def score(run: Run, split: str, name: str) -> float | None:
    """A metric on a split; None if it is not known."""
    return _number(run.summary[split].get(name))


def size(run: Run, name: str) -> float | None:
    """One of the run's sizes now; None if it is not known."""
    return _number(run.summary["sizes"].get(name))


def metric_of(runs: Sequence[Run], split: str) -> str | None:
    """The first metric, or else the loss, that any of the runs has on a split."""
    return next((name for name in METRICS if any(score(run, split, name) is not None for run in runs)), None)


def _scores(runs: Sequence[Run]) -> Rows:
    splits = (("test", "test"), ("best validation", "best_validation"))
    rows = [
        (f"{heading} {name}", [_shown(score(run, split, name), metric.form) for run in runs])
        for name, metric in METRICS.items()
        for heading, split in splits
    ]
    return _with_values(rows)


def _quantities(runs: Sequence[Run]) -> Rows:
    rows = [(label, [_shown(_value(run, value), form) for run in runs]) for label, value, form in QUANTITIES]
    return _with_values([*rows, *_pace(runs)])


def _pace(runs: Sequence[Run]) -> Iterator[tuple[str, list[str]]]:
    yield "milliseconds a step, mean", [_shown(_milliseconds(run), ",.1f") for run in runs]
    yield "attempts", [_shown(max((one.number for one in run.attempts), default=None), ",.0f") for run in runs]


def _milliseconds(run: Run) -> float | None:
    laps = run.laps
    return 1000 * sum(lap.seconds for lap in laps) / sum(lap.steps for lap in laps) if laps else None


def _value(run: Run, value: Callable[[dict[str, object]], float | None]) -> float | None:
    """What a summary does not hold, or holds in another form, is not known."""
    with suppress(KeyError, TypeError, ZeroDivisionError, AttributeError, OverflowError):
        return _number(value(run.summary))
    return None


def _number(value: object) -> float | None:
    """None for what is none, or has no place on an axis."""
    if not isinstance(value, int | float) or not abs(value) <= MOST:
        return None
    return value if abs(value) >= 1 / MOST else 0.0


def _shown(value: float | None, form: str) -> str:
    if value is None:
        return _UNKNOWN
    return f"{value:{form}}" if abs(value) < _LONGEST else compact(value)


def _with_values(rows: Rows) -> Rows:
    return [row for row in rows if any(cell != _UNKNOWN for cell in row[1])]


def _differ(values: list[str]) -> bool:
    """Whether runs that have a setting have it otherwise; what one method alone has is no difference."""
    return len({value for value in values if value != _UNKNOWN}) > 1


def _settings(runs: Sequence[Run], wanted: Callable[[list[str]], bool]) -> Rows:
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = [(key, [run.settings.get(key, _UNKNOWN) for run in runs]) for key in keys]
    return [row for row in rows if wanted(row[1])]


def _table(runs: Sequence[Run], groups: Sequence[tuple[str, Rows]]) -> Markup:
    heading = element("tr", element("th", scope="col"), *(element("th", run.name, scope="col") for run in runs))
    rows = [row for name, group in groups for row in (_heading(name, len(runs)), *map(_row, group))]
    return element(
        "div", element("table", element("thead", heading), element("tbody", *rows)),
        class_="scroll", tabindex=0, role="region", aria_label="table",
    )  # fmt: skip


def _heading(name: str, columns: int) -> Markup:
    return element("tr", element("th", name, class_="group", scope="rowgroup"), element("td", colspan=columns))


def _row(row: tuple[str, list[str]]) -> Markup:
    label, cells = row
    kind = "part" if label.startswith(" ") else None
    drawn = [element("td", cell, class_="text" if len(cell) > 16 else None) for cell in cells]
    return element("tr", element("th", label.strip(), scope="row", class_=kind), joined(*drawn))
