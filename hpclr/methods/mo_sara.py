"""Mo-SARA: fine-tuning by several diagonals between singular vectors of the weights (Gu et al., arXiv 2408.03290).

    y = (1 + v) ⊙ (x Wᵀ + (h ⊙ (g Λ)) U_kᵀ) + b       h = x V_k, g = softmax((h · w₁) w₂)
    k                                                 as for SARA, at least one

Trained are Λ (e×k), w₁ (k), w₂ (e) and v (m). The form is that of `hpclr.lowrank.adapters.mo_sara`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hpclr.lowrank import SumProportion, WeightSite
from hpclr.lowrank.adapters.mo_sara import MoSARALayer, start
from hpclr.lowrank.factors import SVD
from hpclr.methods.adapting import Adapter, check_whole_number
from hpclr.methods.placement import Outcome, decomposed


@dataclass(eq=False, repr=False, kw_only=True)
class MoSARA(Adapter):
    """Fine-tunes a pretrained model inside any training loop; used as SARA, but cannot be merged.

        mo_sara = MoSARA(model, proportion=0.5, experts=5)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    Args:
        proportion: the share, above 0 and at most 1, of the sum of a weight's singular values that its k largest reach.
        experts: e, the number of diagonals.

    Further arguments, attributes and errors are those of all adapters, `hpclr.methods.adapting.Adapter`.
    """

    name = "mo_sara"
    title = "Mo-SARA"
    form = MoSARALayer

    proportion: float
    experts: int = 5

    def _check_settings(self) -> None:
        self._rule = SumProportion(self.proportion)
        check_whole_number("experts", self.experts)

    def _basis(self, site: WeightSite) -> SVD:
        parts = decomposed(site.core(), dense=True)
        return parts.leading(max(1, self._rule(parts.s, site.shape)))

    def _start(self, weight: Tensor, found: Outcome, generator: torch.Generator) -> dict[str, Tensor]:
        assert found.basis is not None
        return start(weight, found.basis, self.experts, generator)
