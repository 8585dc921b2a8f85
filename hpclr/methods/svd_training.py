"""SVD training: factors kept orthonormal and singular values made sparse (Yang et al. 2020, arXiv 2004.09031).

From the first step on every layer is W = U diag(s) Vᵀ, and U, s and V are all trained. A penalty keeps U and V nearly
orthonormal, so that s goes on being singular values, and makes s sparse; then the small ones are removed:

    L = loss + λ_o Σ_l (‖UᵀU − I‖²_F + ‖VᵀV − I‖²_F) / r²  +  λ_s Σ_l R(s)

    step < regularize_at               λ_s = 0      training in factored form
    regularize_at ≤ step < prune_at    λ_s          R(s): Hoyer ‖s‖₁/‖s‖₂ − 1, its square form, or ‖s‖₁
    step = prune_at                                 each layer keeps the fewest directions without which no more than
                                                    the share e of its energy Σ s² is lost
    prune_at ≤ step                    λ_s = 0      fine-tuning at lower rank

The paper makes each stage a run of its own; here they are one schedule in one run. It multiplies by |s|, a root of
which goes to either factor; here s enters linearly, since the root has an infinite slope at 0. So s may be negative,
which turns a column of U, no more: R counts |s|, the energy s². Steps are those the optimiser has really taken.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpclr.lowrank.factors import SVD, working_dtype
from hpclr.lowrank.moments import check_optimizer
from hpclr.lowrank.sites import WeightSite, select
from hpclr.lowrank.svd_layers import CHANNEL, SPATIAL
from hpclr.lowrank.three_factors import join, keep_directions, split_weight
from hpclr.methods.base import ChangeHook, Method, no_penalty
from hpclr.methods.checks import (
    check_layers,
    check_model,
    check_saved,
    check_saved_by,
    check_svd_settings,
    placement_of,
)
from hpclr.methods.factoring import refuse_failed, share_factors
from hpclr.methods.placement import Here, Placement
from hpclr.methods.random_start import random_factors
from hpclr.methods.regularizers import REGULARIZERS, not_orthonormal
from hpclr.methods.schedule import exact, in_steps
from hpclr.methods.steps import OptimizerSteps

Stage = Literal["pre-training", "regularised", "fine-tuning"]


class SVDTraining(Method):
    """Trains a model with SVD training inside any training loop.

        svd = SVDTraining(model, optimizer, sparsity=0.03, prune_at=2000)
        ...
        (loss + svd.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        svd.step()

    Args:
        model: any module, or a `hpclr.parallel.Replica` of one; its layers are converted in place, now.
        optimizer: holds the model's parameters; U and V join the parameter group of their weight, and with it its
            weight decay. State it has already is carried to the factors, and through the pruning.
        sparsity: λ_s, the weight of R(s).
        prune_at: the optimiser step after which directions are removed, or (below 1) a fraction of the run.
        energy: e, the share of its energy Σ s² that a layer may lose in the pruning.
        decomposition: of two-dimensional convolutions: "channel", k×k with r filters, then 1×1; or "spatial", k×1, then
            1×k. All other layers have one form only.
        orthogonality: λ_o, the weight of the orthogonality of U and V.
        regularizer: R, one of "hoyer", "hoyer_square", "l1" and "none".
        init: "svd", the decomposition of the weight that is there; or "random", from scratch: random orthonormal U and
            V (which follow from the weight, so from the seed), and normally distributed s of the weight's norm, so that
            signals have the size for which the weight was initialised.
        regularize_at: from which step on R counts, as `prune_at`.
        min_rank: no rank falls below max(1, ⌈min_rank·min(m, n)⌉).
        max_aspect: weights with max(m, n)/min(m, n) of this or more stay dense.
        keep_first: keep the first layer of an eligible type dense.
        keep_last: keep the last one (the head) dense.
        include: patterns (`*`, `?`) of the names of layers to convert; None means all.
        exclude: patterns of the names of layers to keep dense.
        total_steps: the length of the run; needed if `prune_at` or `regularize_at` are fractions of it.
        placement: which process decomposes which layer; None: as the replica says, else this one all of them.

    Attributes:
        failures: how many layers could not be pruned, as their s was not finite.
        report: layer name → why it stays dense.

    Raises:
        ValueError: for a setting out of range, a pattern that matches nothing, a model without eligible layers, weights
            that are not finite, an optimiser that does not hold the model's parameters.
        TypeError: for an optimiser that cannot follow, or a model wrapped in DistributedDataParallel.
    """

    name = "svd_training"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sparsity: float,
        prune_at: float,
        energy: float = 1e-3,
        decomposition: Literal["channel", "spatial"] = "channel",
        orthogonality: float = 1.0,
        regularizer: Literal["hoyer", "hoyer_square", "l1", "none"] = "hoyer",
        init: Literal["svd", "random"] = "svd",
        regularize_at: float = 0,
        min_rank: float = 0.0,
        max_aspect: float = 10.0,
        keep_first: bool = False,
        keep_last: bool = True,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        total_steps: int | None = None,
        placement: Placement | None = None,
    ) -> None:
        check_svd_settings(decomposition, regularizer, init, orthogonality, sparsity, energy, min_rank, max_aspect)
        self._model = check_model(model)
        self._set_schedule(regularize_at, prune_at, total_steps)
        names, ends = {"include": include, "exclude": exclude}, {"keep_first": keep_first, "keep_last": keep_last}
        kinds = SPATIAL if decomposition == "spatial" else CHANNEL
        chosen = select(self._model, max_aspect=max_aspect, kinds=kinds, **names, **ends)  # type: ignore[arg-type]
        self._sites = {site.name: site for site in chosen.eligible}
        self.report = chosen.left_alone
        check_layers(self._sites, self.report, "SVD training")
        check_optimizer(optimizer, {site.name: site.parameter for site in chosen.eligible})
        _check_vectors(optimizer)
        self._optimizer = optimizer
        self._orthogonality, self._sparsity = orthogonality, sparsity
        self._regularizer = REGULARIZERS[regularizer]
        self._energy, self._min_rank = Fraction(str(energy)), exact(min_rank)
        self._placement = placement or placement_of(model) or Here()
        self._hooks: list[ChangeHook] = []
        self._counter = OptimizerSteps(optimizer, list, 1.0, [site.parameter for site in chosen.eligible])
        self._pruned, self.failures = False, 0
        self._convert(init)

    def _set_schedule(self, regularize_at: float, prune_at: float, total_steps: int | None) -> None:
        self.regularize_at = in_steps("regularize_at", regularize_at, total_steps)
        self.prune_at = in_steps("prune_at", prune_at, total_steps)
        if not self.regularize_at < self.prune_at:
            raise ValueError(f"regularize_at must come before prune_at, found {regularize_at} and {prune_at}")

    @property
    def steps(self) -> int:
        """Optimiser steps taken so far."""
        return self._counter.taken

    @property
    def stage(self) -> Stage:
        """Where in the schedule the next step is."""
        if self._pruned:
            return "fine-tuning"
        return "regularised" if self.steps >= self.regularize_at else "pre-training"

    @property
    def ranks(self) -> dict[str, int]:
        """Layer name → rank."""
        return {name: site.rank for name, site in self._sites.items()}

    def penalty(self) -> Tensor:
        """λ_o Σ (O(U) + O(V)) + λ_s Σ R(s) of this stage, in full precision under autocast too."""
        total = no_penalty(self._model)
        sparsity = self._sparsity if self.stage == "regularised" else 0.0
        with torch.autocast(total.device.type, enabled=False):
            for site in self._sites.values():
                u, s, vh = (factor.to(working_dtype(factor.dtype)) for factor in site.factors)
                if self._orthogonality:
                    total = total + self._orthogonality * (not_orthonormal(u.mT) + not_orthonormal(vh))
                if sparsity:
                    total = total + sparsity * self._regularizer(s)
        return total

    def on_change(self, hook: ChangeHook) -> None:
        """Has `hook` called at the pruning for U, s and Vᵀ of every layer that loses directions."""
        self._hooks.append(hook)

    def step(self) -> None:
        """Prunes when it is time; costs nothing when it is not."""
        if self.steps >= self.prune_at and not self._pruned:
            self._prune()

    @torch.no_grad()
    def _convert(self, init: str) -> None:
        """W → U diag(s) Vᵀ; each decomposed by one process, the factors on all."""
        dense = {name: site for name, site in self._sites.items() if not site.is_lowrank}
        outcomes = dict(share_factors(self._placement, dense, lambda site: self._decomposed(site, init)))
        refuse_failed(outcomes)
        for name, site in self._sites.items():
            if name in outcomes and (basis := outcomes[name].basis) is not None:
                split_weight(site, basis, self._optimizer)
            join(self._optimizer, site)
        self._placement.confirm(self.ranks, self._model.parameters())

    def _decomposed(self, site: WeightSite, init: str) -> SVD:
        return self._placement.decompose(site.core(), dense=True) if init == "svd" else random_factors(site.core())

    @torch.no_grad()
    def _prune(self) -> None:
        """Every layer loses the directions that the energy allows; the same ones on all processes."""
        self._pruned = True
        self.checks += 1
        for site in self._sites.values():
            s = site.factors.sigma
            if not torch.isfinite(s).all():
                self.failures += 1
                continue
            kept = directions_kept(s, self._energy, max(1, ceil(self._min_rank * min(site.shape))))
            if len(kept) < site.rank:
                for change in keep_directions(site, torch.tensor(kept), self._optimizer):
                    for hook in self._hooks:
                        hook(change)
        self._placement.confirm(self.ranks, self._model.parameters())

    def state_dict(self) -> dict[str, Any]:
        """Whose state it is, steps, ranks, and whether the pruning is done."""
        return {
            "method": self.name,
            "steps": self.steps,
            "pruned": self._pruned,
            "failures": self.failures,
            "ranks": self.ranks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a state back and gives the layers the ranks they had.

        Load this first, then the model's state dict, then the optimiser's.

        Raises:
            ValueError: if the state belongs to another method or model; names the first layers that differ or are too
                small.
        """
        check_saved_by(self.name, state, self.state_dict())
        check_saved(state["ranks"], {name: min(site.shape) for name, site in self._sites.items()})
        for name, site in self._sites.items():
            site.set_rank(int(state["ranks"][name]))
        self._counter.taken = int(state["steps"])
        self._pruned, self.failures = bool(state["pruned"]), int(state["failures"])


def directions_kept(s: Tensor, energy: Fraction, least: int) -> list[int]:
    """The fewest directions, but `least`, without which no more than a share of Σ s² is lost; exact, in their order."""
    squares = [Fraction(value) ** 2 for value in s.double().tolist()]
    allowed, lost, removed = energy * sum(squares), Fraction(0), set()
    for i in sorted(range(len(squares)), key=lambda i: (squares[i], -i))[: max(0, len(squares) - least)]:
        lost += squares[i]
        if lost > allowed:
            break
        removed.add(i)
    return [i for i in range(len(squares)) if i not in removed]


def _check_vectors(optimizer: Optimizer) -> None:
    if isinstance(optimizer, getattr(torch.optim, "Muon", ())):
        raise TypeError(
            "Muon trains matrices only, and the singular values s are vectors; use SGD, Adam, AdamW or another "
            "optimiser for parameters of any shape"
        )
