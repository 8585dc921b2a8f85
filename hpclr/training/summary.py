"""What a finished run has come to, in numbers."""

from dataclasses import asdict
from typing import Any

from hpclr.lowrank import summarize
from hpclr.training.assembly import Assembly
from hpclr.training.state import Position
from hpclr.training.tasks import Score


def summary_of(parts: Assembly, position: Position, test: Score | None) -> dict[str, Any]:
    """The contents of `summary.json`: scores, sizes, operations, time and ranks.

    Args:
        parts: as they are at the end of the run.
        position: likewise.
        test: the score on the test split, where there is one.
    """
    example = parts.example()
    sizes = summarize(parts.model, parts.optimizer, example)
    return {
        "name": parts.run.name,
        "method": parts.run.method.name,
        "steps": position.step,
        "seconds": round(position.seconds, 2),
        "test": test._asdict() if test else None,
        "best_validation": {"accuracy": position.best_accuracy, "step": position.best_step},
        "sizes": sizes.as_dict() | {"flops_samples": len(example)},
        "layers": [asdict(layer) for layer in sizes.layers],
    }
