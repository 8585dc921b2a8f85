"""GaLore (Zhao et al. 2024, arXiv 2403.03507): AdamW in the space of a few directions of each gradient.

The arithmetic is that of the package galore-torch, which this module alone imports; weights stay dense. Its projectors
are objects, of which checkpoints know nothing. Here they exist during a step only; between steps the state of a
parameter has their one matrix, `ortho_matrix` (r×n or m×r), beside the moments and the count of steps.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import ceil, isfinite
from typing import Annotated, Any, Literal

import msgspec
import torch
from galore_torch import GaLoreAdamW
from galore_torch.galore_projector import GaLoreProjector
from msgspec import Meta
from torch import Tensor, nn
from torch.optim import Optimizer

from hpclr.config.describe import show
from hpclr.config.schema import Optimizer as OptimizerSection
from hpclr.errors import TrainingDivergedError, UsageError
from hpclr.lowrank import FactorizationError, select
from hpclr.lowrank.factors import svd

_BASIS = "ortho_matrix"
_EXPECTED = {
    "rank": "a whole number from 1 on, or a share of a layer's smaller side, above 0 and up to 1.0",
    "update_proj_gap": "a whole number of steps from 1 on",
    "scale": "a finite number above 0",
    "proj_type": "std, left or right",
}


class Settings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What `optimizer.args` may say; the names are the package's."""

    rank: Annotated[int, Meta(ge=1)] | Annotated[float, Meta(gt=0, le=1)] = 0.25  # or a share of the smaller side
    update_proj_gap: Annotated[int, Meta(ge=1)] = 200  # steps from one decomposition to the next
    scale: Annotated[float, Meta(gt=0)] = 0.25  # factor on the step, once it is back in the weight's space
    proj_type: Literal["std", "left", "right"] = "std"  # which side is projected; std: the one that makes it smaller

    def __post_init__(self) -> None:
        if not isfinite(self.scale):
            raise ValueError("scale must be finite")

    def rank_of(self, shape: torch.Size) -> int:
        """The rank for a matrix; a share is rounded up, and exact: 0.55 of 100 is 55."""
        rank = ceil(Fraction(str(self.rank)) * min(shape)) if isinstance(self.rank, float) else self.rank
        return int(min(rank, *shape))


def build_galore(section: OptimizerSection, model: nn.Module) -> Optimizer:
    """AdamW, with GaLore for the matrices among the weights that could be low-rank.

    Args:
        section: of the run file.
        model: dense. Convolutions, embeddings, biases and norms get ordinary AdamW.

    Raises:
        UsageError: for options that it does not take, and for a model without such a matrix.
    """
    settings, options = _settings(section), _options(section)
    by_rank = defaultdict(list)
    for site in select(model).eligible:
        weight = site.parameter
        if weight.ndim == 2 and weight.requires_grad:
            by_rank[settings.rank_of(weight.shape)].append(weight)
    if not by_rank:
        raise UsageError(
            "optimizer: GaLore projects the gradients of matrices, and this model has no linear layer that it could "
            "take; use adamw"
        )
    projected = {weight for weights in by_rank.values() for weight in weights}
    others = [p for p in model.parameters() if p.requires_grad and p not in projected]
    fixed = {"update_proj_gap": settings.update_proj_gap, "scale": settings.scale, "proj_type": settings.proj_type}
    groups: list[dict[str, Any]] = [{"params": weights, "rank": rank} | fixed for rank, weights in by_rank.items()]
    return GaLore([{"params": others}, *groups], lr=section.lr, no_deprecation_warning=True, **options)


def _settings(section: OptimizerSection) -> Settings:
    for key, value in section.args.items():
        if key not in _EXPECTED:
            raise UsageError(f"optimizer.args.{key}: galore_adamw has no such option; it has {', '.join(_EXPECTED)}")
        try:
            msgspec.convert({key: value}, Settings)
        except msgspec.ValidationError as error:
            raise UsageError(f"optimizer.args.{key}: expected {_EXPECTED[key]}, found {show(value)}") from error
    return msgspec.convert(section.args, Settings)


def _options(section: OptimizerSection) -> dict[str, Any]:
    for key in ("momentum", "nesterov"):
        if getattr(section, key) is not None:
            raise UsageError(f"optimizer.{key}: galore_adamw has no such option; it has betas, eps and weight_decay")
    options = {key: getattr(section, key) for key in ("betas", "eps", "weight_decay")}
    return {key: value for key, value in options.items() if value is not None}


class Projector(GaLoreProjector):  # type: ignore[misc]
    """Finds the directions in the gradient's own precision or better; the package's own uses float32 for float64.

    What it finds shares no memory with the rest of the decomposition, and has the strides that it will have when it
    comes from a checkpoint: the rounding of products depends on them.
    """

    def get_orthogonal_matrix(self, weights: Tensor, rank: int, type: str) -> Tensor:
        """The leading right singular vectors (r×n) or left ones (m×r) of a gradient."""
        u, _, vh = svd(weights)
        found = vh[:rank] if type == "right" else u[:, :rank]
        return found.to(weights.dtype).clone(memory_format=torch.contiguous_format)


class GaLore(GaLoreAdamW):  # type: ignore[misc]
    """The package's AdamW, with nothing but tensors and numbers in its state between steps."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step.

        Raises:
            TrainingDivergedError: if a gradient that is to be decomposed is not finite.
        """
        for group, weight in self._projected():
            state = self.state[weight]
            kept = {key: group[key] for key in ("update_proj_gap", "scale", "proj_type")}
            state["projector"] = Projector(group["rank"], **kept)
            state["projector"].ortho_matrix = state.pop(_BASIS, None)
        try:
            loss: float | None = super().step(closure)
        except FactorizationError as error:
            raise TrainingDivergedError(
                f"GaLore cannot find the directions of a gradient: {error}. Training cannot go on; a lower "
                "optimizer.lr, train.clip_norm or a longer schedule.warmup_steps usually helps."
            ) from error
        for _, weight in self._projected():
            state = self.state[weight]
            state[_BASIS] = state.pop("projector").ortho_matrix
        return loss

    def _projected(self) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
        """The matrices that have a gradient, each with its group."""
        for group in self.param_groups:
            if "rank" in group:
                yield from ((group, weight) for weight in group["params"] if weight.grad is not None)
