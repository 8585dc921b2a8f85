"""Who computes what: methods are handed this, and know nothing else of other processes."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from hpclr.lowrank.factors import SVD


class Outcome(NamedTuple):
    """What the examination of one layer found. One process computes it, all processes apply it."""

    rank: int  # the rank the rule asks for, within its limits
    stability: float | None  # since the last check; None if it could not be measured
    basis: SVD | None  # the change of basis to make: L, new singular values, Rᵀ; None: keep the present one
    noise: float | None = None  # of a dense weight, where the rule estimates it; holds once the spectrum has been cut
    failed: bool = False  # the layer could not be decomposed


Examine = Callable[[str], Outcome]


class Placement(Protocol):
    """Shares out the examination of layers over processes."""

    def share(self, costs: Mapping[str, float], examine: Examine) -> dict[str, Outcome]:
        """Has every layer examined by some process and gives all outcomes to every process.

        Args:
            costs: layer name → floating-point operations of its decomposition, in registration order.
            examine: computes the outcome of one layer; called on one process for each.
        """
        ...


class Here:
    """A single process does everything itself."""

    def share(self, costs: Mapping[str, float], examine: Examine) -> dict[str, Outcome]:
        """Examines all layers in turn."""
        return {name: examine(name) for name in costs}
