"""Who examines which layer of a sharded model, and how a layer changes its form."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from itertools import zip_longest

from torch import Tensor, nn
from torch.optim import Optimizer

from hpclr.lowrank.sites import WeightSite, select
from hpclr.methods.placement import Examine, Outcome
from hpclr.parallel.group import Group
from hpclr.parallel.placement import Doing, Memory, Spread, _flat, _outcomes
from hpclr.parallel.shards import Shards
from hpclr.parallel.verify import require_equal


class OfShards(Spread):
    """Layers are gathered one at a time for each process that examines; what changes is opened one at a time.

    Args:
        group: the processes.
        doing: told what this process does, and whether that takes the others.
        model: the sharded model.
        shards: its parameters.
        spread: whether all processes examine, each its share by cost, or the first one alone.
    """

    sharded = True

    def __init__(self, group: Group, doing: Doing, model: nn.Module, shards: Shards, *, spread: bool) -> None:
        super().__init__(group, doing)
        self._model, self._shards, self._spread = model, shards, spread

    def share(self, costs: Mapping[str, float], examine: Examine, memory: Memory) -> Iterator[tuple[str, Outcome]]:
        """Has every layer examined; see `hpclr.methods.placement.Placement`."""
        self._shards.close()
        self._plan(costs, memory)
        sites = {site.name: site for site in select(self._model).candidates}
        for turn in self._turns(costs):
            mine = self._examined_here([sites[name] for name in turn], examine)
            self._doing("sharing the outcomes of a check", waiting=True)
            for name in turn:
                found = self._group.broadcast(*_flat(mine), source=self._owners[name])
                yield from _outcomes(*found).items()

    def whole(self, site: WeightSite, optimizer: Optimizer) -> AbstractContextManager[None]:
        """See `hpclr.methods.placement.Placement`."""
        return self._shards.opened(site, optimizer)

    def confirm(self, ranks: Mapping[str, int], parameters: Iterable[Tensor]) -> None:
        """Compares ranks, shapes, and what the layers that have been opened became, over all processes.

        Of what is sharded there is one copy, so that nothing else can differ.

        Raises:
            ReplicasDifferError: naming the processes that differ.
        """
        facts = {
            "ranks": repr(sorted(ranks.items())),
            "shapes of the parameters": repr([tuple(parameter.shape) for parameter in parameters]),
            "changed layers": str(self._shards.take_digest()),
        }
        require_equal(self._group, facts)

    def _plan(self, costs: Mapping[str, float], memory: Memory) -> None:
        if self._spread:
            super()._plan(costs, memory)
            return
        self._owners = dict.fromkeys(costs, 0)
        if not self._group.is_first:
            memory.clear()

    def _turns(self, costs: Mapping[str, float]) -> Iterator[list[str]]:
        """The layers, in each turn at most one for each process, and such as take about as long."""
        queues: dict[int, list[str]] = {}
        for name in sorted(costs, key=lambda name: -costs[name]):
            queues.setdefault(self._owners[name], []).append(name)
        for turn in zip_longest(*queues.values()):
            yield [name for name in turn if name is not None]

    def _examined_here(self, sites: Iterable[WeightSite], examine: Examine) -> dict[str, Outcome]:
        """Gathers what there is to examine of each layer; on its owner alone that stays until it has been examined."""
        with ExitStack() as stack:
            mine = []
            for site in sites:
                shown = self._shards.shown(site, keep=self._owners[site.name] == self._group.rank)
                if stack.enter_context(shown):
                    mine.append(site.name)
            return dict(self._examined(mine, examine))
