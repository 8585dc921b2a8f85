"""Weights on their way to programs that know nothing of low rank: which factors make up which dense weight.

What `factored_weights` says of a model goes beside its state dict. With it, dense weights can be had from
the state dict alone, without the model.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpclr.lowrank.kinds import TransposedWeight
from hpclr.lowrank.layers import LowRankModule, Slot
from hpclr.lowrank.product import Factors
from hpclr.lowrank.svd_layers import SpatialWeight


@dataclass(frozen=True)
class FactoredWeight:
    """A dense weight, W = U Σ Vᵀ (transposed if it says so) in the given shape, and where its factors are.

    Of Σ there may be only the diagonal.

    Attributes:
        weight: the dense weight's name in the state dict of the dense model.
        factors: the names of U (m×k), Σ (k×k, or k) and Vᵀ (k×n) in that of the factored one.
        shape: the dense weight's shape.
        transposed: whether the dense weight is the transpose of the product (Hugging Face's Conv1D).
        spatial: whether the rows of the product are (out, kw) and its columns (in/groups, kh), of a convolution.
    """

    weight: str
    factors: tuple[str, str, str]
    shape: tuple[int, ...]
    transposed: bool = False
    spatial: bool = False


def factored_weights(model: nn.Module) -> dict[str, FactoredWeight]:
    """Every factored weight of a model by the name of its layer; under each of its names, if it has several.

    An embedding that holds the factors of a head has them under names of its own, as a state dict does.
    """
    return {
        ".".join(filter(None, (path, slot.stem.rstrip("_")))): _described(path, module, slot)
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LowRankModule)
        for slot in module.slots
        if module.is_lowrank(slot)
    }


def _described(path: str, module: LowRankModule, slot: Slot) -> FactoredWeight:
    prefix = f"{path}." if path else ""
    u, sigma, vh = (prefix + name for name in slot.names)
    shape = module.from_matrix(torch.empty(module.matrix_shape(slot), device="meta"), slot).shape
    transposed, spatial = isinstance(module, TransposedWeight), isinstance(module, SpatialWeight)
    return FactoredWeight(prefix + slot.weight, (u, sigma, vh), tuple(shape), transposed, spatial)


def tied_names(model: nn.Module) -> dict[str, str]:
    """The further names of parameters that a state dict holds more than once, each with the first name."""
    first = {parameter: name for name, parameter in model.named_parameters()}
    names = model.named_parameters(remove_duplicate=False)
    return {name: first[parameter] for name, parameter in names if name != first[parameter]}


def looks_factored(names: Iterable[str]) -> str | None:
    """The name of an entry that by its name and those of its neighbours is a layer's Σ; None if there is none."""
    known = set(names)
    stems = ((name, name.removesuffix(core)) for core in ("sigma", "s") for name in known if name.endswith(core))
    return min((name for name, stem in stems if {f"{stem}u", f"{stem}vh"} <= known), default=None)


def check_factors(state: Mapping[str, Tensor], layers: Mapping[str, FactoredWeight]) -> None:
    """Checks that a state dict holds the factors that a description names, and that they make up its weights.

    Raises:
        ValueError: naming the layer, what is expected and what is found.
    """
    uses = Counter(key for layer in layers.values() for key in (layer.weight, *layer.factors))
    for name, layer in layers.items():
        shapes = [tuple(state[key].shape) if key in state else None for key in layer.factors]
        if None in shapes or not _fit(shapes, layer):
            raise ValueError(
                f"layer '{name}': expected {', '.join(layer.factors)} of shapes m×k, k×k or k, and k×n whose product "
                f"has shape {layer.shape}{_arranged(layer)}, found shapes {shapes}"
            )
        if layer.weight in state or any(uses[key] > 1 for key in (layer.weight, *layer.factors)):
            raise ValueError(f"layer '{name}': its weight {layer.weight}, or one of its factors, is there twice")


def _arranged(layer: FactoredWeight) -> str:
    return " transposed" if layer.transposed else " spatial-wise" if layer.spatial else ""


def _fit(shapes: list[tuple[int, ...] | None], layer: FactoredWeight) -> bool:
    u, inner, vh = shapes
    if u is None or vh is None or len(u) != 2 or len(vh) != 2:
        return False
    (m, k), (rank, n) = u, vh
    if inner not in ((k, k), (k,)) or rank != k:
        return False
    return fits(layer.shape, (m, n), transposed=layer.transposed, spatial=layer.spatial)


def fits(shape: tuple[int, ...], matrix: tuple[int, int], *, transposed: bool, spatial: bool) -> bool:
    """Whether a weight of this shape can be this product, arranged as a description says."""
    m, n = matrix
    if transposed:
        return shape == (n, m)
    if spatial:
        return len(shape) == 4 and (shape[0] * shape[3], shape[1] * shape[2]) == matrix
    return shape[:1] == (m,) and math.prod(shape) == m * n


def dense_state_dict(
    state: Mapping[str, Tensor], layers: Mapping[str, FactoredWeight], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The state dict of the dense model, in its order; products are computed in float64 and rounded once.

    Args:
        state: the state dict of a factored model.
        layers: its factored weights, as `factored_weights` gives them.
        dtype: of the floating tensors of the result; None: as stored.

    Raises:
        ValueError: if state and layers do not fit, or a number is too large for `dtype`.
    """
    check_factors(state, layers)
    by_u = {layer.factors[0]: layer for layer in layers.values()}
    inside = {key for layer in layers.values() for key in layer.factors}
    dense: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key in by_u:
            layer = by_u[key]
            dense[layer.weight] = _cast(layer.weight, _product(state, layer), dtype or tensor.dtype)
        elif key not in inside:
            dense[key] = _cast(key, tensor, dtype)
    return dense


def _product(state: Mapping[str, Tensor], layer: FactoredWeight) -> Tensor:
    u, sigma, vh = Factors(*(state[key].double() for key in layer.factors))
    matrix = (u * sigma if sigma.ndim == 1 else u @ sigma) @ vh
    if layer.spatial:
        out, channels, height, width = layer.shape
        return matrix.reshape(out, width, channels, height).permute(0, 2, 3, 1).contiguous()
    return (matrix.mT if layer.transposed else matrix).reshape(layer.shape).contiguous()


def cast_state_dict(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A state dict with its floating tensors in another type; None changes nothing.

    Raises:
        ValueError: if a finite number is too large for `dtype`, naming the tensor.
    """
    return {key: _cast(key, tensor, dtype) for key, tensor in state.items()}


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or dtype == tensor.dtype or not tensor.is_floating_point():
        return tensor
    cast, largest = tensor.to(dtype), torch.finfo(dtype).max
    if largest < torch.finfo(tensor.dtype).max and (lost := cast.isinf() & tensor.isfinite()).any():
        raise ValueError(
            f"'{name}' holds numbers up to {tensor[lost].abs().max():.4g}, too large for "
            f"{str(dtype).removeprefix('torch.')}, whose largest is {largest:.4g}"
        )
    return cast
