"""What the methods have in common that at one moment replace weights by products W = A B and then train A and B."""

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpclr.lowrank.factors import SVD, working_dtype
from hpclr.lowrank.moments import check_optimizer
from hpclr.lowrank.ranks import RankRule, rank_rule
from hpclr.lowrank.regression import order_by_output
from hpclr.lowrank.sites import WeightSite, select
from hpclr.lowrank.svd_layers import CHANNEL
from hpclr.lowrank.two_factors import give_rank, merge, split_in_two
from hpclr.methods.base import ChangeHook, Method, no_penalty
from hpclr.methods.checks import (
    check_dense,
    check_layers,
    check_model,
    check_saved,
    check_saved_by,
    check_share,
    placement_of,
)
from hpclr.methods.factoring import refuse_failed, share_factors
from hpclr.methods.placement import Here, Placement
from hpclr.methods.regularizers import squared_norm
from hpclr.methods.schedule import exact
from hpclr.methods.steps import OptimizerSteps, WithoutDecay
from hpclr.methods.watching import Inputs, warn_of_unseen


class TwoFactors(Method):
    """Layers that become products of two trained factors, all at one moment; a method says when, and at which rank.

    Args:
        model: any module, or a `hpclr.parallel.Replica` of one; its layers are converted in place.
        optimizer: holds the model's parameters; A and B take the place of their weight in it, and its state.
        title: the method's name, for messages.
        frobenius_decay: λ of the penalty λ/2 Σ ‖A B‖²_F, which takes the place of the optimiser's weight decay of A and
            B; None: there is none, and their weight decay is that of their weight.
        placement: which process decomposes which layer; None: as the replica says, else this one all of them.
        by_output_at: the step after which layers are converted by what their directions do to outputs; None, or 0,
            before which nothing has gone through them: by size.
        of_layers: which layers, as `hpclr.lowrank.select` takes it.

    Attributes:
        name: the method's name in run files and in saved states.
        failures: how many layers could not be decomposed; they stay dense.
    """

    name: ClassVar[str]

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        title: str,
        frobenius_decay: float | None,
        placement: Placement | None,
        by_output_at: int | None = None,
        **of_layers: Any,
    ) -> None:
        self._model = check_model(model)
        chosen = select(self._model, kinds=CHANNEL, **of_layers)
        self._sites = {site.name: site for site in chosen.eligible}
        self._left_alone, self._kept_dense = chosen.left_alone, dict[str, str]()
        check_layers(self._sites, chosen.left_alone, title)
        check_dense(chosen.eligible)
        check_optimizer(optimizer, {site.name: site.parameter for site in chosen.eligible})
        self._optimizer = optimizer
        self._placement = placement or placement_of(model) or Here()
        self._hooks: list[ChangeHook] = []
        self._counter = OptimizerSteps(optimizer, list, 1.0, [site.parameter for site in chosen.eligible])
        self._frobenius_decay = frobenius_decay
        if frobenius_decay is not None:
            WithoutDecay(optimizer, self._factors)
        self._converted, self.failures = False, 0
        self._by_output_at = by_output_at or None
        self._inputs = Inputs(self._placement, inside=False)
        self._moments: Mapping[str, Tensor] = {}

    @abstractmethod
    def _product(self, site: WeightSite) -> SVD | int:
        """U, s and Vᵀ, as many directions as the product shall have; or that number alone, if it stays dense.

        Raises:
            FactorizationError: if the weight cannot be decomposed.
        """

    def probing(self, *, counts: bool = True) -> AbstractContextManager[None]:
        """Around forward and backward passes: has inputs seen in a model under torch.compile too, where order asks."""
        return self._inputs.passes(counts=counts)

    @property
    def steps(self) -> int:
        """Optimiser steps taken so far."""
        return self._counter.taken

    @property
    def converted(self) -> bool:
        """Whether layers have become products."""
        return self._converted

    @property
    def ranks(self) -> dict[str, int]:
        """Layer name → rank; of a dense layer the full one."""
        return {name: site.rank for name, site in self._sites.items()}

    @property
    def report(self) -> dict[str, str]:
        """Layer name → why it stays dense."""
        return self._left_alone | self._kept_dense

    def penalty(self) -> Tensor:
        """λ/2 Σ ‖A B‖²_F, in full precision under autocast too."""
        total = no_penalty(self._model)
        if not self._frobenius_decay:
            return total
        with torch.autocast(total.device.type, enabled=False):
            for site in self._products():
                a, s, b = (factor.to(working_dtype(factor.dtype)) for factor in site.factors)
                total = total + self._frobenius_decay / 2 * squared_norm(a * s, b)
        return total

    def on_change(self, hook: ChangeHook) -> None:
        """Has `hook` called at a later conversion for A, B and what was the weight of every layer converted."""
        self._hooks.append(hook)

    @torch.no_grad()
    def _convert(self) -> None:
        """W → A B; each decomposed by one process, the factors on all."""
        self._take_moments()
        outcomes = share_factors(self._placement, self._sites, self._product)
        if self.steps == 0:  # all or none; there are no gradients and moments yet, but room for them
            outcomes = iter(refuse_failed(dict(outcomes)).items())
        self._converted = True
        self.checks += 1
        for name, outcome in outcomes:
            if outcome.basis is None:
                self.failures += outcome.failed is not None
                self._kept_dense[name] = outcome.failed or f"factors of rank {outcome.rank} would save nothing"
                continue
            for change in split_in_two(self._sites[name], outcome.basis, self._optimizer):
                for hook in self._hooks:
                    hook(change)
        self._moments = {}
        self._placement.confirm(self.ranks, self._model.parameters())

    def _watch_if_due(self) -> None:
        """Looks at inputs in the step before the conversion."""
        if self._by_output_at == self.steps + 1 and not self.converted:
            self._inputs.watch(self._sites.values())

    def _take_moments(self) -> None:
        self._moments = self._inputs.means()
        unseen = [name for name in self._sites if name not in self._moments]
        if unseen and self._by_output_at is not None:
            warn_of_unseen(unseen, "their directions are taken in the order of singular values")

    def _leading(self, site: WeightSite, wanted: RankRule, min_rank: float) -> SVD:
        """The decomposition of a weight, cut to what a rule keeps, but not below the floor."""
        weight, moment = site.core(), self._moments.get(site.name)
        least = max(1, share_of_side(min_rank, site.shape))
        if moment is None:
            basis = self._placement.decompose(weight, dense=True)
            return basis.leading(max(least, wanted(basis.s, site.shape)))
        order = order_by_output(weight, moment)
        return order.cut(weight, max(least, wanted(order.s, site.shape))).to(working_dtype(weight.dtype))

    def _products(self) -> list[WeightSite]:
        return [site for site in self._sites.values() if site.is_lowrank]

    def _factors(self) -> list[nn.Parameter]:
        return [factor for site in self._products() for factor in (site.factors.u, site.factors.vh)]  # type: ignore[misc]

    def state_dict(self) -> dict[str, Any]:
        """Whose state it is, steps, ranks, and whether and how the layers have been converted."""
        return {
            "method": self.name,
            "steps": self.steps,
            "converted": self._converted,
            "failures": self.failures,
            "kept_dense": dict(self._kept_dense),
            "ranks": {site.name: site.rank for site in self._products()},
            "layers": self.ranks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a state back and gives the layers the form and the ranks they had.

        Load this first, then the model's state dict, then the optimiser's.

        Raises:
            ValueError: if the state belongs to another method or model; names the first layers that differ or are too
                small.
        """
        self._inputs.drop()
        check_saved_by(self.name, state, self.state_dict())
        check_saved(state["layers"], {name: min(site.shape) for name, site in self._sites.items()})
        for name, site in self._sites.items():
            if name in state["ranks"]:
                give_rank(site, int(state["ranks"][name]), self._optimizer)
            elif site.is_lowrank:
                merge(site, self._optimizer)
        self._counter.taken = int(state["steps"])
        self._converted, self.failures = bool(state["converted"]), int(state["failures"])
        self._kept_dense = dict(state["kept_dense"])
        self._watch_if_due()


def share_or_rule(rank: float | Mapping[str, Any] | RankRule) -> RankRule:
    """What a `rank` asks for: a number is a share of the smaller side, ⌈rank·min(m, n)⌉; else as `rank_rule`.

    Raises:
        ValueError: if it is neither a share above 0 and at most 1 nor a rank rule.
    """
    if isinstance(rank, Mapping) or (callable(rank) and not isinstance(rank, type)):
        return rank_rule(rank)
    return ShareOfSide(check_share(rank, " or a rank rule"))


@dataclass(frozen=True)
class ShareOfSide:
    """⌈share·min(m, n)⌉ whatever the singular values, as a rank rule."""

    share: float

    def __call__(self, singular_values: Tensor, shape: tuple[int, int]) -> int:
        """The rank for this shape."""
        return share_of_side(self.share, shape)


def share_of_side(share: float, shape: tuple[int, int]) -> int:
    """⌈share·min(m, n)⌉, exactly of the decimal number that was written: 0.55 of 100 is 55, not 56."""
    return ceil(exact(share) * min(shape))
