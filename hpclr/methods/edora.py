"""EDoRA: fine-tuning by a small core between singular vectors, and magnitudes (Nasiri, Garraghan, arXiv 2501.12067).

    W' = mag ⊙ (W + (α/r) U_r R Σ_r V_rᵀ) / ‖W + (α/r) U_r R Σ_r V_rᵀ‖      R (r×r) and mag (m) trained, the rest frozen

The form is that of `hpclr.lowrank.adapters.edora`.
"""

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpclr.lowrank import WeightSite
from hpclr.lowrank.adapters.edora import EDoRALayer, start
from hpclr.lowrank.factors import SVD
from hpclr.methods.adapting import Adapter, check_whole_number
from hpclr.methods.checks import check_layer_settings
from hpclr.methods.placement import Outcome, Placement, decomposed
from hpclr.methods.schedule import is_number


class EDoRA(Adapter):
    """Fine-tunes a pretrained model inside any training loop; merged and unmerged as SARA.

        edora = EDoRA(model, rank=16, include=["*.query", "*.value", "*.output.dense"])
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    Args:
        model: any module, or a `hpclr.parallel.Replica` of one; its layers are adapted in place, now, and everything
            else but the head is frozen.
        optimizer: holds the model's parameters: adapters take the place of their weight in its group, and what is
            frozen leaves the groups; None: it is made afterwards, as above.
        rank: r, the same for all layers; a weight with a side shorter than that gets no adapter.
        alpha: the correction is scaled by α/r.
        init_std: σ of the entries of R at the start; 0 leaves the model's function as it is (published: 10⁻⁵, 5·10⁻⁶).
        max_aspect: weights with max(m, n)/min(m, n) of this or more get no adapter.
        keep_first: the first layer of an eligible type gets no adapter.
        keep_last: the last one, the head, gets no adapter and is trained whole; see `SARA`.
        include: patterns (`*`, `?`) of the names of layers to adapt; None means all.
        exclude: patterns of the names of layers to adapt not.
        train: patterns of the names of parameters that go on training beside adapters and head.
        seed: of what is drawn at random for the adapters.
        placement: which process decomposes which layer; None: as the replica says, else this one all of them.

    Attributes:
        report: layer name → why it has no adapter.
        trained: names of the model's own parameters that go on training.

    Raises:
        ValueError: for a setting out of range, a pattern that matches nothing, a model without eligible layers or with
            adapters or factors already, weights that are not finite, an optimiser that does not hold what is trained.
        TypeError: for a model wrapped in DistributedDataParallel, or something that is no optimiser of torch's.
    """

    name = "edora"
    title = "EDoRA"
    form = EDoRALayer

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        rank: int,
        alpha: float = 16.0,
        init_std: float = 0.0,
        max_aspect: float = 10.0,
        keep_first: bool = False,
        keep_last: bool = True,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        train: Sequence[str] = (),
        seed: int = 0,
        placement: Placement | None = None,
    ) -> None:
        check_layer_settings(0, max_aspect)
        self._rank = check_whole_number("rank", rank)
        self._alpha, self._init_std = _check_scales(alpha, init_std)
        super().__init__(
            model,
            optimizer,
            settings={"rank": rank, "alpha": float(alpha), "init_std": float(init_std)},
            train=train,
            seed=seed,
            placement=placement,
            max_aspect=max_aspect,
            keep_first=keep_first,
            keep_last=keep_last,
            include=include,
            exclude=exclude,
        )

    def _too_small(self, site: WeightSite) -> str | None:
        m, n = site.shape
        return f"its weight is {m}×{n}, too small for rank {self._rank}" if min(m, n) < self._rank else None

    def _basis(self, site: WeightSite) -> SVD:
        return decomposed(site.core(), dense=True).leading(self._rank)

    def _start(self, weight: Tensor, found: Outcome, generator: torch.Generator) -> dict[str, Tensor]:
        assert found.basis is not None
        return start(weight, found.basis, self._alpha, self._init_std, generator)


def _check_scales(alpha: float, init_std: float) -> tuple[float, float]:
    if not is_number(alpha) or not 0 < alpha < inf:
        raise ValueError(f"alpha must be a finite number above 0, found {alpha!r}")
    if not is_number(init_std) or not 0 <= init_std < inf:
        raise ValueError(f"init_std must be a finite number of 0 or more, found {init_std!r}")
    return float(alpha), float(init_std)
