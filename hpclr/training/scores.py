"""What a score is made of: the metrics of all tasks, how they are written, and which way is better."""

from collections.abc import Mapping
from typing import NamedTuple

from hpclr.config import RunFile


class Metric(NamedTuple):
    """How a metric is written, and read."""

    form: str
    higher_is_better: bool = False


METRICS = {  # in the order in which they are shown
    "perplexity": Metric(".3f"),
    "accuracy": Metric(".2%", higher_is_better=True),
    "mse": Metric(".4f"),
    "mae": Metric(".4f"),
    "loss": Metric(".4f"),
}


class Score(NamedTuple):
    """How a model does on a split."""

    loss: float
    metrics: dict[str, float]  # of its task
    samples: int

    @property
    def values(self) -> dict[str, float]:
        """The loss and the metrics."""
        return {"loss": self.loss, **self.metrics}

    def __str__(self) -> str:
        return shown(self.values)


def shown(values: Mapping[str, float | None]) -> str:
    """A score in words, such as "accuracy 93.25%, loss 0.2143"; a loss that is among the metrics is not repeated."""
    names = [name for name in METRICS if values.get(name) is not None and not (name == "loss" and "mse" in values)]
    return ", ".join(f"{name} {values[name]:{METRICS[name].form}}" for name in names)


def judged_by(run: RunFile) -> str:
    """The metric that makes a model of a run the best so far."""
    if run.validation.metric != "auto":
        return run.validation.metric
    return "accuracy" if run.data.context is None else "loss"
