"""Who computes what: methods are handed this, and know nothing else of other processes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer

from hpclr.lowrank.factors import SVD, working_dtype
from hpclr.lowrank.ranks import RankRule
from hpclr.lowrank.sites import WeightSite
from hpclr.lowrank.spectra import Measured, decompose, measure


class Outcome(NamedTuple):
    """What the examination of one layer found. One process computes it, all processes apply it."""

    rank: int  # the rank the rule asks for, within its limits
    stability: float | None  # since the last check (Cuttlefish: the stable rank); None if it could not be measured
    basis: SVD | None  # the change of basis to make: L, new singular values, Rᵀ; None: keep the present one
    noise: float | None = None  # of a dense weight, where the rule estimates it; holds once the spectrum has been cut
    failed: str | None = None  # why the layer could not be decomposed
    signal: int | None = None  # how many directions of a dense weight stand out of the noise, if that was asked
    still: bool | None = None  # whether its basis is that of the last check; None: the threshold of stability tells


Examine = Callable[[str], Outcome]


def decomposed(matrix: Tensor, *, dense: bool) -> SVD:
    """As `hpclr.lowrank.spectra.decompose`: a dense weight in its own precision, float32 at least, Σ in float64.

    The rounding of the rotations of Σ adds up over the checks.
    """
    basis = decompose(matrix)
    return basis.to(working_dtype(matrix.dtype)) if dense else basis


@runtime_checkable
class Placement(Protocol):
    """Shares out the examination of layers over processes, all of which call the same methods at the same step.

    Attributes:
        sharded: whether each process holds only a part of every parameter; layers then change within `whole` only.
        processes: how many there are.
    """

    sharded: bool

    @property
    def processes(self) -> int:
        """How many there are."""
        ...

    def measure(self, matrix: Tensor, rule: RankRule | None, *, dense: bool) -> Measured:
        """What `examine` wants to know of a matrix whose basis it does not need; see `hpclr.lowrank.spectra.measure`.

        Args:
            matrix: (m, n), a dense weight, or Σ (k, k).
            rule: says how many of the singular values are to be kept; None: the rank is not wanted.
            dense: whether it is a dense weight, of which the leading part may do.

        Raises:
            FactorizationError: if it has no decomposition.
        """
        ...

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
    ) -> Iterator[tuple[str, Outcome]]:
        """Has every layer examined by some process and gives all outcomes to every process, a few at a time.

        Whoever applies each outcome before asking for the next never holds new factors of the whole model beside its
        weights. Other processes take part in every turn, so all outcomes must be asked for; `dict` does that.

        Args:
            costs: layer name → floating-point operations of its decomposition, in registration order.
            examine: computes the outcome of one layer; called on one process for each, and for some when the outcomes
                of others have been applied already.
            memory: layer name → what `examine` remembers of it; is kept where the layer is examined, and may be
                dropped elsewhere.

        Returns:
            Layer name and outcome, in the same order on all processes.
        """
        ...

    def whole(self, site: WeightSite, optimizer: Optimizer) -> AbstractContextManager[None]:
        """In the block all of a layer's weight or factors is here, and the optimiser's state of them; they may change.

        Where they are sharded, other Parameters stand in for them, all processes must change them in the same way, and
        each keeps its part of what they become.
        """
        ...

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes of tensors of one shape and type, the same to the bit on each of them."""
        ...

    def gather(self, memory: MutableMapping[str, Tensor]) -> dict[str, Tensor]:
        """What is remembered of all layers, on the first process; for checkpoints."""
        ...

    def confirm(self, ranks: Mapping[str, int], parameters: Iterable[Tensor]) -> None:
        """Raises an error if ranks or parameters are not the same to the bit on all processes."""
        ...


class Here:
    """A single process does everything itself."""

    sharded = False
    processes = 1

    def measure(self, matrix: Tensor, rule: RankRule | None, *, dense: bool) -> Measured:
        """As `hpclr.lowrank.spectra.measure`."""
        return measure(matrix, rule)

    def decompose(self, matrix: Tensor, *, dense: bool) -> SVD:
        """As `decomposed`."""
        return decomposed(matrix, dense=dense)

    def share(
        self, costs: Mapping[str, float], examine: Examine, memory: MutableMapping[str, Tensor]
    ) -> Iterator[tuple[str, Outcome]]:
        """Examines all layers in turn."""
        return ((name, examine(name)) for name in costs)

    def whole(self, site: WeightSite, optimizer: Optimizer) -> AbstractContextManager[None]:
        """Everything is always here."""
        return nullcontext()

    def mean(self, tensor: Tensor) -> Tensor:
        """There is one."""
        return tensor

    def gather(self, memory: MutableMapping[str, Tensor]) -> dict[str, Tensor]:
        """Everything is here."""
        return dict(memory)

    def confirm(self, ranks: Mapping[str, int], parameters: Iterable[Tensor]) -> None:
        """There is nobody to differ from."""
