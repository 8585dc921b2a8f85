"""Honest sizes: trainable, stored and dense parameters side by side, operations and bytes."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from hpclr.lowrank.adapters import AdaptedModule, adapted_modules, remove_adapters
from hpclr.lowrank.convert import densify
from hpclr.lowrank.sites import WeightSite, select
from hpclr.lowrank.svd_layers import TrainedFactors


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
        dense: parameters of the same model with dense weights and without adapters.
        optimizer_bytes: bytes of optimiser state (None without an optimiser).
        gradient_bytes: bytes reduced over the processes in a step of data-parallel training.
        dense_gradient_bytes: the same for the dense model, in which the weights under adapters are trained.
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
    model: nn.Module,
    optimizer: Optimizer | None = None,
    example: Tensor | tuple[Any, ...] | None = None,
    *,
    twin: nn.Module | None = None,
    dense_form: Callable[[nn.Module], nn.Module] | None = None,
) -> Summary:
    """Counts parameters, bytes and operations of a model as it is now.

    Args:
        model: dense or with factored layers.
        optimizer: to count its state.
        example: an input (or a tuple of positional arguments), to count the operations of a forward pass; the batch
            size matters, since the order of multiplication depends on it. The count is of an evaluation pass.
        twin: the same model without data, to count operations on where the model itself cannot be copied.
        dense_form: makes a copy of the model dense, in place; None: `made_dense`, which knows hpclr's own forms.
    """
    if dense_form is not None:
        return _of_other_form(model, optimizer, example, dense_form)
    twin = model if twin is None else twin
    trained = [p for p in model.parameters() if p.requires_grad]
    sites, adapted = select(model).eligible, [layer for _, layer in adapted_modules(model)]
    stored = sum(p.numel() for p in model.parameters())
    reduced = sum(p.numel() * p.element_size() for p in trained)
    return Summary(
        trainable=sum(p.numel() for p in trained),
        stored=stored,
        dense=stored + sum(_dense_surplus(site) for site in sites) - sum(_size_of_adapter(layer) for layer in adapted),
        gradient_bytes=reduced,
        dense_gradient_bytes=reduced
        + sum(_gradient_surplus(site) for site in sites)
        + sum(_surplus_under_adapter(layer) for layer in adapted),
        optimizer_bytes=None if optimizer is None else optimizer_bytes(optimizer),
        flops=None if example is None else count_flops(twin, example),
        dense_flops=None if example is None else count_flops(made_dense(meta_copy(twin)), example),
        layers=tuple(LayerSize(site.name, site.shape, site.rank, site.is_lowrank) for site in sites),
    )


def _of_other_form(
    model: nn.Module,
    optimizer: Optimizer | None,
    example: Tensor | tuple[Any, ...] | None,
    dense_form: Callable[[nn.Module], nn.Module],
) -> Summary:
    """The sizes of a model of which somebody else knows the dense form."""
    dense = dense_form(meta_copy(model))
    return replace(
        summarize(model, optimizer, example),
        dense=sum(p.numel() for p in dense.parameters()),
        dense_gradient_bytes=sum(p.numel() * p.element_size() for p in dense.parameters() if p.requires_grad),
        dense_flops=None if example is None else count_flops(dense, example),
    )


def _dense_surplus(site: WeightSite) -> int:
    """How many parameters more the dense form of a converted weight has; may be negative."""
    if not site.is_lowrank:
        return 0
    m, n = site.shape
    return m * n - sum(factor.numel() for factor in site.factors)


def _gradient_surplus(site: WeightSite) -> int:
    """How many bytes larger the gradient of the dense form of a converted weight is than those of its factors."""
    if not (site.is_lowrank and any(factor.requires_grad for factor in site.factors)):
        return 0
    m, n = site.shape
    reduced = sum(factor.numel() for factor in site.factors if factor.requires_grad)
    return (m * n - reduced) * site.parameter.element_size()


def _size_of_adapter(layer: AdaptedModule) -> int:
    return sum(layer.parameter(name).numel() for name in layer.names)


def _surplus_under_adapter(layer: AdaptedModule) -> int:
    """How many bytes larger the gradient of the weight is than those of its adapter."""
    trained = [layer.parameter(name) for name in layer.trained if layer.parameter(name).requires_grad]
    reduced = sum(parameter.numel() for parameter in trained)
    return (layer.weight.numel() - reduced) * layer.weight.element_size() if trained else 0


def made_dense(model: nn.Module) -> nn.Module:
    """Gives a model dense weights and takes its adapters away, in place; returns it."""
    return remove_adapters(densify(model))


def optimizer_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in an optimiser's state, however deep in lists and dictionaries."""
    return sum(value.numel() * value.element_size() for value in _tensors_in(optimizer.state))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)


@torch.no_grad()
def count_flops(model: nn.Module, example: Tensor | tuple[Any, ...]) -> int:
    """Floating-point operations of matrix products and convolutions in one evaluation pass.

    Counted on the meta device: no memory, nothing computed, and none of the fused kernels that torch cannot count.
    """
    twin = meta_copy(model).eval()
    inputs = _on_meta(example if isinstance(example, tuple) else (example,))
    return _counted(lambda: twin(*inputs))


@torch.enable_grad()
def count_training_flops(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    *,
    dense: bool = False,
    dense_form: Callable[[nn.Module], nn.Module] | None = None,
) -> int:
    """The same of a forward pass and the backward pass to the gradients of all that is trained.

    Counted on a copy in evaluation mode, since nothing may be drawn or sent to other processes for it; what a model
    does in training mode only is not in the count, but that nested layers take a part of their directions.

    Args:
        model: dense or with factored layers.
        loss: gives the loss of such a model, with inputs on the meta device.
        dense: count for the model with dense weights and without adapters.
        dense_form: as for `summarize`.
    """
    twin = meta_copy(model).eval()
    if dense:
        (dense_form or made_dense)(twin)
    for layer in twin.modules():
        if isinstance(layer, TrainedFactors) and layer.leading:
            layer.training = True  # where it takes a part of its directions
    return _counted(lambda: loss(twin).backward())


@torch.enable_grad()
def count_gradient_flops(value: Callable[[], Tensor], model: nn.Module) -> int:
    """The same of a term of the loss that depends on the parameters alone: computed once, but no gradient is changed.

    Args:
        value: gives the term, of `model` itself.
        model: whose trained parameters the gradients are for.
    """

    def compute() -> None:
        term, trained = value(), [p for p in model.parameters() if p.requires_grad]
        if term.requires_grad:
            torch.autograd.grad(term, trained, allow_unused=True)

    return _counted(compute)


def _counted(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False, custom_mapping=_CORRECTED) as counter:
        work()
    return int(counter.get_total_flops())


def _convolution_backward(grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: Any, **__: Any) -> int:
    """For each of the two gradients what the forward pass takes; torch counts that of the weight once for each group.

    Args:
        grad: shape of the output's gradient.
        x: shape of the input.
        weight: (out, in/groups, *kernel).
        rest: the other arguments of `aten.convolution_backward`.
    """
    transposed, (of_input, of_weight, _) = rest[4], rest[7]
    positions = prod((x if transposed else grad)[2:])
    return 2 * x[0] * positions * prod(weight) * (int(of_input) + int(of_weight))


_CORRECTED = {torch.ops.aten.convolution_backward: _convolution_backward}


def meta_copy(model: nn.Module) -> nn.Module:
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
