"""What a finished run has come to, in numbers."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from hpclr.lowrank import Summary, summarize
from hpclr.training.assembly import Assembly
from hpclr.training.scores import Score
from hpclr.training.state import Position


def summary_of(parts: Assembly, position: Position, test: Score, cost: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of `summary.json`: which data, scores, sizes, operations, time, what training has cost, and ranks.

    Args:
        parts: as they are at the end of the run.
        position: likewise.
        test: the score on the test split.
        cost: as `Meter.totals` gives it.
    """
    example = parts.example()
    sizes = _sizes(parts, example, warned=position.flops is None)
    return {
        "name": parts.run.name,
        "method": parts.run.method.name,
        "task": parts.task.name,
        "data": {"digest": parts.dataset.digest},
        "steps": position.step,
        "seconds": round(position.seconds, 2),
        "test": {**test.values, "samples": test.samples},
        "best_validation": {**position.best_scores, "step": position.best_step},
        "sizes": sizes.as_dict() | {"flops_samples": len(example)},
        "cost": dict(cost),
        "layers": [asdict(layer) for layer in sizes.layers],
    }


def _sizes(parts: Assembly, example: Tensor, *, warned: bool) -> Summary:
    """Operations are counted on a copy without data; a model that looks at its data cannot be counted so."""
    try:
        return summarize(parts.model, parts.optimizer, example)
    except Exception as error:
        if not warned:
            warnings.warn(f"the operations of this model could not be counted: {error}", stacklevel=2)
        return summarize(parts.model, parts.optimizer)
