"""The forms that a method gives a model: which layers it may convert, and what they are with some rank."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from hpclr.config.schema import (
    Cuttlefish,
    Dense,
    Edora,
    FixedRank,
    Lora,
    MoSara,
    Nested,
    Oialr,
    Sara,
    Section,
    SvdTraining,
    Truncate,
)
from hpclr.errors import UsageError, usage_errors
from hpclr.lowrank import KINDS, WeightSite, select
from hpclr.lowrank.kinds import Kinds
from hpclr.lowrank.product import pays
from hpclr.lowrank.svd_layers import CHANNEL, SPATIAL
from hpclr.lowrank.two_factors import saves
from hpclr.planning.subject import copied

Ranks = Mapping[str, int]  # layer name → rank, of those that are factors


@dataclass(frozen=True)
class Layer:
    """A weight that the method may convert: its name, its shape as a matrix, and what decides whether that pays."""

    name: str
    shape: tuple[int, int]
    groups: int
    positions: int | None

    @property
    def full(self) -> int:
        """The largest rank."""
        return min(self.shape)


def layers_of(section: Section, model: nn.Module) -> list[Layer]:
    """The layers that the method converts, in registration order.

    Raises:
        UsageError: if there are none, or a pattern of `include` or `exclude` matches nothing.
    """
    if isinstance(section, Dense):
        return []
    if isinstance(section, (Sara, MoSara, Edora, Lora)):
        raise UsageError(
            f"method: hpclr plan knows nothing of adapters ({section.name}); plan the run with method.name=dense, "
            "which takes more memory and bytes than adapters do, and as much time or more"
        )
    with usage_errors("method"):
        sites = _sites(section, model)
    if not sites:
        raise UsageError(
            f"method: {section.name} finds no layer that it could convert in this model; look at max_aspect, include, "  # type: ignore[attr-defined]
            "exclude, keep_first and keep_last"
        )
    return [Layer(site.name, site.shape, site.groups, site.positions) for site in sites]


def formed(model: nn.Module, section: Section, ranks: Ranks) -> nn.Module:
    """A copy without contents in which these layers are factors of these ranks."""
    made = copied(model, partial(torch.empty_like, device="cpu"))
    for site in _sites(section, made) if ranks else ():
        if site.name in ranks:
            site.set_rank(ranks[site.name])
            if isinstance(section, (Truncate, FixedRank, Cuttlefish, Nested)):
                site.parameter.requires_grad_(False)  # what stands between two factors
    return made


def _sites(section: Section, model: nn.Module) -> list[WeightSite]:
    keys = ("max_aspect", "keep_first", "keep_last", "include", "exclude")
    chosen, tied = {key: getattr(section, key) for key in keys}, getattr(section, "tied", False)
    return select(model, kinds=_kinds(section), tied=tied, **chosen).eligible


def _kinds(section: Section) -> Kinds:
    if isinstance(section, Oialr):
        return KINDS
    return SPATIAL if isinstance(section, SvdTraining) and section.decomposition == "spatial" else CHANNEL


def is_worth_it(section: Section, layer: Layer, rank: int) -> bool:
    """Whether factors of this rank are no larger, and take no longer, than the dense weight."""
    if isinstance(section, Oialr):
        return pays(*layer.shape, rank, groups=layer.groups, positions=layer.positions)
    return saves(*layer.shape, rank, groups=layer.groups)


def highest_paying(section: Section, layer: Layer) -> int:
    """The highest rank for which that is so; 0 if there is none. It is so for all ranks below."""
    low, high = 0, layer.full
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if is_worth_it(section, layer, middle) else (low, middle - 1)
    return low
