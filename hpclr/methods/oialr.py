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
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpclr.lowrank import KINDS, MarchenkoPastur, RankRule, WeightSite, rank_rule, select
from hpclr.lowrank.factors import SVD, finite, working_dtype
from hpclr.lowrank.moments import check_optimizer
from hpclr.methods.auto import decides_alone
from hpclr.methods.base import ChangeHook, Method, no_penalty
from hpclr.methods.checks import (
    check_layers,
    check_model,
    check_order,
    check_saved,
    check_saved_by,
    check_settings,
    check_whole,
    placement_of,
)
from hpclr.methods.examining import Examiner
from hpclr.methods.factoring import change_basis, share_outcomes
from hpclr.methods.placement import Here, Outcome, Placement
from hpclr.methods.probing import Probe
from hpclr.methods.schedule import CheckSchedule, exact, in_steps
from hpclr.methods.stability import StabilityTracker
from hpclr.methods.steps import OptimizerSteps
from hpclr.methods.watching import Inputs, warn_of_unseen


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
        order: by what directions are judged and cut: "size", that of their singular values, as published; or "output",
            what they do to the layer's outputs: those of W C^½, with C = E[x xᵀ] of its inputs x in the step before the
            check. The cutoff is of these values then. For rules that do not judge by noise; not for sharded models.
        tied: convert a head too whose weight is that of an embedding (GPT-2), and both to the same factors, whatever
            `max_aspect`, `keep_first` and `keep_last` say; by "output" the head's inputs alone judge them, `outside`
            is of the gradient of both uses. Not for sharded models.
        total_steps: the length of the run; needed if `delay` or `every` are fractions of it.
        placement: which process examines which layer; None: as the replica says, else this one all of them.
        auto: when layers freeze and at which ranks follows from the noise in their weights (`hpclr.methods.auto`); no
            setting in `hpclr.methods.auto.AUTO` may be given then, and total_steps must be.

    Attributes:
        failures: how often a layer could not be decomposed (it then keeps its basis).
        frozen_at: layer name → the step at which it was converted.
        outside: layer name → the share of the gradient with regard to the whole weight that lay outside the frozen
            basis at the last check, from 0 to 1; layers that were not measured (`probing`) are absent.
        report: layer name → why it stays dense.

    Raises:
        ValueError: for a setting out of range, a pattern that matches nothing, a model without eligible layers, or with
            `tied` without such a head, an optimiser that does not hold the model's parameters.
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
        order: Literal["size", "output"] = "size",
        tied: bool = False,
        total_steps: int | None = None,
        placement: Placement | None = None,
        auto: bool = False,
    ) -> None:
        check_settings(
            every, layer_fraction, max_cut, min_rank, max_aspect, freeze, stability_threshold, convert, sigma_lr
        )
        self._model = check_model(model, sharded=True)
        names, ends = {"include": include, "exclude": exclude}, {"keep_first": keep_first, "keep_last": keep_last}
        chosen = select(self._model, max_aspect=max_aspect, kinds=KINDS, tied=tied, **names, **ends)  # type: ignore[arg-type]
        self._sites, self.report = {site.name: site for site in chosen.eligible}, chosen.left_alone
        check_layers(self._sites, self.report, "OIALR")
        check_optimizer(optimizer, {site.name: site.parameter for site in chosen.eligible})
        self._optimizer = optimizer
        self._schedule = CheckSchedule(
            in_steps("delay", delay, total_steps), in_steps("every", every, total_steps), layer_fraction
        )
        self._placement = placement or placement_of(model) or Here()
        self._hooks: list[ChangeHook] = []
        self._counter = OptimizerSteps(optimizer, self._sigmas, sigma_lr, [s.parameter for s in chosen.eligible])
        self._tracker = StabilityTracker(stability_threshold)
        self._probe, self.outside = Probe(self._sites, self._placement), dict[str, float]()
        self._inputs = Inputs(self._placement, inside=True)
        self._examiner = Examiner(
            self._placement,
            self._tracker,
            rank_rule(cutoff),
            by_output=order == "output",
            edge=MarchenkoPastur() if auto else None,
            when_stable=freeze == "stable",
            when_it_pays=convert == "when_it_pays",
            max_cut=exact(max_cut),
            min_rank=exact(min_rank),
            watched={site.name: site.rank for site in chosen.eligible},
        )
        check_order(order, self._examiner.rule, self._placement)
        self.frozen_at, self.failures = dict[str, int](), 0
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
        return {
            name: site.rank if site.is_lowrank else self._examiner.watched[name] for name, site in self._sites.items()
        }

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

    @contextmanager
    def probing(self, *, counts: bool = True) -> Iterator[None]:
        """Around forward and backward passes: has the check after this step, if there is one, find `outside`.

        With order "output" it has inputs seen in a model under torch.compile too. In such a step weights are rebuilt,
        and the gradients G with regard to them kept until `step`: see `hpclr.lowrank.probing.dense_gradients`. All
        other steps are as they would be without it. All processes must use it, or none.
        """
        due = self._schedule.latest(self.steps + 1) > self._last_check
        with self._inputs.passes(counts=counts), self._probe.gathering(self.steps + 1) if due else nullcontext():
            yield

    def step(self) -> None:
        """Converts, measures and cuts when a check is due; costs nothing when none is."""
        j = self._schedule.latest(self._counter.taken)
        if j > self._last_check:
            self._check(j)
        self._watch_if_due()

    def _begin(self) -> None:
        """The bases at the start, which the first check compares with; without a delay that check is now."""
        self._last_check = self._schedule.latest(0)
        self._tracker.begin(self._sites, whole=self._schedule.is_due(0))
        for name, outcome in self._share(self._first_look):
            if outcome.failed is not None:
                raise ValueError(f"layer '{name}': {outcome.failed}")
        if self._schedule.delay == 0:
            self._check(0)
        self._watch_if_due()

    def _first_look(self, site: WeightSite) -> Outcome:
        weight = finite(site.core(), "basis")
        if self._schedule.delay > 0:
            self._tracker.remember(site.name, self._examiner.first_basis(site, weight))
        return Outcome(site.rank, None, None)

    def _share(self, examine: Callable[[WeightSite], Outcome]) -> Iterator[tuple[str, Outcome]]:
        """Each layer examined by one process, the outcomes on all."""
        return share_outcomes(self._placement, self._sites, examine, self._tracker.memory)

    @torch.no_grad()
    def _check(self, j: int) -> None:
        """Check j: every layer is examined, by whichever process; every process applies the outcomes."""
        self._last_check = j
        self.checks += 1
        self.outside = self._probe.outside(self.steps)
        covered = self._covered(j)
        self._take_moments(covered)
        for name, outcome in self._share(lambda site: self._examiner.examine(site, j, site.name in covered)):
            self._apply(self._sites[name], outcome)
        self._examiner.moments = {}
        self._placement.confirm(self.ranks, self._model.parameters())

    def _covered(self, j: int) -> set[str]:
        names = list(self._sites)
        return set(names[len(names) - self._schedule.covered(j, len(names)) :])

    def _watch_if_due(self) -> None:
        """Looks at the inputs of the next step, if the check after it wants to judge by them."""
        j = self._schedule.latest(self.steps + 1)
        if self._examiner.by_output and j > self._last_check:
            covered, early = self._covered(j), self._examiner.when_stable and self._examiner.when_it_pays
            self._inputs.watch(s for s in self._sites.values() if s.name in covered or (early and not s.is_lowrank))

    def _take_moments(self, covered: set[str]) -> None:
        self._examiner.moments = found = self._inputs.means()
        unseen = [name for name in self._sites if name in covered - found.keys()]
        if unseen and self._examiner.by_output:
            warn_of_unseen(unseen, "they are not cut")

    def _apply(self, site: WeightSite, outcome: Outcome) -> None:
        self.failures += outcome.failed is not None
        self._examiner.record(site, outcome)
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
            "watched": dict(self._examiner.watched),
            "signals": dict(self._examiner.signals),
            "noise": dict(self._examiner.noise),
            "frozen_at": dict(self.frozen_at),
            "outside": dict(self.outside),
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
        self._examiner.watched = {name: int(rank) for name, rank in state["watched"].items()}
        self._examiner.signals = {name: int(rank) for name, rank in state.get("signals", {}).items()}
        self._examiner.noise = {name: float(noise) for name, noise in state["noise"].items()}
        self.frozen_at = {name: int(step) for name, step in state.get("frozen_at", {}).items()}
        self.outside = {name: float(share) for name, share in state.get("outside", {}).items()}
        self._tracker.load_state_dict(state["stability"])
        self._inputs.drop()
        self._probe.drop()
        self._watch_if_due()
