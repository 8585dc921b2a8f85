"""Who examines which layer at a check, and how the outcomes reach all processes.

Each process holds the whole model. What a method remembers of a layer from check to check lives with the one process
that examines it, its owner.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from math import ceil
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from hpclr.errors import UsageError
from hpclr.lowrank.factors import SVD, FactorizationError, working_dtype
from hpclr.lowrank.ranks import RankRule
from hpclr.lowrank.sites import WeightSite
from hpclr.lowrank.spectra import Measured, measure, measured_in
from hpclr.methods.placement import Examine, Outcome, decomposed
from hpclr.parallel import mpi
from hpclr.parallel.digest import digest
from hpclr.parallel.group import Group
from hpclr.parallel.heat import import_heat, leading_svd
from hpclr.parallel.verify import require_equal

Memory = MutableMapping[str, Tensor]


class Doing(Protocol):
    """Told what a process does from here on, so that others know why it takes so long."""

    def __call__(self, what: str, *, waiting: bool) -> None:
        """`what` completes "it was …"."""


_TURN = 16 << 20  # bytes of new factors that a process finds before it shares them; a message takes three times that
_MOST_IMBALANCE = 1.25  # of the slowest process's work against a new plan's, from which layers change owners


class Rank0:
    """The first process examines all layers and broadcasts the outcomes, in two messages for every 16 MiB of factors.

    Args:
        group: the processes.
        doing: told what this process does, and whether that takes the others.
    """

    sharded = False

    def __init__(self, group: Group, doing: Doing) -> None:
        self._group, self._doing = group, doing

    def measure(self, matrix: Tensor, rule: RankRule | None, *, dense: bool) -> Measured:
        """As `hpclr.lowrank.spectra.measure`."""
        return measure(matrix, rule)

    def decompose(self, matrix: Tensor, *, dense: bool) -> SVD:
        """As `hpclr.methods.placement.decomposed`."""
        return decomposed(matrix, dense=dense)

    def share(self, costs: Mapping[str, float], examine: Examine, memory: Memory) -> Iterator[tuple[str, Outcome]]:
        """Has every layer examined; see `hpclr.methods.placement.Placement`."""
        if not self._group.is_first:
            memory.clear()
        mine = self._examined(costs if self._group.is_first else (), examine)
        missing = len(costs)
        while missing:
            found = _flat(_one_turn(mine))
            self._doing("sharing the outcomes of a check", waiting=True)
            outcomes = _outcomes(*self._group.broadcast(*found))
            missing -= len(outcomes)
            yield from outcomes.items()

    def _examined(self, names: Iterable[str], examine: Examine) -> Iterator[tuple[str, Outcome]]:
        for name in names:
            self._doing(f"decomposing layer '{name}'", waiting=False)
            yield name, examine(name)

    def whole(self, site: WeightSite, optimizer: Optimizer) -> AbstractContextManager[None]:
        """Each process has the whole model."""
        return nullcontext()

    @property
    def processes(self) -> int:
        """How many there are."""
        return self._group.size

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes; collective."""
        self._doing("taking means over the processes", waiting=True)
        return self._group.sum(tensor) / self._group.size

    def gather(self, memory: Memory) -> dict[str, Tensor]:
        """Everything remembered is on the first process."""
        return dict(memory)

    def confirm(self, ranks: Mapping[str, int], parameters: Iterable[Tensor]) -> None:
        """Compares ranks and parameters, frozen factors included, over all processes.

        Raises:
            ReplicasDifferError: naming the processes that differ.
        """
        require_equal(self._group, {"ranks": repr(sorted(ranks.items())), "parameters": str(digest(parameters))})


class Spread(Rank0):
    """All processes examine layers, each its share by cost, largest first; each broadcasts what it found.

    Owners stay, since what is remembered of a layer is with its owner. When the ranks have shrunk so unevenly that a
    new plan would be much better, layers move, with what is remembered of them.
    """

    def __init__(self, group: Group, doing: Doing) -> None:
        super().__init__(group, doing)
        self._owners: dict[str, int] = {}

    def share(self, costs: Mapping[str, float], examine: Examine, memory: Memory) -> Iterator[tuple[str, Outcome]]:
        """Has every layer examined; see `hpclr.methods.placement.Placement`."""
        self._plan(costs, memory)
        mine = self._examined([name for name in costs if self._owners[name] == self._group.rank], examine)
        missing = len(costs)
        while missing:
            found = _flat(_one_turn(mine))
            self._doing("sharing the outcomes of a check", waiting=True)
            for payload in self._group.exchange(*found):
                outcomes = _outcomes(*payload)
                missing -= len(outcomes)
                yield from outcomes.items()

    def gather(self, memory: Memory) -> dict[str, Tensor]:
        """Everything remembered, on the first process; on the others what they own. Collective."""
        gathered = dict(memory)
        for source in range(1, self._group.size):
            names = [n for n, owner in self._owners.items() if owner == source and n in memory]
            received = self._group.move(names, [memory[n] for n in names], source, 0)
            if received is not None:
                gathered.update(zip(*received, strict=True))
        return {name: gathered[name] for name in self._owners if name in gathered}

    def _plan(self, costs: Mapping[str, float], memory: Memory) -> None:
        planned = largest_first(costs, self._group.size)
        if self._owners.keys() == costs.keys():
            if _slowest(costs, self._owners) <= _MOST_IMBALANCE * _slowest(costs, planned):
                return
            self._hand_over(planned, memory)
        self._owners = planned
        for name in [name for name in memory if planned.get(name) != self._group.rank]:
            del memory[name]

    def _hand_over(self, planned: Mapping[str, int], memory: Memory) -> None:
        """Every layer that gets another owner takes with it what is remembered of it."""
        moving: dict[tuple[int, int], list[str]] = {}
        for name, owner in planned.items():
            if owner != self._owners[name]:
                moving.setdefault((self._owners[name], owner), []).append(name)
        for (source, target), names in sorted(moving.items()):
            held = [name for name in names if self._group.rank == source and name in memory]
            received = self._group.move(held, [memory[name] for name in held], source, target)
            if received is not None:
                memory.update(zip(*received, strict=True))


class AllTogether(Rank0):
    """All processes work on every dense weight together, for weights that are too much for one process.

    heat finds the leading part of a dense weight (approximately); what is beyond it is lost when the layer is
    converted. Σ, which is smaller, is decomposed by the first process.

    Args:
        group: the processes, which must have been started by MPI.
        doing: told what this process does, and whether that takes the others.
        heat_rank: share of a dense weight's smaller side that is found.

    Raises:
        UsageError: if MPI does not see these processes, or heat is not there.
    """

    def __init__(self, group: Group, doing: Doing, heat_rank: float) -> None:
        super().__init__(group, doing)
        self._heat_rank = heat_rank
        import_heat("svd: heat")
        size = mpi.world("svd: heat").Get_size()
        if size != group.size:
            raise UsageError(
                f"svd: heat works with MPI, whose world has the size {size}, but {group.size} processes train "
                "together: start them with mpirun, or with srun --mpi=pmix; or choose svd: rank0 or spread"
            )

    def measure(self, matrix: Tensor, rule: RankRule | None, *, dense: bool) -> Measured:
        """Of the leading part of a dense weight, or of all of Σ. Collective."""
        basis = self.decompose(matrix, dense=dense)
        return measured_in(basis.to(working_dtype(matrix.dtype)), rule)

    def decompose(self, matrix: Tensor, *, dense: bool) -> SVD:
        """The leading part of a dense weight, or all of Σ; the same to the bit on all processes. Collective."""
        if not dense:
            return self._by_first(matrix)
        try:
            return SVD(*leading_svd(matrix, ceil(self._heat_rank * min(matrix.shape))))
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise FactorizationError(str(error)) from error

    def share(self, costs: Mapping[str, float], examine: Examine, memory: Memory) -> Iterator[tuple[str, Outcome]]:
        """Has every layer examined by all; see `hpclr.methods.placement.Placement`."""
        return self._examined(costs, examine)

    def _by_first(self, matrix: Tensor) -> SVD:
        failed, parts = None, []
        if self._group.is_first:
            try:
                parts = list(decomposed(matrix, dense=False))
            except FactorizationError as error:
                failed = str(error)
        failed, parts = self._group.broadcast(failed, parts)
        if failed is not None:
            raise FactorizationError(failed)
        return SVD(*parts)


def largest_first(costs: Mapping[str, float], size: int) -> dict[str, int]:
    """An owner for each layer: the costliest first, each to the process with the least to do so far.

    Source: Graham, "Bounds on Multiprocessing Timing Anomalies", 1969; never worse than 4/3 of the best plan.
    """
    loads = [0.0] * size
    owners = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return {name: owners[name] for name in costs}


def _slowest(costs: Mapping[str, float], owners: Mapping[str, int]) -> float:
    loads: dict[int, float] = {}
    for name, owner in owners.items():
        loads[owner] = loads.get(owner, 0.0) + costs[name]
    return max(loads.values(), default=0.0)


def _one_turn(found: Iterator[tuple[str, Outcome]]) -> dict[str, Outcome]:
    """The next outcomes, until their factors reach `_TURN` bytes; none when there are no more."""
    turn: dict[str, Outcome] = {}
    held = 0
    for name, outcome in found:
        turn[name] = outcome
        held += sum(part.nbytes for part in outcome.basis or ())
        if held >= _TURN:
            break
    return turn


def _flat(outcomes: Mapping[str, Outcome]) -> tuple[dict[str, Any], list[Tensor]]:
    """Outcomes as a JSON value and a list of tensors: three for each layer that has a new basis."""
    value = {name: [o.rank, o.stability, o.basis is not None, *o[3:]] for name, o in outcomes.items()}
    return value, [part for o in outcomes.values() if o.basis is not None for part in o.basis]


def _outcomes(value: dict[str, Any], tensors: list[Tensor]) -> dict[str, Outcome]:
    parts = iter(tensors)
    return {
        name: Outcome(rank, stability, SVD(next(parts), next(parts), next(parts)) if changes else None, *rest)
        for name, (rank, stability, changes, *rest) in value.items()
    }
