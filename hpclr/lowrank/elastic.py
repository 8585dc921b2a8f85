"""Trained models at lower ranks: directions in order of what they weigh, then the leading ones alone.

    by size          W = Σ s_i u_i v_iᵀ             the best W_k for inputs that are all alike (Eckart and Young 1936)
    by output        W C^½ = Σ s_i u_i v_iᵀ         W_k = U_k U_kᵀ W, the best for inputs of second moment C = E[x xᵀ]
    as trained       W = A B                        W_k = A_{:k} B_{:k}, where training has put them into order

The second is the order of the function that a layer is, not of its weight (`hpclr.lowrank.regression.decompose_in`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hpclr.lowrank.factors import SVD, svd
from hpclr.lowrank.regression import decompose_in
from hpclr.lowrank.sites import WeightSite, select
from hpclr.lowrank.svd_layers import CHANNEL

_RIDGE = 1e-9  # of the inputs' mean square: keeps what no sample has shown apart from what is no part of the weight


def elastic_sites(model: nn.Module) -> list[WeightSite]:
    """The weights that can be cut: all that are factored, or of a dense model those that methods convert by default.

    Raises:
        ValueError: if there are none.
    """
    factored = [site for site in select(model).eligible if site.is_lowrank]
    found = factored or select(model, kinds=CHANNEL, max_aspect=10.0, keep_last=True).eligible
    if not found:
        raise ValueError("the model has no layer that could be cut to a lower rank")
    return found


@torch.no_grad()
def order_directions(sites: Iterable[WeightSite], moments: Mapping[str, Tensor] | None = None) -> list[str]:
    """Gives weights factors whose leading k directions are the best of rank k, for every k at once.

    Args:
        sites: dense weights, and factored ones in any form, which they keep.
        moments: layer name → C (n×n), as `hpclr.lowrank.activations.input_moments` finds it, for the order by output;
            None: by size.

    Returns:
        Names of the layers that were put into the order by size for want of a moment.

    Raises:
        FactorizationError: for a weight or a moment that is not finite.
    """
    without = []
    for site in sites:
        moment = None if moments is None else moments.get(site.name)
        if moments is not None and moment is None:
            without.append(site.name)
        weight = _product(site)
        parts = svd(weight) if moment is None else by_output(weight, moment)
        site.factorize(site.rank, parts)
    return without


@torch.no_grad()
def cut(model: nn.Module, fraction: float) -> dict[str, int]:
    """Cuts every factored layer of a model to its leading ⌈fraction·min(m, n)⌉ directions, in place.

    A layer whose factors are then no smaller than its dense weight becomes dense.

    Returns:
        Layer name → directions that are left, of all that were factored.

    Raises:
        ValueError: if fraction is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"a rank fraction must be above 0 and at most 1, found {fraction}")
    share, ranks = Fraction(str(fraction)), {}
    for site in select(model).eligible:
        if site.is_lowrank:
            ranks[site.name] = k = min(site.rank, ceil(share * min(site.shape)))
            _keep_leading(site, k)
    return ranks


@torch.no_grad()
def renew_statistics(model: nn.Module, batches: Iterable[Tensor], forward: Callable[[Tensor], object]) -> None:
    """Takes the running statistics of batch norms anew, as the mean over batches; all else evaluates.

    Args:
        model: without batch norms nothing happens.
        batches: inputs.
        forward: how a batch goes through the model.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if norms:
        with _taking_statistics(model, norms):
            for batch in batches:
                forward(batch)


@contextmanager
def _taking_statistics(model: nn.Module, norms: Sequence[_BatchNorm]) -> Iterator[None]:
    training, momenta = {module: module.training for module in model.modules()}, [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the mean of all
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in training.items():
            module.training = mode


def _product(site: WeightSite) -> Tensor:
    """W (m×n) in float64."""
    if not site.is_lowrank:
        return site.core().double()
    u, core, vh = (factor.detach().double() for factor in site.factors)
    return (u * core if core.ndim == 1 else u @ core) @ vh


@torch.no_grad()
def by_output(weight: Tensor, moment: Tensor) -> SVD:
    """W = U (Uᵀ W) with W C^½ = U S Vᵀ: of every rank k the best W_k = U_k U_kᵀ W.

    Args:
        weight: W (m×n).
        moment: C = E[x xᵀ] (n×n).

    Returns:
        U, the norms of the rows of Uᵀ W, and these rows at norm 1.

    Raises:
        FactorizationError: if either has infinite or NaN entries.
    """
    level = float(moment.diagonal().mean()) or 1.0
    u = decompose_in(weight, moment + _RIDGE * level * torch.eye(len(moment)).to(moment)).u.to(weight)
    rows = u.mT @ weight
    norms = torch.linalg.vector_norm(rows, dim=1)
    return SVD(u, norms, rows / norms.clamp_min(torch.finfo(norms.dtype).tiny)[:, None])


def _keep_leading(site: WeightSite, k: int) -> None:
    u, core, vh = (factor.detach() for factor in site.factors)
    site.convert(u[:, :k], core[:k] if core.ndim == 1 else core[:k, :k], vh[:k])
    m, n = site.shape
    if sum(factor.numel() for factor in site.factors) >= m * n:
        site.densify()
