"""Fixed rank: W = A B from the first step on, at a rank set by hand (Khodak et al., arXiv 2105.01029).

    spectral start       A = U_k √Σ_k, B = √Σ_k V_kᵀ           of the weight as it was initialised (or pretrained)
    random start         A, B normal, ‖A B‖_F = ‖W‖_F          the entries of A B have the variance of those of W
    Frobenius decay      loss + λ/2 Σ ‖A B‖²_F                 decays the product, as weight decay would W; in place of
                                                               that of A and B, which decays the nuclear norm of A B

Khodak et al. find that spectral start and Frobenius decay help together, and that each alone may hurt.
"""

from collections.abc import Sequence
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from hpclr.lowrank.factors import SVD
from hpclr.lowrank.sites import WeightSite
from hpclr.methods.checks import check_fixed_rank_settings
from hpclr.methods.placement import Placement
from hpclr.methods.random_start import random_product
from hpclr.methods.two_factors import TwoFactors, share_of_side, share_or_rule


class FixedRank(TwoFactors):
    """Trains a model at a fixed low rank inside any training loop.

        fixed = FixedRank(model, optimizer, rank=0.25, frobenius_decay=1e-4)
        ...
        (loss + fixed.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        fixed.step()

    Args:
        model: any module, or a `hpclr.parallel.Replica` of one; its layers are converted in place, now.
        optimizer: holds the model's parameters; A and B take the place of their weight in it.
        rank: a share of min(m, n), rounded up.
        init: "spectral", the leading part of the weight's decomposition; or "random", which follows from the weight, so
            from the seed.
        frobenius_decay: λ of the penalty λ/2 Σ ‖A B‖²_F, which takes the place of the optimiser's weight decay of A and
            B, so that 0 is none at all; None: no penalty, and the optimiser's own weight decay.
        max_aspect: weights with max(m, n)/min(m, n) of this or more stay dense.
        keep_first: keep the first layer of an eligible type dense.
        keep_last: keep the last one (the head) dense.
        include: patterns (`*`, `?`) of the names of layers to convert; None means all.
        exclude: patterns of the names of layers to keep dense.
        placement: which process decomposes which layer; None: as the replica says, else this one all of them.

    Attributes:
        report: layer name → why it stays dense.

    Raises:
        ValueError: for a setting out of range, a pattern that matches nothing, a model without eligible layers or with
            layers that are factored already, weights that are not finite, an optimiser that does not hold the model's
            parameters.
        TypeError: for an optimiser that cannot follow, or a model wrapped in DistributedDataParallel.
    """

    name = "fixed_rank"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        rank: float,
        init: Literal["spectral", "random"] = "spectral",
        frobenius_decay: float | None = None,
        max_aspect: float = 10.0,
        keep_first: bool = False,
        keep_last: bool = True,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        placement: Placement | None = None,
    ) -> None:
        check_fixed_rank_settings(rank, init, frobenius_decay, max_aspect)
        self._rank, self._init = rank, init
        super().__init__(
            model,
            optimizer,
            title="fixed rank",
            frobenius_decay=frobenius_decay,
            placement=placement,
            max_aspect=max_aspect,
            keep_first=keep_first,
            keep_last=keep_last,
            include=include,
            exclude=exclude,
        )
        self._convert()

    def step(self) -> None:
        """Nothing is ever due."""

    def _product(self, site: WeightSite) -> SVD:
        if self._init == "random":
            return random_product(site.core(), share_of_side(self._rank, site.shape))
        return self._leading(site, share_or_rule(self._rank), 0.0)
