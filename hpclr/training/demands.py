"""What each task wants of a run file; known without loading torch, so that a job can be checked before it waits."""

from typing import NamedTuple

from hpclr.config import RunFile
from hpclr.config.describe import show
from hpclr.errors import UsageError
from hpclr.training.scores import judged_by


class Demands(NamedTuple):
    """What a task wants.

    Attributes:
        data: what its datasets hold, in words.
        metrics: what its scores hold besides the loss.
        needs: the keys of `data` that it cannot do without.
        refuses: keys of the run file that mean nothing to it.
    """

    data: str
    metrics: tuple[str, ...]
    needs: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()


DEMANDS = {
    "classification": Demands(
        "samples with labels", ("accuracy",), refuses=("data.context", "data.horizon", "data.stride")
    ),
    "forecasting": Demands("a time series", ("mse", "mae"), ("context", "horizon"), ("train.label_smoothing",)),
    "language": Demands("text", ("perplexity", "accuracy"), ("context",), ("data.horizon",)),
}


def check_demands(run: RunFile, task: str) -> None:
    """Raises UsageError if the run file lacks what a task needs, or has keys for other tasks."""
    demands = DEMANDS[task]
    holds = f"{show(run.data.path)} holds {demands.data} (its task is {task})"
    for key in demands.needs:
        if getattr(run.data, key) is None:
            raise UsageError(f"data.{key} is missing: {holds}, so a run needs data.{' and data.'.join(demands.needs)}")
    for name in demands.refuses:
        section, key = name.split(".")
        value = getattr(getattr(run, section), key)
        if value:
            raise UsageError(f"{name} is {show(value)}, but {holds}, for which that means nothing; take it out")
    if judged_by(run) not in ("loss", *demands.metrics):
        raise UsageError(
            f"validation.metric is {judged_by(run)}, but {holds}, of which the metrics are loss and "
            f"{' and '.join(demands.metrics)}; choose one of them, or auto"
        )
