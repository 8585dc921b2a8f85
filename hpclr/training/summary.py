"""What a finished run has come to, in numbers."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import msgspec
from torch import Tensor

from hpclr.config.schema import OIALR_AUTO, Oialr
from hpclr.lowrank import Summary, summarize
from hpclr.lowrank.adapters import adapter_state_dict
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
        "auto": _auto(parts),
        "adapter_bytes": _adapter_bytes(parts),
        "sizes": sizes.as_dict() | {"flops_samples": len(example)},
        "cost": dict(cost),
        "layers": [asdict(layer) for layer in sizes.layers],
    }


def _auto(parts: Assembly) -> dict[str, Any] | None:
    """What `method.auto` has decided: its settings, and at which step each layer froze; None without it."""
    section = parts.run.method
    if not isinstance(section, Oialr) or not section.auto:
        return None
    settings = {key: msgspec.to_builtins(getattr(section, key)) for key in OIALR_AUTO}
    return {**settings, "frozen_at": getattr(parts.method, "frozen_at", {})}


def _adapter_bytes(parts: Assembly) -> int | None:
    """What `hpclr export --adapter` would write; None where there are no adapters."""
    if not parts.method.adapts:
        return None
    trained = {name: p for name, p in parts.model.named_parameters() if p.requires_grad}
    return sum(tensor.nbytes for tensor in (trained | adapter_state_dict(parts.model)).values())


def _sizes(parts: Assembly, example: Tensor, *, warned: bool) -> Summary:
    """Operations are counted on a copy without data; a model that looks at its data cannot be counted so."""
    form = parts.method.dense_form
    try:
        return summarize(parts.model, parts.optimizer, example, twin=parts.countable, dense_form=form)
    except Exception as error:
        if not warned:
            warnings.warn(f"the operations of this model could not be counted: {error}", stacklevel=2)
        return summarize(parts.model, parts.optimizer, dense_form=form)
