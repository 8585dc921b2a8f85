"""Cuttlefish: when and how far to factor, from stable ranks (Wang et al., MLSys 2023, arXiv 2305.02538).

The stable rank ‖W‖²_F / σ₁² of a weight changes early in training and then flattens. Until that is so of all layers the
network trains dense; then it is factored once, at ranks that follow from the stable ranks:

    every step j·every      r_l(j) = ‖W_l‖²_F / σ₁(W_l)²              of every layer, j = 0, 1, 2, …
                            smoothed by  r̄(j) = r̄(j−1) + 2/(w+1)·(r(j) − r̄(j−1))
    all layers flat         mean |r̄(i) − r̄(i−1)| over the last w of i ≤ j has been at most `flatness`
    then, or at `delay`     k_l = ⌈r_l · min(m, n) / r_l(0)⌉           the stable rank in units of that at the start
                            W_l = A B, A = U_k √Σ_k, B = √Σ_k V_kᵀ     where that saves numbers and multiplications

What differs from the authors' program: stable ranks are not cut to whole numbers; slopes are differences of neighbours
and their mean is over all w, not the last 11 of 15; `flatness` is not relaxed for the last two layers; there is a last
moment, `delay`; which layers stay dense follows from shapes, not from a timing on one machine; the optimiser's state
goes on, where the authors begin with a new optimiser.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hpclr.lowrank.factors import SVD, FactorizationError, stable_rank
from hpclr.lowrank.ranks import StableRank
from hpclr.lowrank.sites import WeightSite
from hpclr.lowrank.two_factors import saves
from hpclr.methods.checks import check_cuttlefish_settings, check_measurements
from hpclr.methods.factoring import operations, refuse_failed
from hpclr.methods.placement import Outcome, Placement
from hpclr.methods.schedule import in_steps
from hpclr.methods.trend import Trend
from hpclr.methods.two_factors import TwoFactors


class Cuttlefish(TwoFactors):
    """Trains a model with Cuttlefish inside any training loop.

        cuttlefish = Cuttlefish(model, optimizer, every=len(loader), delay=0.5, total_steps=len(loader) * epochs)
        ...
        (loss + cuttlefish.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        cuttlefish.step()

    Args:
        model: any module, or a `hpclr.parallel.Replica` of one; its layers are converted in place.
        optimizer: holds the model's parameters; A and B take the place of their weight in it, and its state.
        every: optimiser steps between measurements of the stable ranks (the authors': an epoch), or (below 1) a
            fraction of the run.
        delay: the step after which layers are factored at the latest, or a fraction of the run; `window` measurements
            must fit before it.
        window: w, over how many measurements stable ranks are smoothed and slopes averaged.
        flatness: the mean slope, in stable rank per measurement, at which a layer counts as flat.
        frobenius_decay: λ of the penalty λ/2 Σ ‖A B‖²_F, which takes the place of the optimiser's weight decay of A and
            B, so that 0 is none at all; None: no penalty, and the optimiser's own weight decay.
        min_rank: no rank falls below max(1, ⌈min_rank·min(m, n)⌉).
        max_aspect: weights with max(m, n)/min(m, n) of this or more stay dense.
        keep_first: keep the first layer of an eligible type dense.
        keep_last: keep the last one (the head) dense.
        include: patterns (`*`, `?`) of the names of layers to convert; None means all.
        exclude: patterns of the names of layers to keep dense.
        total_steps: the length of the run; needed if `every` or `delay` are fractions of it.
        placement: which process examines which layer; None: as the replica says, else this one all of them.

    Attributes:
        delay: the step of conversion at the latest.
        failures: how often a layer could not be measured or decomposed, as it was not finite.
        report: layer name → why it stays dense.

    Raises:
        ValueError: for a setting out of range, a pattern that matches nothing, a model without eligible layers or with
            layers that are factored already, weights that are not finite, an optimiser that does not hold the model's
            parameters.
        TypeError: for an optimiser that cannot follow, or a model wrapped in DistributedDataParallel.
    """

    name = "cuttlefish"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: float,
        delay: float,
        window: int = 15,
        flatness: float = 0.1,
        frobenius_decay: float | None = None,
        min_rank: float = 0.0,
        max_aspect: float = 10.0,
        keep_first: bool = False,
        keep_last: bool = True,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        total_steps: int | None = None,
        placement: Placement | None = None,
    ) -> None:
        check_cuttlefish_settings(every, window, flatness, frobenius_decay, min_rank, max_aspect)
        self.delay = in_steps("delay", delay, total_steps)
        self._every, self._window, self._flatness = in_steps("every", every, total_steps), int(window), flatness
        check_measurements(self._window, self._every, self.delay)
        self._min_rank = min_rank
        super().__init__(
            model,
            optimizer,
            title="Cuttlefish",
            frobenius_decay=frobenius_decay,
            placement=placement,
            max_aspect=max_aspect,
            keep_first=keep_first,
            keep_last=keep_last,
            include=include,
            exclude=exclude,
        )
        outcomes = self._stable_ranks_now()
        refuse_failed(outcomes)
        self._first = {name: outcome.stability or 0.0 for name, outcome in outcomes.items()}
        self._trends = {name: Trend(first) for name, first in self._first.items()}
        self._measured = 0
        self.step()

    @property
    def stable_ranks(self) -> dict[str, float]:
        """Layer name → smoothed stable rank, as last measured."""
        return {name: trend.smoothed for name, trend in self._trends.items()}

    @property
    def flat(self) -> dict[str, bool]:
        """Layer name → whether its stable rank has flattened."""
        return {name: trend.flat for name, trend in self._trends.items()}

    def step(self) -> None:
        """Measures when that is due, and converts when all is flat or it is time; else costs nothing."""
        if self.converted:
            return
        due = self.steps // self._every
        if due > self._measured:
            self._measured = due
            self._measure()
        if self.steps >= self.delay or all(self.flat.values()):
            self._convert()

    @torch.no_grad()
    def _measure(self) -> None:
        self.checks += 1
        for name, outcome in self._stable_ranks_now().items():
            if outcome.stability is None:
                self.failures += 1
            else:
                self._trends[name].add(outcome.stability, self._window, self._flatness)

    def _stable_ranks_now(self) -> dict[str, Outcome]:
        """Measured by one process for each layer, known to all."""
        return dict(self._placement.share(operations(self._sites), lambda name: _measured(self._sites[name]), {}))

    def _product(self, site: WeightSite) -> SVD | int:
        first = self._first[site.name]
        rule = StableRank(min(site.shape) / first if first else 1.0)  # of a layer that began at zero there is no unit
        basis = self._leading(site, rule, self._min_rank)
        k = len(basis.s)
        return basis if saves(*site.shape, k, groups=site.groups) else k

    def state_dict(self) -> dict[str, Any]:
        """Steps, ranks, and the course of the stable ranks."""
        trends = {name: asdict(trend) for name, trend in self._trends.items()}
        return super().state_dict() | {"measured": self._measured, "first": dict(self._first), "trends": trends}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a state back and gives the layers the form and the ranks they had.

        Load this first, then the model's state dict, then the optimiser's.

        Raises:
            ValueError: if the state belongs to another method or model; names the first layers that differ or are too
                small.
        """
        super().load_state_dict(state)
        # a run made longer has its measurements elsewhere, if they are fractions of it
        self._measured = min(int(state["measured"]), self.steps // self._every)
        self._first = {name: float(first) for name, first in state["first"].items()}
        self._trends = {name: Trend(**trend) for name, trend in state["trends"].items()}


def _measured(site: WeightSite) -> Outcome:
    try:
        return Outcome(site.rank, stable_rank(site.core()), None)
    except FactorizationError as error:
        return Outcome(site.rank, None, None, failed=str(error))
