"""The comparison as a picture."""

from collections.abc import Sequence

from hpclr.cluster.comparison.files import Comparison
from hpclr.cluster.comparison.outcomes import Outcome, Outcomes
from hpclr.report.comparison import Series, picture_of
from hpclr.training.scores import METRICS


def drawn(comparison: Comparison, found: Outcomes, kind: str) -> bytes:
    """What is finished, as svg, png or pdf.

    Raises:
        UsageError: as `picture_of`.
    """
    in_points = METRICS[found.metric].form.endswith("%")
    series = [_series(label, found, 100.0 if in_points else 1.0) for label in found.by_label if found.done(label)]
    title = f"{comparison.name}: equal {comparison.equal}, mean ± standard deviation over seeds"
    return picture_of(kind, title, f"{found.metric}, %" if in_points else found.metric, series)


def _series(label: str, found: Outcomes, scale: float) -> Series:
    done = found.done(label)
    scores = [scale * outcome.test[found.metric] for outcome in done if found.metric in outcome.test]
    curves = [_curve(outcome, scale) for outcome in done]
    return Series(label, scores, _costs(done, "stored_parameters"), _costs(done, "training_flops"), curves)


def _costs(done: Sequence[Outcome], name: str) -> list[float]:
    return [cost for outcome in done if (cost := outcome.costs[name]) is not None]


def _curve(outcome: Outcome, scale: float) -> list[tuple[float, float]]:
    return [(one.seconds, scale * one.metric) for one in outcome.validations if one.seconds is not None]
