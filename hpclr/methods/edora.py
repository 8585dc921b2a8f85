"""EDoRA: fine-tuning by a small core between singular vectors, and magnitudes (Nasiri, Garraghan, arXiv 2501.12067).

    W' = mag ⊙ (W + (α/r) U_r R Σ_r V_rᵀ) / ‖W + (α/r) U_r R Σ_r V_rᵀ‖      R (r×r) and mag (m) trained, the rest frozen

The form is that of `hpclr.lowrank.adapters.edora`.
"""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from hpclr.lowrank import WeightSite
from hpclr.lowrank.adapters.edora import EDoRALayer, start
from hpclr.lowrank.factors import SVD
from hpclr.methods.adapting import Adapter, check_whole_number
from hpclr.methods.placement import Outcome, decomposed
from hpclr.methods.schedule import is_number


@dataclass(eq=False, repr=False, kw_only=True)
class EDoRA(Adapter):
    """Fine-tunes a pretrained model inside any training loop; merged and unmerged as SARA.

        edora = EDoRA(model, rank=16, include=["*.query", "*.value", "*.output.dense"])
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    Args:
        rank: r, the same for all layers; a weight with a side shorter than that gets no adapter.
        alpha: the correction is scaled by α/r.
        init_std: σ of the entries of R at the start; 0 leaves the model's function as it is (published: 10⁻⁵, 5·10⁻⁶).

    Further arguments, attributes and errors are those of all adapters, `hpclr.methods.adapting.Adapter`.
    """

    name = "edora"
    title = "EDoRA"
    form = EDoRALayer

    rank: int
    alpha: float = 16.0
    init_std: float = 0.0

    def _check_settings(self) -> None:
        check_whole_number("rank", self.rank)
        if not is_number(self.alpha) or not 0 < self.alpha < inf:
            raise ValueError(f"alpha must be a finite number above 0, found {self.alpha!r}")
        if not is_number(self.init_std) or not 0 <= self.init_std < inf:
            raise ValueError(f"init_std must be a finite number of 0 or more, found {self.init_std!r}")

    def _too_small(self, site: WeightSite) -> str | None:
        m, n = site.shape
        return f"its weight is {m}×{n}, too small for rank {self.rank}" if min(m, n) < self.rank else None

    def _basis(self, site: WeightSite) -> SVD:
        return decomposed(site.core(), dense=True).leading(self.rank)

    def _start(self, weight: Tensor, found: Outcome, generator: torch.Generator) -> dict[str, Tensor]:
        assert found.basis is not None
        return start(weight, found.basis, self.alpha, self.init_std, generator)
