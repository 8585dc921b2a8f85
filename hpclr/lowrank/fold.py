"""Factored layers made ready for serving: two products in place of three, or one where that is cheaper."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from hpclr.lowrank.convert import factored_sites
from hpclr.lowrank.factors import working_dtype
from hpclr.lowrank.kinds import KINDS, lowrank_class
from hpclr.lowrank.layers import LowRankModule, lowrank_modules, rename, replace_data
from hpclr.lowrank.sites import WeightSite, release
from hpclr.lowrank.svd_layers import CHANNEL
from hpclr.lowrank.two_factors import saves


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Makes a trained model quick to evaluate, in place; returns the model.

    Σ is multiplied into U. A weight becomes dense again where the two factors would be no smaller or would take no
    fewer operations, and where a layer has a forward pass of its own that reads the whole weight. torch's encoder
    layers are kept from their fused path, which would rebuild every weight in each call.

    A head with the weight of an embedding keeps its Σ, which the embedding needs, or becomes dense together with it.

    There is no way back, and what is folded is frozen: fold a copy, `fold(copy.deepcopy(model))`, if training goes on.
    """
    modules = list(lowrank_modules(model))
    factored = factored_sites(model)
    for site in factored:
        if not _gains(site):
            site.densify()
        elif site.followers():
            site.parameter.requires_grad_(False)
    alone = {site.module for site in factored if site.is_lowrank and not site.followers()}
    for _, module in modules:
        if module in alone and not module.trains_bases:
            _absorb_middles(module)
    for _, module in modules:
        release(module)
    _keep_encoders_from_their_fused_path(model)
    return model


def _gains(site: WeightSite) -> bool:
    """Whether the layer multiplies by the factors, and does better so than by the dense weight."""
    layer = cast(LowRankModule, site.module)
    quick = any(issubclass(layer.mixin, kind.quick) for kind in (*KINDS, *CHANNEL))
    return quick and saves(*site.shape, site.rank, groups=site.groups)


def _absorb_middles(layer: LowRankModule) -> None:
    """U Σ and Vᵀ in the form that has a diagonal in the middle, here of ones."""
    old = [slot for slot in layer.slots if layer.is_lowrank(slot)]
    products = [_product(*layer.factors(slot)[:2]) for slot in old]
    layer.__class__ = cast(Any, lowrank_class(layer.dense_class, CHANNEL))
    new = [slot for slot in layer.slots if slot.weight in {slot.weight for slot in old}]
    for before, after, product in zip(old, new, products, strict=True):
        core = layer._parameters[before.names[1]]
        assert core is not None
        rename(layer, {before.names[1]: {after.names[1]: core}})
        factors = layer.factors(after)
        replace_data(cast(nn.Parameter, factors.u), product)
        replace_data(core, torch.ones_like(product[0]))
        core.requires_grad_(False)


def _product(u: Tensor, sigma: Tensor) -> Tensor:
    dtype = working_dtype(u.dtype)
    return (u.to(dtype) @ sigma.to(dtype)).to(u.dtype)


def _keep_encoders_from_their_fused_path(model: nn.Module) -> None:
    for module in model.modules():
        if not any(isinstance(part, LowRankModule) for part in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # torch's mark of a layer that the fused path cannot take; nothing else
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
