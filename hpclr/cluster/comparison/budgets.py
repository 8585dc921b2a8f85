"""Which runs a comparison consists of: those at equal steps, and, once these are finished, those of equal cost.

A method's run at equal steps is the measurement of what it costs; the run that counts has its steps scaled by the cost
of the dense run of the same seed. So seeds may be added without changing what is there.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hpclr.cluster.comparison.files import Comparison, Equal, with_budget
from hpclr.cluster.sweep.files import Point
from hpclr.cluster.sweep.points import Sweep
from hpclr.cluster.sweep.results import found
from hpclr.cluster.sweep.standing import come_to_an_end
from hpclr.errors import UsageError

_COSTS = {"time": ("seconds",), "flops": ("cost", "training_flops")}  # in summary.json
_NEAR = 0.02  # as a share of dense's budget; so near, a run is not repeated


class Trial(NamedTuple):
    """A method with a seed.

    Attributes:
        label: of the method.
        seed: the seed.
        measured: its run at equal steps.
        counts: the run whose results count; None: how many steps that has is not known yet.
        fault: why it will not be known, if so.
    """

    label: str
    seed: int
    measured: Point
    counts: Point | None
    fault: str | None = None


def trials(comparison: Comparison, runs: Path) -> list[Trial]:
    """Every method with every seed, with what is known now of its runs."""
    return [
        _trial(comparison, label, number, runs)
        for label, points in comparison.entries.items()
        for number in range(len(points))
    ]


def as_sweep(comparison: Comparison, found: Sequence[Trial]) -> Sweep:
    """All runs that are known: first those at equal steps."""
    points = [trial.measured for trial in found]
    points += [trial.counts for trial in found if trial.counts is not None and trial.counts is not trial.measured]
    return Sweep(comparison.name, tuple(points), "compare")


def what_follows(comparison: Comparison, found: Sequence[Trial]) -> str | None:
    """What there is to say of runs that cannot be started yet."""
    count = sum(trial.counts is None and trial.fault is None for trial in found)
    if not count:
        return None
    return (
        f"{count} more runs follow when those of equal steps are finished, with as many steps as come to dense's "
        f"{_words(comparison.equal)}; where these are jobs, when the same command is given again"
    )


def check_budgets(found: Sequence[Trial]) -> None:
    """Whether all runs can be made that are asked for.

    Raises:
        UsageError: if a run that is finished does not say what it has cost; names all of them.
    """
    faults = dict.fromkeys(trial.fault for trial in found if trial.fault is not None)
    if faults:
        raise UsageError("\n".join(faults))


def _trial(comparison: Comparison, label: str, number: int, runs: Path) -> Trial:
    point = comparison.entries[label][number]
    trial = Trial(label, point.run.train.seed, point, point)
    if comparison.equal == "steps" or label == comparison.reference:
        return trial
    assert comparison.reference is not None  # without one there is no budget: files.py has seen to it
    try:
        costs = [
            _cost(one, comparison.equal, runs) for one in (point, comparison.entries[comparison.reference][number])
        ]
    except _UnknownCostError as error:
        return trial._replace(counts=None, fault=str(error))
    if costs[0] is None or costs[1] is None:
        return trial._replace(counts=None)
    (steps, spent), (_, budget) = costs[0], costs[1]
    if abs(spent - budget) <= _NEAR * budget:
        return trial
    return trial._replace(
        counts=with_budget(point, comparison.name, comparison.equal, max(1, round(steps * budget / spent)))
    )


class _UnknownCostError(Exception):
    """A run is finished, and does not say what it has cost."""


def _cost(point: Point, kind: Equal, runs: Path) -> tuple[int, float] | None:
    """Steps of a run, and what these have cost; None if it is not finished."""
    standing = come_to_an_end(point, runs)
    if standing is None or not standing.finished:
        return None
    cost = found(standing.summary, _COSTS[kind])
    if not cost or cost < 0:
        raise _UnknownCostError(
            f"{runs / point.name / 'summary.json'} does not say how many {_words(kind)} training has taken "
            f"({'.'.join(_COSTS[kind])}), so that no run of equal cost can be made. Compare by equal steps, or by "
            f"{'flops' if kind == 'time' else 'time'}."
        )
    return standing.step, cost


def _words(kind: Equal) -> str:
    return "seconds" if kind == "time" else "FLOPs"
