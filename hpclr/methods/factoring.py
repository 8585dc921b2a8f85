"""The factors of many layers, each made by one process and given to all; a layer's change to new ones."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from hpclr.lowrank import BasisChange
from hpclr.lowrank.factors import SVD, FactorizationError
from hpclr.lowrank.moments import carry
from hpclr.lowrank.sites import WeightSite
from hpclr.methods.placement import Outcome, Placement


def share_outcomes(
    placement: Placement,
    sites: Mapping[str, WeightSite],
    examine: Callable[[WeightSite], Outcome],
    memory: MutableMapping[str, Tensor],
) -> Iterator[tuple[str, Outcome]]:
    """Each layer examined by one process, the outcomes on all; see `Placement.share`.

    Args:
        placement: which process examines which.
        sites: layer name → its weight.
        examine: the outcome for a layer. Where it raises a FactorizationError, the outcome says so.
        memory: layer name → what the examination remembers; it goes to where that layer is examined.
    """

    def examined(name: str) -> Outcome:
        try:
            return examine(sites[name])
        except FactorizationError as error:
            return Outcome(sites[name].rank, None, None, failed=str(error))

    return placement.share(operations(sites), examined, memory)


def share_factors(
    placement: Placement, sites: Mapping[str, WeightSite], make: Callable[[WeightSite], SVD | int]
) -> Iterator[tuple[str, Outcome]]:
    """The outcome for every layer, the same on all processes; see `Placement.share`.

    Args:
        placement: which process makes which.
        sites: layer name → a dense weight.
        make: the factors of a weight; or only the rank that they would have, if they are not wanted. Where it raises
            a FactorizationError, the outcome says so.
    """

    def examine(site: WeightSite) -> Outcome:
        made = make(site)
        return Outcome(made, None, None) if isinstance(made, int) else Outcome(len(made.s), None, made)

    return share_outcomes(placement, sites, examine, {})


def operations(sites: Mapping[str, WeightSite]) -> dict[str, float]:
    """Layer name → about how many operations the decomposition of what is trained of it, W or Σ, takes."""
    shapes = {name: site.core().shape for name, site in sites.items()}
    return {name: float(min(shape) ** 2 * max(shape)) for name, shape in shapes.items()}


def change_basis(site: WeightSite, basis: SVD, optimizer: Optimizer) -> BasisChange:
    """Gives a layer new factors from W or Σ = L Σ' Rᵀ; its gradient and the optimiser's moments turn with them.

    Args:
        site: a dense weight W, or one with factors, of which Σ is decomposed.
        basis: L, the diagonal of Σ', Rᵀ; cut or whole.
        optimizer: has moments of what is trained.
    """
    left, right = basis.u, basis.vh.mT
    old_shape, old_grad = site.parameter.shape, site.parameter.grad
    if site.is_lowrank:
        old = site.factors
        change = BasisChange(site.name, site.parameter, left, right)
        site.convert(old.u.to(left) @ left, torch.diag(basis.s), right.mT @ old.vh.to(right))
    else:
        change = BasisChange(site.name, site.parameter, left, right, site.to_matrix)
        site.convert(basis.u, torch.diag(basis.s), basis.vh)
    carry(optimizer, change, old_shape, old_grad)
    return change


def refuse_failed(outcomes: dict[str, Outcome]) -> dict[str, Outcome]:
    """The same outcomes; raises ValueError for the first layer that could not be decomposed."""
    for name, outcome in outcomes.items():
        if outcome.failed is not None:
            raise ValueError(f"layer '{name}': {outcome.failed}")
    return outcomes
