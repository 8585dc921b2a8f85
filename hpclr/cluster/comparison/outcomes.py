"""What has come of the runs of a comparison: numbers of each, as their directories hold them."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import msgspec

from hpclr.cluster.comparison.budgets import Trial
from hpclr.cluster.comparison.files import Comparison
from hpclr.cluster.sweep.results import found
from hpclr.cluster.sweep.standing import Standing
from hpclr.errors import UsageError
from hpclr.files import open_regular
from hpclr.training.run_directory import RunDirectory
from hpclr.training.scores import METRICS, judged_by

Summary = Mapping[str, Any]
_ROUNDING = 1e-9  # of a mean


class Quantity(NamedTuple):
    """Something that a run has cost, or that its model costs.

    Attributes:
        name: in a file.
        heading: in a table.
        value: taken from the summary; None where that does not hold it.
        shared: whether its share of dense's is of interest.
        rare: whether most methods have none; where none of a comparison has, it is left out.
    """

    name: str
    heading: str
    value: Callable[[Summary], float | None]
    shared: bool = False
    rare: bool = False


def _at(*place: str) -> Callable[[Summary], float | None]:
    return lambda summary: found(summary, place)


def _of_a_sample(summary: Summary) -> float | None:
    flops, samples = found(summary, ("sizes", "flops")), found(summary, ("sizes", "flops_samples"))
    return flops / samples if flops is not None and samples else None


QUANTITIES = (
    Quantity("trainable_parameters", "trainable parameters", _at("sizes", "trainable"), shared=True),
    Quantity("stored_parameters", "stored parameters", _at("sizes", "stored"), shared=True),
    Quantity("dense_parameters", "dense parameters", _at("sizes", "dense")),
    Quantity("adapter_bytes", "adapter, bytes", _at("adapter_bytes"), rare=True),
    Quantity("inference_flops", "FLOPs of inference", _of_a_sample, shared=True),
    Quantity("training_flops", "FLOPs of training", _at("cost", "training_flops"), shared=True),
    Quantity("optimizer_bytes", "optimiser, bytes", _at("sizes", "optimizer_bytes")),
    Quantity("optimizer_bytes_peak", "  at most", _at("cost", "optimizer_bytes_peak")),
    Quantity("peak_memory_bytes", "peak memory, bytes", _at("cost", "peak_memory_bytes")),
    Quantity("gradient_bytes", "reduced a step, bytes", _at("cost", "gradient_bytes_mean")),
    Quantity("steps", "steps", _at("steps")),
    Quantity("seconds", "seconds", _at("seconds"), shared=True),
)


class Validation(NamedTuple):
    """A score on the validation split, and what training had cost until then; None: not known."""

    metric: float
    seconds: float | None
    flops: float | None


class Outcome(NamedTuple):
    """What a run has come to.

    Attributes:
        trial: the method with its seed.
        standing: how far it is.
        test: its metrics on the test split, by name; empty until it is finished.
        costs: the quantities, by name.
        validations: the metric that counts, in the order of training.
        reached: the first validation that was as good as dense's last; None if there was none.
    """

    trial: Trial
    standing: Standing
    test: Mapping[str, float]
    costs: Mapping[str, float | None]
    validations: Sequence[Validation]
    reached: Validation | None = None

    @property
    def done(self) -> bool:
        """Whether there are results."""
        return self.trial.counts is not None and self.standing.finished


class Outcomes(NamedTuple):
    """What has come of all runs.

    Attributes:
        metric: the one that counts.
        reference: the label of dense; None if there is none.
        target: the mean over the seeds of dense's last validation; None if there is none.
        by_label: one a seed.
    """

    metric: str
    reference: str | None
    target: float | None
    by_label: Mapping[str, Sequence[Outcome]]

    @property
    def dense(self) -> Sequence[Outcome]:
        """Those of the reference that are finished; none where there is no reference."""
        return self.done(self.reference) if self.reference is not None else ()

    def done(self, label: str) -> Sequence[Outcome]:
        """The finished ones of a method."""
        return [outcome for outcome in self.by_label[label] if outcome.done]

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics, the one that counts first."""
        names = {name for outcomes in self.by_label.values() for outcome in outcomes for name in outcome.test}
        return [self.metric, *(name for name in METRICS if name in names - {self.metric})]

    @property
    def quantities(self) -> list[Quantity]:
        """What is told of the runs; of rare ones those that some run has."""
        costs = [outcome.costs for outcomes in self.by_label.values() for outcome in outcomes]
        return [one for one in QUANTITIES if not one.rare or any(cost[one.name] is not None for cost in costs)]


def outcomes(
    comparison: Comparison, trials: Sequence[Trial], standings: Mapping[str, Standing], runs: Path
) -> Outcomes:
    """Reads what has come of the runs that count.

    Args:
        comparison: what is compared.
        trials: its methods with their seeds.
        standings: how far the runs are, by their names.
        runs: the directory that holds them.

    Raises:
        UsageError: if they are of different data.
    """
    _check_data(standings)
    summaries = [_summary(trial, standings) for trial in trials]
    names = {name for summary in summaries for name in _test(summary)}
    metric = _metric(judged_by(trials[0].measured.run), names)
    all_ = [_outcome(trial, standings, metric, runs) for trial in trials]
    target = _target([one for one in all_ if one.trial.label == comparison.reference])
    if target is not None:
        all_ = [one._replace(reached=_first_to_reach(target, metric, one.validations)) for one in all_]
    by_label = {label: [one for one in all_ if one.trial.label == label] for label in comparison.entries}
    return Outcomes(metric, comparison.reference, target, by_label)


def _check_data(standings: Mapping[str, Standing]) -> None:
    """Data may be prepared anew at the same path. Runs of an earlier version do not say what theirs was."""
    known: dict[str, str] = {}
    for name, standing in standings.items():
        data = (standing.summary or {}).get("data")
        if isinstance(data, dict) and isinstance(digest := data.get("digest"), str):
            known.setdefault(digest, name)
    if len(known) > 1:
        (one, first), (other, second) = list(known.items())[:2]
        raise UsageError(
            f"{first} and {second} are of different data, with the digests {one[:12]}… and {other[:12]}… (data.digest "
            "in their summary.json), so that they cannot be compared. Move the directories of the runs of one of them "
            "away and train these anew, or give the comparison another name, with name=…."
        )


def _summary(trial: Trial, standings: Mapping[str, Standing]) -> Summary:
    standing = standings[trial.counts.name] if trial.counts is not None else None
    return standing.summary or {} if standing is not None and standing.finished else {}


def _outcome(trial: Trial, standings: Mapping[str, Standing], metric: str, runs: Path) -> Outcome:
    summary, counts = _summary(trial, standings), trial.counts
    standing = standings[(counts or trial.measured).name]
    validations = list(_validations(RunDirectory(runs / counts.name).metrics, metric)) if counts and summary else []
    costs = {quantity.name: quantity.value(summary) for quantity in QUANTITIES}
    return Outcome(trial, standing, _test(summary), costs, validations)


def _test(summary: Summary) -> dict[str, float]:
    test = summary.get("test")
    values = {name: found(test, (name,)) for name in METRICS} if isinstance(test, dict) else {}
    return {name: value for name, value in values.items() if value is not None}


def _metric(judged_by: str, names: Collection[str]) -> str:
    """Perplexity and mean squared error say more than the loss that they stand for."""
    better = ("perplexity", "mse") if judged_by == "loss" else ()
    return next((name for name in better if name in names), judged_by)


def _validations(file: Path, metric: str) -> Iterator[Validation]:
    try:
        with open_regular(file) as lines:
            for line in lines:
                if b'"valid"' in line and (record := _record(line)).get("kind") == "valid":
                    value = found(record, (metric,))
                    if value is not None:
                        yield Validation(value, found(record, ("seconds",)), found(record, ("flops",)))
    except OSError:
        return


def _record(line: bytes) -> dict[str, Any]:
    """A line that was cut short is none."""
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return {}


def _target(dense: Sequence[Outcome]) -> float | None:
    last = [outcome.validations[-1].metric for outcome in dense if outcome.validations]
    return fmean(last) if last else None


def _first_to_reach(target: float, metric: str, validations: Sequence[Validation]) -> Validation | None:
    sign = 1 if METRICS[metric].higher_is_better else -1
    enough = sign * target - _ROUNDING * abs(target)
    return next((found for found in validations if sign * found.metric >= enough), None)
