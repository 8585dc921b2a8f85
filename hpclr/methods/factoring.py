"""The factors of many layers, each made by one process and given to all."""

from collections.abc import Callable, Mapping

from hpclr.lowrank.factors import SVD, FactorizationError
from hpclr.lowrank.sites import WeightSite
from hpclr.methods.placement import Outcome, Placement


def share_factors(
    placement: Placement, sites: Mapping[str, WeightSite], make: Callable[[WeightSite], SVD | int]
) -> dict[str, Outcome]:
    """The outcome for every layer, the same on all processes.

    Args:
        placement: which process makes which.
        sites: layer name → a dense weight.
        make: the factors of a weight; or only the rank that they would have, if they are not wanted. Where it raises
            a FactorizationError, the outcome says so.
    """

    def examine(name: str) -> Outcome:
        try:
            made = make(sites[name])
        except FactorizationError as error:
            return Outcome(sites[name].rank, None, None, failed=str(error))
        return Outcome(made, None, None) if isinstance(made, int) else Outcome(len(made.s), None, made)

    return placement.share(operations(sites), examine, {})


def operations(sites: Mapping[str, WeightSite]) -> dict[str, float]:
    """Layer name → about how many operations the decomposition of a dense weight takes."""
    return {name: float(min(site.shape) ** 2 * max(site.shape)) for name, site in sites.items()}


def refuse_failed(outcomes: Mapping[str, Outcome]) -> None:
    """Raises ValueError for the first layer that could not be decomposed."""
    for name, outcome in outcomes.items():
        if outcome.failed is not None:
            raise ValueError(f"layer '{name}': {outcome.failed}")
