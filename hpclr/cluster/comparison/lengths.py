"""Whether methods fit the length of their runs, as far as that can be said before any of them trains."""

from collections.abc import Sequence

from hpclr.cluster.sweep.files import Point
from hpclr.config import RunFile
from hpclr.config.schema import Cuttlefish
from hpclr.errors import UsageError

# Of each method the key that says when its weights become low-rank.
_MOMENTS = {"oialr": "delay", "svd_training": "prune_at", "truncate": "at", "cuttlefish": "delay"}


def check_moments(points: Sequence[Point]) -> None:
    """Refuses methods whose moment comes after the end of their run; their turn may come hours after dense's.

    Args:
        points: the runs, all of the same data.

    Raises:
        UsageError: if there are such methods, with all of them; if the data cannot be opened, where that has to be.
    """
    moments = [(point, _moment(point.run)) for point in points]
    needs_data = any(moment >= 1 and point.run.train.steps is None for point, moment in moments)
    batches = _batches(points[0].run) if needs_data else None
    faults = [fault for point, moment in moments if (fault := _fault(point, moment, batches))]
    if faults:
        raise UsageError("\n".join(faults))


def _moment(run: RunFile) -> float:
    key = _MOMENTS.get(run.method.name)
    return 0 if key is None else float(getattr(run.method, key))


def _batches(run: RunFile) -> int | None:
    """In an epoch; None for windows, whose number the order of training decides."""
    from hpclr.data import open_dataset
    from hpclr.training.assembly import data_files

    with open_dataset(data_files(run)) as dataset:
        known = dataset.task == "classification" and "train" in dataset.sizes
        return -(-dataset.sizes["train"] // run.data.batch_size) if known else None


def _fault(point: Point, moment: float, batches: int | None) -> str | None:
    from hpclr.methods.schedule import in_steps

    train, method = point.run.train, point.run.method
    total = train.steps or (train.epochs or 0) * (batches or 0)
    if not moment or not total:
        return None
    step = in_steps("the moment", moment, total)
    if step >= total:
        return (
            f"{point.name}: method.{_MOMENTS[method.name]} is {moment:g} but the run has {total} steps, so nothing "
            f"would ever become low-rank; make it less than {total}, or a fraction of the run below 1"
        )
    return _too_few(point.name, method, step, total) if isinstance(method, Cuttlefish) else None


def _too_few(name: str, method: Cuttlefish, delay: int, total: int) -> str | None:
    """Whether the measurements that Cuttlefish needs fit before the delay."""
    from hpclr.methods.checks import check_measurements
    from hpclr.methods.schedule import in_steps

    try:
        check_measurements(method.window, in_steps("every", method.every, total), delay)
    except ValueError as error:
        return f"{name}: method: {error}"
    return None
