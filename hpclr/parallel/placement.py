"""Who examines which layer at a check, and how the outcomes reach all processes.

Each process holds the whole model. What a method remembers of a layer from check to check lives with the one process
that examines it, its owner.
"""

from collections.abc import Iterable, Mapping, MutableMapping
from math import ceil
from typing import Any

from torch import Tensor

from hpclr.lowrank.factors import SVD, svd
from hpclr.methods.placement import Examine, Outcome
from hpclr.parallel.digest import digest
from hpclr.parallel.group import Group
from hpclr.parallel.verify import require_equal

Memory = MutableMapping[str, Tensor]

_MOST_IMBALANCE = 1.25  # of the slowest process's work against a new plan's, from which layers change owners


class Rank0:
    """The first process examines all layers and broadcasts the outcomes, in two messages a check."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def decompose(self, matrix: Tensor) -> SVD:
        """As `hpclr.lowrank.factors.svd`."""
        return svd(matrix)

    def share(self, costs: Mapping[str, float], examine: Examine, memory: Memory) -> dict[str, Outcome]:
        """Has every layer examined; see `hpclr.methods.placement.Placement`."""
        found: tuple[dict[str, Any] | None, list[Tensor]]
        if self._group.is_first:
            found = _flat({name: examine(name) for name in costs})
        else:
            memory.clear()
            found = (None, [])
        return _outcomes(*self._group.broadcast(*found))

    def gather(self, memory: Memory) -> dict[str, Tensor]:
        """Everything remembered is on the first process."""
        return dict(memory)

    def confirm(self, ranks: Mapping[str, int], factors: Iterable[Tensor]) -> None:
        """Compares ranks and factors over all processes.

        Raises:
            ReplicasDifferError: naming the processes that differ.
        """
        require_equal(self._group, {"ranks": repr(sorted(ranks.items())), "factors": str(digest(factors))})


class Spread(Rank0):
    """All processes examine layers, each its share by cost, largest first; each broadcasts what it found.

    Owners stay, since what is remembered of a layer is with its owner. When the ranks have shrunk so unevenly that a
    new plan would be much better, layers move, with what is remembered of them.
    """

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self._owners: dict[str, int] = {}

    def share(self, costs: Mapping[str, float], examine: Examine, memory: Memory) -> dict[str, Outcome]:
        """Has every layer examined; see `hpclr.methods.placement.Placement`."""
        self._plan(costs, memory)
        mine = {name: examine(name) for name in costs if self._owners[name] == self._group.rank}
        found: dict[str, Outcome] = {}
        for payload in self._group.exchange(*_flat(mine)):
            found |= _outcomes(*payload)
        return {name: found[name] for name in costs}

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
    """All processes work on every layer together, for weights whose decomposition is too much for one process.

    heat finds the leading part of a dense weight (approximately); what is beyond it is lost when the layer is
    converted. Σ, which is small by then, is decomposed by the first process.

    Args:
        group: the processes, which must have been started by MPI.
        heat_rank: share of a dense weight's smaller side that is found.
    """

    def __init__(self, group: Group, heat_rank: float) -> None:
        super().__init__(group)
        self._heat_rank = heat_rank

    def decompose(self, matrix: Tensor) -> SVD:
        """The leading part of W (float64 matrices are Σ: all of it), the same to the bit on all processes."""
        from hpclr.parallel.heat import leading_svd

        rank = ceil(self._heat_rank * min(matrix.shape))
        return SVD(*leading_svd(matrix, rank))

    def share(self, costs: Mapping[str, float], examine: Examine, memory: Memory) -> dict[str, Outcome]:
        """Has every layer examined by all; see `hpclr.methods.placement.Placement`."""
        return {name: examine(name) for name in costs}


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


def _flat(outcomes: Mapping[str, Outcome]) -> tuple[dict[str, Any], list[Tensor]]:
    """Outcomes as a JSON value and a list of tensors: three for each layer that has a new basis."""
    value = {name: [o.rank, o.stability, o.basis is not None, o.noise, o.failed] for name, o in outcomes.items()}
    return value, [part for o in outcomes.values() if o.basis is not None for part in o.basis]


def _outcomes(value: dict[str, Any], tensors: list[Tensor]) -> dict[str, Outcome]:
    parts = iter(tensors)
    return {
        name: Outcome(rank, stability, SVD(next(parts), next(parts), next(parts)) if changes else None, noise, failed)
        for name, (rank, stability, changes, noise, failed) in value.items()
    }
