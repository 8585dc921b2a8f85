"""Weights as products of two trained factors, W = A B: the form of Pufferfish, Cuttlefish and Khodak et al.

    A = U √Σ (m×k)        B = √Σ Vᵀ (k×n)        of W's singular value decomposition, so that AᵀA = BBᵀ = Σ

Layers hold it as the form of `svd_layers.py` with `u` = A, `vh` = B and an `s` of ones, which is frozen and leaves the
optimiser; so all that knows layers with trained factors knows these. The chain rule of `three_factors.py` becomes

    ∂A = G Bᵀ             ∂B = Aᵀ G

Sources: Khodak et al., arXiv 2105.01029; Wang et al., arXiv 2103.03936 and arXiv 2305.02538.
"""

import torch
from torch import nn
from torch.optim import Optimizer

from hpclr.lowrank.factors import SVD
from hpclr.lowrank.moments import Change
from hpclr.lowrank.sites import WeightSite, select
from hpclr.lowrank.svd_layers import CHANNEL
from hpclr.lowrank.three_factors import join, split_weight


def split_in_two(site: WeightSite, basis: SVD, optimizer: Optimizer) -> list[Change]:
    """W becomes A B; A and B take W's place in its parameter group, and its state. Returns what has become of W.

    Args:
        site: a dense weight of a kind with trained factors.
        basis: U, s and Vᵀ of as many directions as are wanted.
        optimizer: holds the weight.
    """
    changes = split_weight(site, balanced(basis), optimizer, carry_to_middle=False)
    _retire_middle(site, optimizer)
    return changes


def balanced(basis: SVD) -> SVD:
    """The same product as A·1·B with A = U √s and B = √s Vᵀ.

    Where s is 0, as in a layer that starts at zero, B has the row of Vᵀ: with both 0 no gradient would reach either.
    """
    u, s, vh = basis
    root = torch.where(s > 0, s.sqrt(), 1)
    return SVD(u * (s / root), torch.ones_like(s), root[:, None] * vh)


def saves(m: int, n: int, k: int, *, groups: int = 1) -> bool:
    """Whether A B of rank k is smaller than W (m×n), and takes fewer multiplications for each row of the input.

    Each of the groups of a convolution needs its own pass through B.
    """
    return k * (m + groups * n) < m * n


def give_rank(site: WeightSite, rank: int, optimizer: Optimizer) -> None:
    """Makes it A B of this rank, contents still to come (from a state dict), each in its place in the optimiser."""
    site.set_rank(rank)
    join(optimizer, site)
    _retire_middle(site, optimizer)
    with torch.no_grad():
        site.parameter.fill_(1)


def merge(site: WeightSite, optimizer: Optimizer) -> None:
    """Makes it W = A B again, in A's place in the optimiser, without state."""
    u, weight, vh = site.factors
    for group in optimizer.param_groups:
        group["params"][:] = [weight if p is u else p for p in group["params"] if p is not vh]
    for factor in (u, vh):
        optimizer.state.pop(factor, None)
    site.densify()


def freeze_middles(model: nn.Module) -> None:
    """Freezes what stands between two factors in a model that was loaded from a state dict, which does not tell."""
    for site in select(model, kinds=CHANNEL).eligible:
        if site.is_lowrank:
            site.parameter.requires_grad_(False)


def _retire_middle(site: WeightSite, optimizer: Optimizer) -> None:
    s = site.parameter.requires_grad_(False)
    optimizer.state.pop(s, None)
    for group in optimizer.param_groups:
        group["params"][:] = [p for p in group["params"] if p is not s]
