"""OIALR: Orthogonality-Informed Adaptive Low-Rank training (Coquelin et al., arXiv 2401.08505).

The orthogonal basis U Vᵀ of a network's weights settles early in training. From then on the basis of a layer is
frozen and only its mixing is trained, a small dense Σ whose rank keeps shrinking:

    step < delay         W                     all of it trained (full rank)
    step = delay         W = U Σ Vᵀ            Σ = diag(singular values) becomes what is trained; nothing is cut
    delay + j·every      Σ = U' Σ' V'ᵀ         for the last ⌈j·ℓ·L⌉ of the L layers, j = 1, 2, …:
                         U ← U U', V ← V V'    the basis absorbs the rotation,
                         Σ ← Σ'[:k, :k]        and directions below β·σ₁ are cut; the rank never grows back

Gradients and the optimiser's moments are rotated with the basis (`lowrank.moments`), so that training goes on
as if nothing had happened but the cut. Steps are those the optimiser has really taken.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpclr.lowrank import KINDS, MarchenkoPastur, RankRule, WeightSite, rank_rule, select
from hpclr.lowrank.factors import SVD, finite, polar, working_dtype
from hpclr.lowrank.moments import check_optimizer
from hpclr.lowrank.product import pays
from hpclr.lowrank.ranks import with_noise
from hpclr.lowrank.spectra import measured_in
from hpclr.methods.auto import decides_alone, signal_in
from hpclr.methods.base import ChangeHook, Method, no_penalty
from hpclr.methods.checks import (
    check_layers,
    check_model,
    check_saved,
    check_saved_by,
    check_settings,
    check_whole,
    placement_of,
)
from hpclr.methods.factoring import change_basis, share_outcomes
from hpclr.methods.placement import Here, Outcome, Placement
from hpclr.methods.schedule import CheckSchedule, exact, in_steps
from hpclr.methods.stability import StabilityTracker
from hpclr.methods.steps import OptimizerSteps


class OIALR(Method):
    """Trains a model with OIALR inside any training loop.

        oialr = OIALR(model, optimizer, delay=1000, every=500)
        ...
        optimizer.step()
        optimizer.zero_grad()
        oialr.step()

    Args:
        model: any module, or a `hpclr.parallel.Replica` of one; its layers are converted in place.
        optimizer: holds the model's parameters; its state is carried through every change of basis.
        delay: optimiser steps of full-rank training, or (below 1) a fraction of the run.
        every: optimiser steps between checks, or a fraction of the run.
        cutoff: β, directions with σ < β·σ₁ are cut; or a rank rule (`hpclr.lowrank.rank_rule`).
        layer_fraction: ℓ, by how large a share of the layers each check reaches further towards the input.
        max_cut: the largest share of a converted layer's rank that one check may remove.
        min_rank: no rank falls below max(1, ⌈min_rank·min(m, n)⌉).
        max_aspect: weights with max(m, n)/min(m, n) of this or more stay dense.
        keep_first: keep the first layer of an eligible type dense.
        keep_last: keep the last one (the head) dense.
        include: patterns (`*`, `?`) of the names of layers to convert; None means all.
        exclude: patterns of the names of layers to keep dense.
        freeze: "schedule", all layers at `delay`; or "stable", each when its basis settled, at `delay` at the latest.
        stability_threshold: the stability between checks that counts as settled, if reached twice in a row.
        convert: "at_delay", or "when_it_pays": a layer is converted, and cut, at the first check that covers it and
            finds its rank so low that factors are no larger and no slower than the dense weight; else that trains.
        sigma_lr: a factor on the learning rate of Σ.
        total_steps: the length of the run; needed if `delay` or `every` are fractions of it.
        placement: which process examines which layer; None: as the replica says, else this one all of them.
        auto: when layers freeze and at which ranks follows from the noise in their weights (`hpclr.methods.auto`); no
            setting in `hpclr.methods.auto.AUTO` may be given then, and total_steps must be.

    Attributes:
        failures: how often a layer could not be decomposed (it then keeps its basis).
        frozen_at: layer name → the step at which it was converted.
        report: layer name → why it stays dense.

    Raises:
        ValueError: for a setting out of range, a pattern that matches nothing, a model without eligible layers,
            an optimiser that does not hold the model's parameters.
        TypeError: for an optimiser that cannot follow, or a model wrapped in DistributedDataParallel.
    """

    @decides_alone
    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        delay: float | None = None,
        every: float | None = None,
        cutoff: float | Mapping[str, Any] | RankRule = 0.1,
        layer_fraction: float = 0.1,
        max_cut: float = 0.5,
        min_rank: float = 0.01,
        max_aspect: float = 10.0,
        keep_first: bool = False,
        keep_last: bool = True,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        freeze: Literal["schedule", "stable"] = "schedule",
        stability_threshold: float = 0.99,
        convert: Literal["at_delay", "when_it_pays"] = "at_delay",
        sigma_lr: float = 1.0,
        total_steps: int | None = None,
        placement: Placement | None = None,
        auto: bool = False,
    ) -> None:
        check_settings(
            every, layer_fraction, max_cut, min_rank, max_aspect, freeze, stability_threshold, convert, sigma_lr
        )
        self._model = check_model(model, sharded=True)
        names, ends = {"include": include, "exclude": exclude}, {"keep_first": keep_first, "keep_last": keep_last}
        chosen = select(self._model, max_aspect=max_aspect, kinds=KINDS, **names, **ends)  # type: ignore[arg-type]
        self._sites = {site.name: site for site in chosen.eligible}
        self.report = chosen.left_alone
        check_layers(self._sites, self.report, "OIALR")
        check_optimizer(optimizer, {site.name: site.parameter for site in chosen.eligible})
        self._optimizer = optimizer
        self._rule = rank_rule(cutoff)
        self._edge = self._rule if auto and isinstance(self._rule, MarchenkoPastur) else None
        self._schedule = CheckSchedule(
            in_steps("delay", delay, total_steps), in_steps("every", every, total_steps), layer_fraction
        )
        self._max_cut, self._min_rank = exact(max_cut), exact(min_rank)
        self._when_stable, self._when_it_pays = freeze == "stable", convert == "when_it_pays"
        self._placement = placement or placement_of(model) or Here()
        self._hooks: list[ChangeHook] = []
        self._counter = OptimizerSteps(optimizer, self._sigmas, sigma_lr, [s.parameter for s in chosen.eligible])
        self._tracker = StabilityTracker(stability_threshold)
        self._watched = {site.name: site.rank for site in chosen.eligible}
        self._noise: dict[str, float] = {}
        self.frozen_at: dict[str, int] = {}
        self.failures = 0
        self._begin()

    @property
    def steps(self) -> int:
        """Optimiser steps taken so far."""
        return self._counter.taken

    @property
    def delay(self) -> int:
        """The step of conversion."""
        return self._schedule.delay

    @property
    def ranks(self) -> dict[str, int]:
        """Layer name → rank: of its Σ once it is converted, until then what the rule would keep."""
        return {name: site.rank if site.is_lowrank else self._watched[name] for name, site in self._sites.items()}

    @property
    def frozen(self) -> dict[str, bool]:
        """Layer name → whether its basis is frozen, that is, whether it has been converted."""
        return {name: site.is_lowrank for name, site in self._sites.items()}

    @property
    def stability(self) -> dict[str, float]:
        """Layer name → stability of its basis over the last two checks; layers not yet measured are absent."""
        return dict(self._tracker.last)

    def penalty(self) -> Tensor:
        """OIALR adds nothing to the loss."""
        return no_penalty(self._model)

    def on_change(self, hook: ChangeHook) -> None:
        """Has `hook` called with every later change of basis.

        Raises:
            TypeError: for a sharded model, of which whatever would follow holds only a part.
        """
        check_whole(self._placement)
        self._hooks.append(hook)

    def step(self) -> None:
        """Converts, measures and cuts when a check is due; costs nothing when none is."""
        j = self._schedule.latest(self._counter.taken)
        if j > self._last_check:
            self._check(j)

    def _begin(self) -> None:
        """The bases at the start, which the first check compares with; without a delay that check is now."""
        self._last_check = self._schedule.latest(0)
        self._tracker.begin(self._sites, whole=self._schedule.is_due(0))
        for name, outcome in self._share(self._first_look):
            if outcome.failed is not None:
                raise ValueError(f"layer '{name}': {outcome.failed}")
        if self._schedule.delay == 0:
            self._check(0)

    def _first_look(self, site: WeightSite) -> Outcome:
        weight = finite(site.core(), "basis")
        if self._schedule.delay > 0:
            self._tracker.remember(site.name, self._first_basis(site, weight))
        return Outcome(site.rank, None, None)

    def _first_basis(self, site: WeightSite, weight: Tensor) -> Tensor:
        if self._edge is not None and not site.is_lowrank:
            return signal_in(self._placement.decompose(weight, dense=True), self._edge).polar
        return self._placement.measure(weight, None, dense=not site.is_lowrank).polar

    def _share(self, examine: Callable[[WeightSite], Outcome]) -> Iterator[tuple[str, Outcome]]:
        """Each layer examined by one process, the outcomes on all."""
        return share_outcomes(self._placement, self._sites, examine, self._tracker.memory)

    @torch.no_grad()
    def _check(self, j: int) -> None:
        """Check j: every layer is examined, by whichever process; every process applies the outcomes."""
        self._last_check = j
        self.checks += 1
        names = list(self._sites)
        covered = set(names[len(names) - self._schedule.covered(j, len(names)) :])
        for name, outcome in self._share(lambda site: self._examine(site, j, site.name in covered)):
            self._apply(self._sites[name], outcome)
        self._placement.confirm(self.ranks, self._model.parameters())

    def _examine(self, site: WeightSite, j: int, covered: bool) -> Outcome:
        if site.is_lowrank:
            return self._examine_sigma(site, covered)
        return (
            self._examine_weight(site, j, covered) if self._edge is None else self._examine_signal(site, j, self._edge)
        )

    def _examine_weight(self, site: WeightSite, j: int, covered: bool) -> Outcome:
        """W: how much of its basis it has kept, the rank it would have, and its factors if it is converted now."""
        weight, due = site.core(), j >= 0
        # the factors of a weight tell all else too, if it is known beforehand that they will be needed
        basis = self._placement.decompose(weight, dense=True) if due and not self._when_it_pays else None
        found = measured_in(basis, self._rule) if basis else self._placement.measure(weight, self._rule, dense=True)
        stability = self._tracker.measure(site.name, found.polar)
        settled = self._when_stable and self._tracker.settles(site.name, stability)
        rank = self._limited(site, found.rank)
        keep = self._converted_rank(site, rank, due=due, covered=covered, settled=settled)
        if keep is not None:
            basis = (basis or self._placement.decompose(weight, dense=True)).leading(keep)
        # only the whole spectrum of a dense weight tells the noise in it
        return Outcome(rank, stability, basis, found.noise)

    def _examine_signal(self, site: WeightSite, j: int, edge: MarchenkoPastur) -> Outcome:
        """W under `auto`: whether what stands out of the noise in it has settled, and factors of that if so."""
        basis = self._placement.decompose(site.core(), dense=True)
        signal = signal_in(basis, edge)
        stability = self._tracker.measure(site.name, signal.polar)
        still = signal.is_still(stability, self._watched[site.name])
        settled = self._tracker.settles(site.name, stability, still)
        rank, due = self._limited(site, signal.rank), j >= 0 and signal.rank > 0
        keep = self._converted_rank(site, rank, due=due, covered=due, settled=settled)
        cut = None if keep is None else basis.leading(keep)
        return Outcome(rank, stability, cut, signal.noise or None, still=still)

    def _examine_sigma(self, site: WeightSite, covered: bool) -> Outcome:
        """Σ: how much of its basis it has kept, and what it is re-factorised to, if the check covers it."""
        sigma = site.core()
        if not covered:
            found = self._placement.measure(sigma, None, dense=False)
            return Outcome(site.rank, self._tracker.measure(site.name, found.polar), None)
        basis = self._placement.decompose(sigma, dense=False)
        stability = self._tracker.measure(site.name, polar(basis.to(working_dtype(sigma.dtype))))
        rule = with_noise(self._rule, self._noise.get(site.name))
        rank = self._limited(site, rule(basis.s, site.shape))
        keep = self._cut(site, rank)
        return Outcome(rank, stability, None if keep is None else basis.leading(keep))

    def _limited(self, site: WeightSite, rank: int | None) -> int:
        """The rank that the rule keeps, not below the floor."""
        least = max(1, ceil(self._min_rank * min(site.shape)))
        return min(site.rank, max(least, rank or 0))

    def _cut(self, site: WeightSite, rank: int) -> int | None:
        """The rank to which a converted layer is re-factorised; None leaves its basis as it is."""
        rank = max(rank, ceil((1 - self._max_cut) * site.rank))
        low_precision = torch.finfo(site.parameter.dtype).bits < 32
        # without a cut the rotation changes nothing but rounding, of which a 16-bit basis can bear little
        return None if low_precision and rank == site.rank else rank

    def _converted_rank(self, site: WeightSite, rank: int, *, due: bool, covered: bool, settled: bool) -> int | None:
        """The rank at which a dense layer is converted now; None leaves it dense."""
        if not self._when_it_pays:
            return site.rank if due or settled else None
        if not (covered or settled):
            return None
        return rank if pays(*site.shape, rank, groups=site.groups, positions=site.positions) else None

    def _apply(self, site: WeightSite, outcome: Outcome) -> None:
        self.failures += outcome.failed is not None
        self._watched[site.name] = outcome.rank
        if outcome.noise is not None:
            self._noise[site.name] = outcome.noise
        if outcome.stability is not None:
            self._tracker.record(site.name, outcome.stability, outcome.still)
        if outcome.basis is not None:
            self._change_basis(site, outcome.basis)
            self._tracker.rebase(site.name, outcome.basis.s.to(working_dtype(site.parameter.dtype)))

    def _change_basis(self, site: WeightSite, basis: SVD) -> None:
        if not site.is_lowrank:
            self.frozen_at[site.name] = self.steps
        with self._placement.whole(site, self._optimizer):
            change = change_basis(site, basis, self._optimizer)
        for hook in self._hooks:
            hook(change)

    def _sigmas(self) -> list[nn.Parameter]:
        return [site.parameter for site in self._sites.values() if site.is_lowrank]

    def state_dict(self) -> dict[str, Any]:
        """Steps, ranks, the position in the schedule, and what is remembered of the bases."""
        return {
            "steps": self.steps,
            "last_check": self._last_check,
            "failures": self.failures,
            "ranks": {name: site.rank for name, site in self._sites.items() if site.is_lowrank},
            "watched": dict(self._watched),
            "noise": dict(self._noise),
            "frozen_at": dict(self.frozen_at),
            "stability": self._tracker.state_dict(self._placement.gather(self._tracker.memory)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a state back and gives the layers the ranks they had.

        Load this first, then the model's state dict, then the optimiser's.

        Raises:
            ValueError: if the state belongs to another method or model; names the first layers that differ or are too
                small.
        """
        check_saved_by("oialr", state, ("watched",))
        check_saved(state["watched"], {name: min(site.shape) for name, site in self._sites.items()})
        for name, site in self._sites.items():
            if name in state["ranks"] or site.is_lowrank:
                with self._placement.whole(site, self._optimizer):
                    site.set_rank(int(state["ranks"][name])) if name in state["ranks"] else site.densify()
        self._counter.taken = int(state["steps"])
        # a run made longer has its checks elsewhere, if they are fractions of it
        self._last_check = min(int(state["last_check"]), self._schedule.latest(self.steps))
        self.failures = int(state["failures"])
        self._watched = {name: int(rank) for name, rank in state["watched"].items()}
        self._noise = {name: float(noise) for name, noise in state["noise"].items()}
        self.frozen_at = {name: int(step) for name, step in state.get("frozen_at", {}).items()}
        self._tracker.load_state_dict(state["stability"])
