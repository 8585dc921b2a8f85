"""Whether methods fit the length of their runs, as far as that can be said before any of them trains."""

from collections.abc import Sequence

from hpclr.cluster.sweep.files import Point
from hpclr.config import RunFile
from hpclr.errors import UsageError
from hpclr.training.lengths import check_length, moment_of


def check_moments(points: Sequence[Point]) -> None:
    """Refuses methods whose moment comes after the end of their run; their turn may come hours after dense's.

    Args:
        points: the runs, all of the same data.

    Raises:
        UsageError: if there are such methods, with all of them; if the data cannot be opened, where that has to be.
    """
    moments = [(point, moment_of(point.run.method)) for point in points]
    needs_data = any(moment >= 1 and point.run.train.steps is None for point, moment in moments)
    batches = _batches(points[0].run) if needs_data else None
    faults = [fault for point, moment in moments if (fault := _fault(point, moment, batches))]
    if faults:
        raise UsageError("\n".join(faults))


def _batches(run: RunFile) -> int | None:
    """In an epoch; None for windows, whose number the order of training decides."""
    from hpclr.data import open_dataset
    from hpclr.training.assembly import data_files

    with open_dataset(data_files(run)) as dataset:
        known = dataset.task == "classification" and "train" in dataset.sizes
        return -(-dataset.sizes["train"] // run.data.batch_size) if known else None


def _fault(point: Point, moment: float, batches: int | None) -> str | None:
    train = point.run.train
    total = train.steps or (train.epochs or 0) * (batches or 0)
    if not moment or not total:
        return None
    try:
        check_length(point.run.method, total)
    except ValueError as error:
        return f"{point.name}: method: {error}"
    return None
