"""SARA: fine-tuning with ranks from the spectra of the pretrained weights (Gu et al., arXiv 2408.03290).

    W' = W + A diag(Λ) B         A (m×k), Λ (k), B (k×n) trained, B = 0 at the start; W frozen
    k                            the least number of singular values of W whose sum reaches `proportion` of their total

The form is that of `hpclr.lowrank.adapters.sara`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hpclr.lowrank import SumProportion, WeightSite
from hpclr.lowrank.adapters.sara import SARALayer, start
from hpclr.lowrank.spectra import singular_values
from hpclr.methods.adapting import Adapter
from hpclr.methods.placement import Outcome


@dataclass(eq=False, repr=False, kw_only=True)
class SARA(Adapter):
    """Fine-tunes a pretrained model inside any training loop.

        sara = SARA(model, proportion=0.02)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        ...
        sara.merge()                     # for use: as fast as the model was
        sara.unmerge()                   # the pretrained weights, to the bit

    Args:
        proportion: the share, above 0 and at most 1, of the sum of a weight's singular values that its k largest reach.

    Further arguments, attributes and errors are those of all adapters, `hpclr.methods.adapting.Adapter`.
    """

    name = "sara"
    title = "SARA"
    form = SARALayer

    proportion: float

    def _check_settings(self) -> None:
        self._rule = SumProportion(self.proportion)

    def _basis(self, site: WeightSite) -> int:
        return max(1, self._rule(singular_values(site.core()), site.shape))

    def _start(self, weight: Tensor, found: Outcome, generator: torch.Generator) -> dict[str, Tensor]:
        return start(weight, found.rank, generator)
