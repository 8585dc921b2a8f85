"""Who computes what: methods are handed this, and know nothing else of other processes."""

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from hpclr.lowrank.factors import SVD, svd


class Outcome(NamedTuple):
    """What the examination of one layer found. One process computes it, all processes apply it."""

    rank: int  # the rank the rule asks for, within its limits
    stability: float | None  # since the last check (Cuttlefish: the stable rank); None if it could not be measured
    basis: SVD | None  # the change of basis to make: L, new singular values, Rᵀ; None: keep the present one
    noise: float | None = None  # of a dense weight, where the rule estimates it; holds once the spectrum has been cut
    failed: str | None = None  # why the layer could not be decomposed


Examine = Callable[[str], Outcome]


@runtime_checkable
class Placement(Protocol):
    """Shares out the examination of layers over processes, all of which call the same methods at the same step."""

    def decompose(self, matrix: Tensor, *, dense: bool) -> SVD:
        """The singular value decomposition that `examine` shall use.

        Args:
            matrix: (m, n), a dense weight, or Σ (k, k).
            dense: whether it is a dense weight, of which the leading part may do.

        Raises:
            FactorizationError: if there is none.
        """
        ...

    def share(
        self, costs: Mapping[str, float], examine: Examine, memory: MutableMapping[str, Tensor]
    ) -> dict[str, Outcome]:
        """Has every layer examined by some process and gives all outcomes to every process.

        Args:
            costs: layer name → floating-point operations of its decomposition, in registration order.
            examine: computes the outcome of one layer; called on one process for each.
            memory: layer name → what `examine` remembers of it; is kept where the layer is examined, and may be
                dropped elsewhere.
        """
        ...

    def gather(self, memory: MutableMapping[str, Tensor]) -> dict[str, Tensor]:
        """What is remembered of all layers, on the first process; for checkpoints."""
        ...

    def confirm(self, ranks: Mapping[str, int], parameters: Iterable[Tensor]) -> None:
        """Raises an error if ranks or parameters are not the same to the bit on all processes."""
        ...


class Here:
    """A single process does everything itself."""

    def decompose(self, matrix: Tensor, *, dense: bool) -> SVD:
        """As `hpclr.lowrank.factors.svd`."""
        return svd(matrix)

    def share(
        self, costs: Mapping[str, float], examine: Examine, memory: MutableMapping[str, Tensor]
    ) -> dict[str, Outcome]:
        """Examines all layers in turn."""
        return {name: examine(name) for name in costs}

    def gather(self, memory: MutableMapping[str, Tensor]) -> dict[str, Tensor]:
        """Everything is here."""
        return dict(memory)

    def confirm(self, ranks: Mapping[str, int], parameters: Iterable[Tensor]) -> None:
        """There is nobody to differ from."""
