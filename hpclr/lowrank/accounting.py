"""Honest sizes: trainable, stored and dense parameters side by side, operations and bytes."""

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from hpclr.lowrank.convert import densify
from hpclr.lowrank.sites import WeightSite, select


@dataclass(frozen=True)
class LayerSize:
    """One weight: its shape as a matrix, its rank, whether it is factored."""

    name: str
    shape: tuple[int, int]
    rank: int
    converted: bool


@dataclass(frozen=True)
class Summary:
    """The size of a model now, beside what it would be dense.

    Attributes:
        trainable: parameters that receive gradients.
        stored: all parameters, frozen factors included: what a checkpoint of the model holds.
        dense: parameters of the same model with dense weights.
        optimizer_bytes: bytes of optimiser state (None without an optimiser).
        gradient_bytes: bytes reduced over the processes in a step of data-parallel training.
        dense_gradient_bytes: the same for the dense model.
        flops: floating-point operations of a forward pass of the example (None without one).
        dense_flops: the same for the dense model.
        layers: every weight that is or may be low-rank.
    """

    trainable: int
    stored: int
    dense: int
    gradient_bytes: int
    dense_gradient_bytes: int
    optimizer_bytes: int | None
    flops: int | None
    dense_flops: int | None
    layers: tuple[LayerSize, ...]

    @property
    def trainable_share(self) -> float:
        """Trainable parameters as a share of the dense ones."""
        return self.trainable / self.dense if self.dense else 0.0

    @property
    def stored_share(self) -> float:
        """Stored parameters as a share of the dense ones."""
        return self.stored / self.dense if self.dense else 0.0

    @property
    def rank_share(self) -> float | None:
        """Mean over the factored layers of rank to full rank, min(m, n); None if there is none."""
        shares = [layer.rank / min(layer.shape) for layer in self.layers if layer.converted]
        return sum(shares) / len(shares) if shares else None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for a metrics file; ranks by layer name."""
        numbers = asdict(self)
        del numbers["layers"]
        return numbers | {"ranks": {layer.name: layer.rank for layer in self.layers if layer.converted}}


def summarize(
    model: nn.Module, optimizer: Optimizer | None = None, example: Tensor | tuple[Any, ...] | None = None
) -> Summary:
    """Counts parameters, bytes and operations of a model as it is now.

    Args:
        model: dense or with factored layers.
        optimizer: to count its state.
        example: an input (or a tuple of positional arguments), to count the operations of a forward pass; the batch
            size matters, since the order of multiplication depends on it. The count is of an evaluation pass.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    sites = select(model).eligible
    stored = sum(p.numel() for p in model.parameters())
    reduced = sum(p.numel() * p.element_size() for p in trained)
    return Summary(
        trainable=sum(p.numel() for p in trained),
        stored=stored,
        dense=stored + sum(_dense_surplus(site) for site in sites),
        gradient_bytes=reduced,
        dense_gradient_bytes=reduced + sum(_gradient_surplus(site) for site in sites),
        optimizer_bytes=None if optimizer is None else optimizer_bytes(optimizer),
        flops=None if example is None else count_flops(model, example),
        dense_flops=None if example is None else count_flops(densify(_meta_copy(model)), example),
        layers=tuple(LayerSize(site.name, site.shape, site.rank, site.is_lowrank) for site in sites),
    )


def _dense_surplus(site: WeightSite) -> int:
    """How many parameters more the dense form of a converted weight has; may be negative."""
    if not site.is_lowrank:
        return 0
    m, n = site.shape
    return m * n - sum(factor.numel() for factor in site.factors)


def _gradient_surplus(site: WeightSite) -> int:
    """How many bytes larger the gradient of the dense form of a converted weight is than those of its factors."""
    if not (site.is_lowrank and site.parameter.requires_grad):
        return 0
    m, n = site.shape
    reduced = sum(factor.numel() for factor in site.factors if factor.requires_grad)
    return (m * n - reduced) * site.parameter.element_size()


def optimizer_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in an optimiser's state."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


@torch.no_grad()
def count_flops(model: nn.Module, example: Tensor | tuple[Any, ...]) -> int:
    """Floating-point operations of matrix products and convolutions in one evaluation pass.

    Counted on the meta device: no memory, nothing computed, and none of the fused kernels that torch cannot count.
    """
    twin = _meta_copy(model).eval()
    with FlopCounterMode(display=False) as counter:
        twin(*_on_meta(example if isinstance(example, tuple) else (example,)))
    return int(counter.get_total_flops())


def _meta_copy(model: nn.Module) -> nn.Module:
    """The same model with shapes only."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = _meta_like(tensor)
    return copy.deepcopy(model, memo)


def _meta_like(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _on_meta(example: Any) -> Any:
    if isinstance(example, Tensor):
        return example.to("meta")
    if isinstance(example, tuple):
        return tuple(_on_meta(part) for part in example)
    return example
