"""Whole models: to low rank, back to dense, and state dicts between the two forms."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hpclr.lowrank.factors import SVD, FactorizationError, svd
from hpclr.lowrank.layers import lowrank_modules
from hpclr.lowrank.ranks import RankRule
from hpclr.lowrank.sites import Selection, WeightSite, select

Rank = int | float | RankRule | Mapping[str, int] | None


class LayerReport(NamedTuple):
    """What became of one layer."""

    name: str
    shape: tuple[int, int] | None  # (m, n) of its weight as a matrix; None if it has no such weight
    rank: int | None  # k if it is low-rank now
    converted: bool  # held as factors now
    reason: str  # why it was left alone; empty if it was not


@torch.no_grad()
def factorize(
    model: nn.Module, rank: Rank = None, include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> list[LayerReport]:
    """Replaces the weights of a model by factors U Σ Vᵀ, in place.

    Args:
        model: any module. Layers already factored are cut to `rank` if it is lower.
        rank: None keeps every direction (the function is preserved within rounding); a whole number is the same rank
            for all (at most min(m, n)); a number between 0 and 1 is a share of min(m, n); a rank rule decides from the
            singular values; a mapping gives each layer's rank by name.
        include: patterns of layer names; None means all.
        exclude: patterns of layer names to leave alone.

    Returns:
        One entry for every layer that holds parameters: converted, or left alone and why.

    Raises:
        ValueError: for a pattern or a name that matches no layer, or a rank out of range.
    """
    selection = select(model, include=include, exclude=exclude)
    wanted = _ranks_wanted(rank, selection)
    done: dict[str, LayerReport] = {}
    for site in selection.eligible:
        try:
            _factorize_site(site, wanted)
        except FactorizationError as error:
            selection.left_alone[site.name] = str(error)
        else:
            done[site.name] = LayerReport(site.name, site.shape, site.rank, True, "")
    return [
        done.get(name) or LayerReport(name, None, None, False, selection.left_alone[name]) for name in selection.order
    ]


RankOfSite = Callable[[WeightSite, SVD], int | None]


def _ranks_wanted(rank: Rank, selection: Selection) -> RankOfSite:
    """Each form of the `rank` argument as one function of a site and its decomposition; None leaves it dense."""
    if rank is None:
        return lambda site, parts: parts.s.numel()
    if isinstance(rank, Mapping):
        _check_names(rank, selection)
        return lambda site, parts: rank.get(site.name)
    if isinstance(rank, bool) or (isinstance(rank, (int, float)) and not _valid(rank)):
        raise ValueError(
            f"rank must be a whole number ≥ 1, a share between 0 and 1, a rank rule or a mapping; found {rank!r}"
        )
    if isinstance(rank, int):
        return lambda site, parts: rank
    if isinstance(rank, float):
        return lambda site, parts: math.ceil(rank * min(site.shape))
    return lambda site, parts: rank(parts.s, site.shape)


def _valid(rank: int | float) -> bool:
    return rank >= 1 if isinstance(rank, int) else 0 < rank <= 1


def _check_names(ranks: Mapping[str, int], selection: Selection) -> None:
    eligible = {site.name for site in selection.eligible}
    for name in ranks:
        if name not in eligible:
            reason = selection.left_alone.get(name, "the model has no such layer")
            raise ValueError(f"a rank is given for layer '{name}', which cannot be converted: {reason}")


def _factorize_site(site: WeightSite, wanted: RankOfSite) -> None:
    parts = svd(site.core())
    k = wanted(site, parts)
    if k is None:
        return
    k = max(1, min(k, parts.s.numel()))
    if not site.is_lowrank:
        site.factorize(k, parts)
    elif k < site.rank:
        old = site.factors
        site.convert(old.u @ parts.u[:, :k].to(old.u), torch.diag(parts.s[:k]), parts.vh[:k].to(old.vh) @ old.vh)


@torch.no_grad()
def densify(model: nn.Module) -> nn.Module:
    """Gives every factored layer its original class and the dense weight back, in place; returns the model.

    Optimiser state is not taken back: densify for evaluation and export, after training.
    """
    for name, module in list(lowrank_modules(model)):
        for slot in module.slots:
            if module.is_lowrank(slot):
                WeightSite(name, name, module, slot).densify()
    return model


@torch.no_grad()
def load_state_dict(model: nn.Module, state: Mapping[str, Any], strict: bool = True) -> None:
    """Loads a state dict, dense or factored, into a model, dense or factored.

    Where the state dict holds factors for a layer that is dense in the model, the layer is converted to the rank
    stored. Where it holds a dense weight for a factored layer, that weight is factored without loss (torch's own
    `model.load_state_dict` does this too).

    Raises:
        RuntimeError: from torch, naming missing and unexpected keys and sizes that differ.
        ValueError: if a layer for which factors are stored cannot be converted.
    """
    shape_model_like(model, state)
    model.load_state_dict(dict(state), strict=strict)


def shape_model_like(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Converts the layers for which `state` holds factors, at the ranks stored, contents still to come."""
    selection = select(model)
    sites = {site.key(site.slot.names[1]): site for site in selection.eligible}
    for key, value in state.items():
        site = sites.get(key)
        if site is not None and isinstance(value, Tensor):
            set_rank(site, int(value.shape[0]))


def set_rank(site: WeightSite, rank: int) -> None:
    """Gives a site factors of this rank with contents still to come (from a state dict)."""
    if site.is_lowrank and site.rank == rank:
        return
    m, n = site.shape
    site.convert(torch.zeros(m, rank), torch.zeros(rank, rank), torch.zeros(rank, n))
