"""The comparison as a table for people, a column a method, and as a file, a line a run."""

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import fmean, stdev

from rich import box
from rich.console import Console
from rich.table import Table

from hpclr.cluster.comparison.files import Comparison
from hpclr.cluster.comparison.numbers import NONE, digits, mean_and_spread, points, short
from hpclr.cluster.comparison.outcomes import Outcome, Outcomes, Quantity, Validation
from hpclr.training.scores import METRICS

_WIDTH = 100
_Cell = Callable[[str], str]  # of a label
_Form = Callable[[float, float | None], str]


def show(comparison: Comparison, found: Outcomes, console: Console | None = None) -> None:
    """Prints the table; a log gets one of 100 columns."""
    console = console or Console(highlight=False, markup=False, emoji=False)
    console = console if console.is_terminal else Console(highlight=False, markup=False, emoji=False, width=_WIDTH)
    console.print(table_of(comparison, found))


def table_of(comparison: Comparison, found: Outcomes) -> Table:
    """Rows are quantities, each with the mean and the standard deviation over the seeds that are finished."""
    title = f"{comparison.name}: equal {comparison.equal}; mean ± standard deviation over seeds"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("", overflow="fold")
    for label in found.by_label:
        table.add_column(label, justify="right", overflow="fold")
    for heading, cell in _rows(found):
        table.add_row(heading, *map(cell, found.by_label))
    return table


def _rows(found: Outcomes) -> Iterator[tuple[str, _Cell]]:
    """Headings, and what stands there in each column."""
    yield "method", partial(_method, found)
    yield "finished runs", partial(_finished, found)
    for name in found.metrics:
        unit = ", %" if _is_share(name) else ""
        yield f"test {name}{unit}", partial(_score, found, name)
        if name == found.metric:
            yield "  minus dense's", partial(_difference, found)
    for quantity in found.quantities:
        yield quantity.heading, partial(_cost, found, quantity)
        if quantity.shared:
            yield "  of dense", partial(_share, found, quantity)
    yield "seconds to dense's score", partial(_reached, found, lambda validation: validation.seconds, digits)
    yield "FLOPs to dense's score", partial(_reached, found, lambda validation: validation.flops, short)


def _is_share(metric: str) -> bool:
    return METRICS[metric].form.endswith("%")


def _method(found: Outcomes, label: str) -> str:
    return found.by_label[label][0].trial.measured.run.method.name


def _finished(found: Outcomes, label: str) -> str:
    return f"{len(found.done(label))} of {len(found.by_label[label])}"


def _score(found: Outcomes, name: str, label: str) -> str:
    return _mean([outcome.test.get(name) for outcome in found.done(label)], points if _is_share(name) else digits)


def _cost(found: Outcomes, quantity: Quantity, label: str) -> str:
    form = digits if quantity.name == "seconds" else short
    return _mean([outcome.costs[quantity.name] for outcome in found.done(label)], form)


def _share(found: Outcomes, quantity: Quantity, label: str) -> str:
    """Of the mean of dense's runs."""
    means = [mean_and_spread([one.costs[quantity.name] for one in some]) for some in (found.done(label), found.dense)]
    if means[0] is None or means[1] is None or not means[1][0]:
        return NONE
    return f"{means[0][0] / means[1][0]:.1%}"


def _difference(found: Outcomes, label: str) -> str:
    """Over pairs of runs with the same seed, with the standard error of the mean."""
    if label == found.reference:
        return NONE
    dense, mine = _by_seed(found.metric, found.dense), _by_seed(found.metric, found.done(label))
    gains = [mine[seed] - dense[seed] for seed in mine.keys() & dense.keys()]
    if not gains:
        return NONE
    error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None
    text = (points if _is_share(found.metric) else digits)(fmean(gains), error)
    return text if text.startswith("-") else f"+{text}"


def _by_seed(metric: str, outcomes: Sequence[Outcome]) -> dict[int, float]:
    return {outcome.trial.seed: outcome.test[metric] for outcome in outcomes if metric in outcome.test}


def _reached(found: Outcomes, of: Callable[[Validation], float | None], form: _Form, label: str) -> str:
    """Over the runs that have reached it, and how many these are where not all have."""
    done = [outcome for outcome in found.done(label) if outcome.validations]
    if found.target is None or not done:
        return NONE
    reached = [outcome.reached for outcome in done if outcome.reached is not None]
    if not reached:
        return "not reached"
    text = _mean([of(validation) for validation in reached], form if len(reached) == len(done) else _plain(form))
    return text if text == NONE or len(reached) == len(done) else f"{text} ({len(reached)}/{len(done)})"


def _plain(form: _Form) -> _Form:
    return lambda mean, spread: form(mean, None)


def _mean(values: Sequence[float | None], form: _Form) -> str:
    mean = mean_and_spread(values)
    return NONE if mean is None else form(*mean)


def csv_of(found: Outcomes) -> bytes:
    """A line a run that counts, with all digits; what is not known is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    costs = [quantity.name for quantity in found.quantities]
    heading = ["name", "label", "method", "seed", "state", *(f"test_{name}" for name in found.metrics), *costs]
    writer.writerow([*heading, "reached_dense", "seconds_to_dense", "flops_to_dense"])
    for outcome in (outcome for outcomes in found.by_label.values() for outcome in outcomes):
        writer.writerow(_line(found, outcome))
    return text.getvalue().encode()


def _line(found: Outcomes, outcome: Outcome) -> list[object]:
    trial, point = outcome.trial, outcome.trial.counts or outcome.trial.measured
    known = found.target is not None and bool(outcome.validations)
    reached = outcome.reached
    return [
        *(point.name, trial.label, point.run.method.name, trial.seed, outcome.standing.words),
        *(outcome.test.get(name) for name in found.metrics),
        *(outcome.costs[quantity.name] for quantity in found.quantities),
        ("yes" if reached else "no") if known else None,
        *((reached.seconds, reached.flops) if reached else (None, None)),
    ]
