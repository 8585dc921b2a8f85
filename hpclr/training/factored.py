# factored.py
"""Runs a model with the weights of `hpclr export --factored`. It needs torch and safetensors only: copy it."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Product(nn.Module):
    """A weight that is made of its factors U, Σ, Vᵀ whenever the layer reads it."""

    def __init__(self, factors: list[Tensor], entry: dict[str, Any]) -> None:
        super().__init__()
        self.factors, self.shape = factors, tuple(entry["shape"])
        self.transposed, self.spatial = entry["transposed"], entry.get("spatial", False)

    def forward(self, u: Tensor, sigma: Tensor, vh: Tensor) -> Tensor:
        """The weight."""
        matrix = (u * sigma if sigma.ndim == 1 else u @ sigma) @ vh  # of Σ there may be the diagonal alone
        if self.spatial:
            out, channels, height, width = self.shape
            return matrix.reshape(out, width, channels, height).permute(0, 2, 3, 1)
        return (matrix.mT if self.transposed else matrix).reshape(self.shape)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The factors that take the place of the weight."""
        return tuple(factor.to(weight) for factor in self.factors)


def three_products(layer: Any, x: Tensor) -> Tensor:
    """What nn.Linear and transformers' Conv1D compute, without the weight: y = U Σ Vᵀ x + b."""
    factors = layer.parametrizations.weight
    u, sigma, vh = factors.original0, factors.original1, factors.original2
    h = x @ vh.mT
    y: Tensor = (h * sigma if sigma.ndim == 1 else h @ sigma.mT) @ u.mT
    return y if layer.bias is None else y + layer.bias


def rows(layer: Any, ids: Tensor) -> Tensor:
    """What nn.Embedding looks up: rows of U, k numbers each, times Σ Vᵀ."""
    factors = layer.parametrizations.weight
    u, sigma, vh = factors.original0, factors.original1, factors.original2
    found = nn.functional.embedding(ids, u)
    wide: Tensor = (found * sigma if sigma.ndim == 1 else found @ sigma) @ vh
    return wide


QUICK: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {nn.Linear: three_products, nn.Embedding: rows}


def with_factors(model: nn.Module, state: dict[str, Tensor], layers: dict[str, Any]) -> nn.Module:
    """Gives a model of the original class factored weights."""
    state = dict(state)
    for entry in layers.values():
        path, _, name = entry["weight"].rpartition(".")
        layer, factors = model.get_submodule(path), [state.pop(key) for key in entry["factors"]]
        quick = three_products if type(layer).__name__ == "Conv1D" else QUICK.get(type(layer))
        if not parametrize.is_parametrized(layer, name):  # a layer may have several names
            parametrize.register_parametrization(layer, name, Product(factors, entry))
        for i, factor in enumerate(factors):
            state[f"{path}.parametrizations.{name}.original{i}".lstrip(".")] = factor
        if quick:
            layer.forward = partial(quick, layer)
    model.load_state_dict(state)
    return model


def load_factored(model: nn.Module, file: str) -> nn.Module:
    """Gives a model of the original class the weights in a safetensors file."""
    with safe_open(file, "pt") as opened:
        names, layers = opened.keys(), json.loads(opened.metadata()["layers"])
        return with_factors(model, {name: opened.get_tensor(name) for name in names}, layers)
