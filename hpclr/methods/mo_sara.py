"""Mo-SARA: fine-tuning by several diagonals between singular vectors of the weights (Gu et al., arXiv 2408.03290).

    y = (1 + v) ⊙ (x Wᵀ + (h ⊙ (g Λ)) U_kᵀ) + b       h = x V_k, g = softmax((h · w₁) w₂)
    k                                                 as for SARA, at least one

Trained are Λ (e×k), w₁ (k), w₂ (e) and v (m). The form is that of `hpclr.lowrank.adapters.mo_sara`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpclr.lowrank import SumProportion, WeightSite
from hpclr.lowrank.adapters.mo_sara import MoSARALayer, start
from hpclr.lowrank.factors import SVD
from hpclr.methods.adapting import Adapter, check_whole_number
from hpclr.methods.checks import check_layer_settings
from hpclr.methods.placement import Outcome, Placement, decomposed


class MoSARA(Adapter):
    """Fine-tunes a pretrained model inside any training loop; used as SARA, but cannot be merged.

        mo_sara = MoSARA(model, proportion=0.5, experts=5)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    Args:
        model: any module, or a `hpclr.parallel.Replica` of one; its layers are adapted in place, now, and everything
            else but the head is frozen.
        optimizer: holds the model's parameters: adapters take the place of their weight in its group, and what is
            frozen leaves the groups; None: it is made afterwards, as above.
        proportion: the share, above 0 and at most 1, of the sum of a weight's singular values that its k largest reach.
        experts: e, the number of diagonals.
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

    name = "mo_sara"
    title = "Mo-SARA"
    form = MoSARALayer

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        proportion: float,
        experts: int = 5,
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
        self._rule, self._experts = SumProportion(proportion), check_whole_number("experts", experts)
        super().__init__(
            model,
            optimizer,
            settings={"proportion": proportion, "experts": experts},
            train=train,
            seed=seed,
            placement=placement,
            max_aspect=max_aspect,
            keep_first=keep_first,
            keep_last=keep_last,
            include=include,
            exclude=exclude,
        )

    def _basis(self, site: WeightSite) -> SVD:
        parts = decomposed(site.core(), dense=True)
        return parts.leading(max(1, self._rule(parts.s, site.shape)))

    def _start(self, weight: Tensor, found: Outcome, generator: torch.Generator) -> dict[str, Tensor]:
        assert found.basis is not None
        return start(weight, found.basis, self._experts, generator)
