"""What a finished run has come to, in numbers."""

import warnings
from dataclasses import asdict
from typing import Any

from torch import Tensor

from hpclr.lowrank import Summary, summarize
from hpclr.training.assembly import Assembly
from hpclr.training.state import Position
from hpclr.training.tasks import Score


def summary_of(parts: Assembly, position: Position, test: Score) -> dict[str, Any]:
    """The contents of `summary.json`: scores, sizes, operations, time and ranks.

    Args:
        parts: as they are at the end of the run.
        position: likewise.
        test: the score on the test split.
    """
    example = parts.example()
    sizes = _sizes(parts, example)
    return {
        "name": parts.run.name,
        "method": parts.run.method.name,
        "steps": position.step,
        "seconds": round(position.seconds, 2),
        "test": test._asdict(),
        "best_validation": {"accuracy": position.best_accuracy, "step": position.best_step},
        "sizes": sizes.as_dict() | {"flops_samples": len(example)},
        "layers": [asdict(layer) for layer in sizes.layers],
    }


def _sizes(parts: Assembly, example: Tensor) -> Summary:
    """Operations are counted on a copy without data; a model that looks at its data cannot be counted so."""
    try:
        return summarize(parts.model, parts.optimizer, example)
    except Exception as error:
        warnings.warn(f"the operations of this model could not be counted: {error}", stacklevel=2)
        return summarize(parts.model, parts.optimizer)
