"""The gradient with regard to a whole weight, of layers of which factors alone are trained.

For W = U Σ Vᵀ with frozen U and V, training forms ∂Σ = Uᵀ G V and never G = ∂L/∂W itself. What it leaves out, the part
of G outside the frozen subspace, G − U Uᵀ G V Vᵀ, is what a frozen basis cannot follow.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from hpclr.lowrank.compiling import not_compiled
from hpclr.lowrank.factors import working_dtype
from hpclr.lowrank.layers import LowRankModule
from hpclr.lowrank.product import CONVOLUTIONS, Arithmetic, ConvGeometry, Factors, dense, in_compute_dtype
from hpclr.lowrank.sites import WeightSite


@contextmanager
def dense_gradients(
    sites: Mapping[str, WeightSite], gradients: MutableMapping[str, Tensor] | None = None
) -> Iterator[MutableMapping[str, Tensor]]:
    """Within it backward passes leave the gradients with regard to whole weights too.

    Forward passes rebuild the weights meanwhile, and give the same but for rounding; what torch.compile has compiled
    runs as it is written. A copy that is made of the model within it goes on to rebuild, and adds nothing.

    Args:
        sites: layer name → weight; those that are held as frozen U and V with a trained Σ are followed, others are not.
        gradients: the sums so far, to which is added; None: there are none.

    Yields:
        Layer name → G, m×n, the sum over all backward passes so far, in float32 or more; layers through which none has
        gone are absent. That of a head with the weight of an embedding is the sum over both uses.
    """
    found: MutableMapping[str, Tensor] = {} if gradients is None else gradients
    followed = {name: site for name, site in sites.items() if site.is_lowrank and not _module(site).trains_bases}
    names = {id(site.factors.sigma): name for name, site in followed.items()}

    def add(name: str, gradient: Tensor, first: int) -> None:
        gradient, rows = gradient.detach().to(working_dtype(gradient.dtype)), followed[name].shape[0]
        if len(gradient) < rows:
            gradient = F.pad(gradient, (0, 0, first, rows - first - len(gradient)))
        found[name] = found[name] + gradient if name in found else gradient

    arithmetic = _rebuilding(lambda factors: names.get(id(factors.sigma)), add)
    modules = [module for site in followed.values() for module in (site.module, *site.followers())]
    with not_compiled(), _calculating(arithmetic, cast(list[LowRankModule], modules)):
        yield found


@contextmanager
def _calculating(arithmetic: Arithmetic, modules: Iterable[LowRankModule]) -> Iterator[None]:
    """In the block these modules multiply so; blocks may be nested."""
    former = {module: module.__dict__.get("arithmetic") for module in modules}
    for module in former:
        module.__dict__["arithmetic"] = arithmetic
    try:
        yield
    finally:
        for module, own in former.items():
            del module.__dict__["arithmetic"]
            if own is not None:
                module.__dict__["arithmetic"] = own


def outside(gradient: Tensor, factors: Factors) -> Tensor:
    """G − U Uᵀ G V Vᵀ (m×n): what a gradient G asks for that no Σ (k×k) between these bases can give."""
    u, v = (factor.detach().to(gradient) for factor in (factors.u, factors.vh.mT))
    return gradient - u @ ((u.mT @ gradient) @ v) @ v.mT


def _module(site: WeightSite) -> LowRankModule:
    return cast(LowRankModule, site.module)


def _rebuilding(name_of: Callable[[Factors], str | None], add: Callable[[str, Tensor, int], None]) -> Arithmetic:
    """Products with W rebuilt, the gradient of which is handed on; of a copy of the model, which has no name, not."""

    def weight(factors: Factors, name: str | None, first: int = 0) -> Tensor:
        matrix = dense(factors)
        if name is not None and matrix.requires_grad:
            matrix.register_hook(lambda gradient: add(name, gradient, first))
        return matrix

    def rebuilt(factors: Factors) -> Tensor:
        return weight(factors, name_of(factors))

    def linear(x: Tensor, factors: Factors, bias: Tensor | None) -> Tensor:
        name, u = name_of(factors), factors.u
        first = u.storage_offset() // max(1, u.stride(0))  # attention to something else takes a packed weight in parts
        x, factors = in_compute_dtype(x, factors)
        return F.linear(x, weight(factors, name, first), bias)

    def convolution(x: Tensor, factors: Factors, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
        name = name_of(factors)
        x, factors = in_compute_dtype(x, factors)
        matrix = weight(factors, name)
        kernel: Any = geometry.kernel
        return CONVOLUTIONS[len(kernel)](x, matrix.view(matrix.shape[0], -1, *kernel), bias, *geometry[1:])

    def embedding(ids: Tensor, factors: Factors, padding: int | None) -> Tensor:
        return F.embedding(ids, rebuilt(factors), padding)

    return Arithmetic(rebuilt, linear, convolution, embedding)
