"""Whole models: to low rank, back to dense, and state dicts between the two forms."""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hpclr.lowrank.embedding import EmbeddingWeight
from hpclr.lowrank.factors import SVD, FactorizationError, svd
from hpclr.lowrank.kinds import KINDS, Kinds
from hpclr.lowrank.layers import LowRankModule, lowrank_modules, refuse_shards, uninstall
from hpclr.lowrank.noise import shrunk
from hpclr.lowrank.ranks import GavishDonoho, MarchenkoPastur, RankRule, noise_judged_by
from hpclr.lowrank.sites import Selection, WeightSite, release, select
from hpclr.lowrank.svd_layers import CHANNEL, SPATIAL

Rank = int | float | RankRule | Mapping[str, int] | None


class LayerReport(NamedTuple):
    """What became of one layer."""

    name: str
    shape: tuple[int, int] | None  # (m, n) of its weight as a matrix, if it is low-rank now
    rank: int | None  # k, if it is low-rank now
    converted: bool  # held as factors now
    reason: str  # why it was left alone; empty if it was not


@torch.no_grad()
def factorize(
    model: nn.Module,
    rank: Rank = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    *,
    shrink: bool = False,
    tied: bool = False,
) -> list[LayerReport]:
    """Replaces the weights of a model by factors U Σ Vᵀ, in place.

    Args:
        model: any module. Layers already factored are cut to `rank` if it is lower.
        rank: None keeps every direction (the function is preserved within rounding); a whole number is the same rank
            for all (at most min(m, n)); a number between 0 and 1 is a share of min(m, n); a rank rule decides from the
            singular values; a mapping gives each layer's rank by name.
        include: patterns of layer names; None means all.
        exclude: patterns of layer names to leave alone.
        shrink: lower the singular values that are kept by what noise has added to them (`hpclr.lowrank.noise.shrunk`),
            for the least error in the Frobenius norm; with a noise rule as `rank`, whose noise it takes. A layer in
            which the rule finds nothing keeps one direction, whose singular value becomes 0. Layers already factored
            are cut only: doing it twice would shrink them twice.
        tied: convert a head too whose weight is that of an embedding, and both to the same factors
            (`hpclr.lowrank.select`).

    Returns:
        One entry for every layer that holds parameters: converted, or left alone and why.

    Raises:
        ValueError: for a pattern or a name that matches no layer, a rank out of range, `shrink` without a rule that
            knows the noise, or `tied` without such a head.
    """
    selection = select(model, include=include, exclude=exclude, kinds=KINDS, tied=tied)
    wanted = _ranks_wanted(rank, selection)
    values = _values_wanted(rank, shrink)
    reasons = selection.left_alone | {site.name: _factorize_site(site, wanted, values) for site in selection.eligible}
    sites = {site.name: site for site in selection.candidates}
    return [_report(name, sites.get(name), reasons[name]) for name in selection.order]


def _report(name: str, site: WeightSite | None, reason: str) -> LayerReport:
    if site is None or not site.is_lowrank:
        return LayerReport(name, None, None, False, reason)
    return LayerReport(name, site.shape, site.rank, True, reason)


RankOfSite = Callable[[WeightSite, SVD], int | None]
ValuesOfSite = Callable[[WeightSite, SVD], Tensor]


def _ranks_wanted(rank: Rank, selection: Selection) -> RankOfSite:
    """Each form of the `rank` argument as one function of a site and its decomposition; None leaves it dense."""
    if rank is None:
        return lambda site, parts: parts.s.numel()
    if isinstance(rank, Mapping):
        _check_names(rank, selection)
        return lambda site, parts: rank.get(site.name)
    if isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1:
        return lambda site, parts: rank
    if isinstance(rank, float) and 0 < rank <= 1:
        share = Fraction(str(rank))  # exactly what was written: 0.55 of 100 is 55, not 56
        return lambda site, parts: math.ceil(share * min(site.shape))
    if not isinstance(rank, (int, float)) and callable(rank):
        return lambda site, parts: rank(parts.s, site.shape)
    raise ValueError(
        f"rank must be a whole number ≥ 1, a share above 0 and at most 1.0, a rank rule or a mapping; found {rank!r}"
    )


def _values_wanted(rank: Rank, shrink: bool) -> ValuesOfSite:
    """The singular values that a dense weight is to have once it is factored."""
    if not shrink:
        return lambda site, parts: parts.s
    if isinstance(rank, MarchenkoPastur | GavishDonoho):
        return lambda site, parts: shrunk(parts.s, site.shape, noise_judged_by(rank, parts.s, site.shape))
    raise ValueError(
        f"shrink=True needs to know the noise: give MarchenkoPastur or GavishDonoho as rank, with the standard "
        f"deviation of the noise or without, to estimate it; found {rank!r}"
    )


def _check_names(ranks: Mapping[str, int], selection: Selection) -> None:
    eligible = {site.name for site in selection.eligible}
    for name in ranks:
        if name not in eligible:
            reason = selection.left_alone.get(name, "the model has no such layer")
            raise ValueError(f"a rank is given for layer '{name}', which cannot be converted: {reason}")


def _factorize_site(site: WeightSite, wanted: RankOfSite, values: ValuesOfSite) -> str:
    """Converts or cuts one weight; returns why it was left alone, nothing if it was not."""
    refuse_shards(site.parameter)
    try:
        parts = svd(site.core())
    except FactorizationError as error:
        return str(error)
    k = wanted(site, parts)
    if k is None:
        return "no rank is given for it"
    k = max(1, min(k, parts.s.numel()))
    if not site.is_lowrank:
        site.factorize(k, parts._replace(s=values(site, parts)))
    elif k < site.rank:
        old = site.factors
        site.convert(old.u.to(parts.u) @ parts.u[:, :k], torch.diag(parts.s[:k]), parts.vh[:k] @ old.vh.to(parts.vh))
    return ""


@torch.no_grad()
def densify(model: nn.Module) -> nn.Module:
    """Gives every factored layer its original class and the dense weight back, in place; returns the model.

    A weight is trained if any of its factors was. Optimiser state is not taken back: densify for evaluation and export,
    after training.

    Raises:
        ValueError: for a part of a model that has a head without the embedding with which it shares its factors, or the
            other way round.
    """
    modules = list(lowrank_modules(model))
    sites = factored_sites(model)
    for site in sites:
        site.densify()
    for _, module in modules:
        if isinstance(module, EmbeddingWeight):  # somebody has untied it
            uninstall(module, module.slots[0])
        release(module)
    return model


def factored_sites(model: nn.Module) -> list[WeightSite]:
    """Every factored weight of a whole model.

    Raises:
        ValueError: if the model is a part of another, where others share its factors.
    """
    sites = [site for site in select(model).candidates if site.is_lowrank]
    lost = sum(cast(LowRankModule, site.module).followers - len(site.followers()) for site in sites)
    followers = {embedding for site in sites for embedding in site.followers()}
    modules = [module for _, module in lowrank_modules(model) if isinstance(module, EmbeddingWeight)]
    orphans = [module for module in modules if module not in followers]
    if lost != len(orphans):
        raise ValueError(
            "a head and an embedding share their factors, and one of them is not in what is given here; give the whole "
            "model"
        )
    return sites


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
    """Converts the layers for which `state` holds factors, at the ranks stored, contents still to come.

    Raises:
        ValueError: if such a layer cannot be converted.
    """
    selection = select(model)
    if any(_form_stored(state, site) and _holds_for_all(state, site, model) for site in selection.candidates):
        selection = select(model, tied=True)
    stored = {site: form for site in selection.candidates if (form := _form_stored(state, site))}
    for site, form in stored.items():
        reason = selection.left_alone.get(site.name)
        if site.embeddings and form is not KINDS:
            reason = "it shares its weight with an embedding, and these are factors with trained bases"
        if reason is not None:
            raise ValueError(
                f"the state dict holds factors for layer '{site.name}', which cannot be converted: {reason}"
            )
    for site, form in stored.items():
        site.take_form(form)
        site.set_rank(int(state[site.key(site.slot.names[1])].shape[0]))


def _form_stored(state: Mapping[str, Any], site: WeightSite) -> Kinds | None:
    """The form in which `state` holds factors of a weight; None if it does not."""
    for core, form in (("sigma", KINDS), ("s", CHANNEL)):
        names = [site.key(name) for name in site.slot._replace(core=core).names]
        if site.key(site.slot.weight) not in state and all(name in state for name in names):
            return SPATIAL if form is CHANNEL and _is_spatial(state[names[0]], site.module) else form
    return None


def _holds_for_all(state: Mapping[str, Any], site: WeightSite, model: nn.Module) -> bool:
    """Whether a weight is that of embeddings, too, and `state` has nothing else for them than for the head."""
    paths = [path for path, module in model.named_modules() if module in site.followers()]
    pairs = [(site.key(name), f"{path}.{name}".lstrip(".")) for path in paths for name in site.slot.names]
    return bool(paths) and all(other in state and _are_equal(state[key], state[other]) for key, other in pairs)


def _are_equal(one: Any, other: Any) -> bool:
    return one is other or (one.shape == other.shape and (one.is_meta or torch.equal(one, other)))


def _is_spatial(u: Any, module: nn.Module) -> bool:
    """Whether a convolution's U has out·kw rows, not out; where these are the same, so are the two forms."""
    return bool(u.shape[0] != getattr(module, "out_channels", u.shape[0]))
