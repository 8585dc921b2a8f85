"""Truncation: train dense, cut every weight once to low rank, fine-tune. The baseline that every schedule must beat.

    step < at        W (m×n)                 all of it trained
    step = at        W ≈ W_k = U_k Σ_k V_kᵀ  its best approximation of rank k (Eckart and Young 1936)
                     W = A B                 A = U_k √Σ_k (m×k), B = √Σ_k V_kᵀ (k×n)
    at ≤ step        A, B                    both trained

With a share of the full rank for all layers this is the warm-up of Pufferfish (Wang et al., arXiv 2103.03936). The
optimiser's state goes to A and B by the chain rule.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from hpclr.lowrank.factors import SVD
from hpclr.lowrank.ranks import RankRule
from hpclr.lowrank.sites import WeightSite
from hpclr.methods.checks import check_layer_settings, check_order
from hpclr.methods.placement import Placement
from hpclr.methods.schedule import in_steps
from hpclr.methods.two_factors import TwoFactors, share_or_rule


class Truncate(TwoFactors):
    """Trains a model dense, truncates its weights once, and fine-tunes the factors, inside any training loop.

        truncate = Truncate(model, optimizer, at=2000, rank=0.25)
        ...
        optimizer.step()
        optimizer.zero_grad()
        truncate.step()

    Args:
        model: any module, or a `hpclr.parallel.Replica` of one; its layers are converted in place.
        optimizer: holds the model's parameters; A and B take the place of their weight in it, and its state.
        at: the optimiser step after which weights are truncated, or (below 1) a fraction of the run; 0: now.
        rank: a share of min(m, n), rounded up; or a rank rule (`hpclr.lowrank.rank_rule`).
        order: by what directions are judged: "size", that of singular values; or "output", what they do to the layer's
            outputs, by the inputs of the step before (as in OIALR).
        min_rank: no rank falls below max(1, ⌈min_rank·min(m, n)⌉).
        max_aspect: weights with max(m, n)/min(m, n) of this or more stay dense.
        keep_first: keep the first layer of an eligible type dense.
        keep_last: keep the last one (the head) dense.
        include: patterns (`*`, `?`) of the names of layers to convert; None means all.
        exclude: patterns of the names of layers to keep dense.
        total_steps: the length of the run; needed if `at` is a fraction of it.
        placement: which process decomposes which layer; None: as the replica says, else this one all of them.

    Attributes:
        at: the step of truncation.
        failures: how many layers could not be decomposed, as they were not finite; they stay dense.
        report: layer name → why it stays dense.

    Raises:
        ValueError: for a setting out of range, a pattern that matches nothing, a model without eligible layers or with
            layers that are factored already, an optimiser that does not hold the model's parameters.
        TypeError: for an optimiser that cannot follow, or a model wrapped in DistributedDataParallel.
    """

    name = "truncate"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        at: float,
        rank: float | Mapping[str, Any] | RankRule,
        order: Literal["size", "output"] = "size",
        min_rank: float = 0.0,
        max_aspect: float = 10.0,
        keep_first: bool = False,
        keep_last: bool = True,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        total_steps: int | None = None,
        placement: Placement | None = None,
    ) -> None:
        check_layer_settings(min_rank, max_aspect)
        self._rank, self._min_rank = share_or_rule(rank), min_rank
        check_order(order, self._rank)
        self.at = in_steps("at", at, total_steps)
        if order == "output" and self.at == 0:
            raise ValueError(
                "order='output' takes what has gone into layers before `at`, which is 0; let it be 1 or more"
            )
        super().__init__(
            model,
            optimizer,
            title="truncation",
            frobenius_decay=None,
            placement=placement,
            by_output_at=self.at if order == "output" else None,
            max_aspect=max_aspect,
            keep_first=keep_first,
            keep_last=keep_last,
            include=include,
            exclude=exclude,
        )
        self.step()

    def step(self) -> None:
        """Truncates when it is time; costs nothing when it is not."""
        if self.steps >= self.at and not self.converted:
            self._convert()
        self._watch_if_due()

    def _product(self, site: WeightSite) -> SVD:
        return self._leading(site, self._rank, self._min_rank)
