"""SARA: fine-tuning with ranks from the spectra of the pretrained weights (Gu et al., arXiv 2408.03290).

    W' = W + A diag(Λ) B         A (m×k), Λ (k), B (k×n) trained, B = 0 at the start; W frozen
    k                            the least number of singular values of W whose sum reaches `proportion` of their total

The form is that of `hpclr.lowrank.adapters.sara`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpclr.lowrank import SumProportion, WeightSite
from hpclr.lowrank.adapters.sara import SARALayer, start
from hpclr.lowrank.spectra import singular_values
from hpclr.methods.adapting import Adapter
from hpclr.methods.checks import check_layer_settings
from hpclr.methods.placement import Outcome, Placement


class SARA(Adapter):
    """Fine-tunes a pretrained model inside any training loop.

        sara = SARA(model, proportion=0.02)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        ...
        sara.merge()                     # for use: as fast as the model was
        sara.unmerge()                   # the pretrained weights, to the bit

    Args:
        model: any module, or a `hpclr.parallel.Replica` of one; its layers are adapted in place, now, and everything
            else but the head is frozen.
        optimizer: holds the model's parameters: adapters take the place of their weight in its group, and what is
            frozen leaves the groups; None: it is made afterwards, as above.
        proportion: the share, above 0 and at most 1, of the sum of a weight's singular values that its k largest reach.
        max_aspect: weights with max(m, n)/min(m, n) of this or more get no adapter.
        keep_first: the first layer of an eligible type gets no adapter.
        keep_last: the last one, the head, gets no adapter and is trained whole, with its bias, as one that is new to
            the model must be; unless its weight is tied to another layer's.
        include: patterns (`*`, `?`) of the names of layers to adapt; None means all.
        exclude: patterns of the names of layers to adapt not.
        train: patterns of the names of parameters (not layers) that go on training beside adapters and head, such as
            `*.bias`; all else is frozen, whether it was before or not.
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

    name = "sara"
    title = "SARA"
    form = SARALayer

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        proportion: float,
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
        self._rule = SumProportion(proportion)
        super().__init__(
            model,
            optimizer,
            settings={"proportion": proportion},
            train=train,
            seed=seed,
            placement=placement,
            max_aspect=max_aspect,
            keep_first=keep_first,
            keep_last=keep_last,
            include=include,
            exclude=exclude,
        )

    def _basis(self, site: WeightSite) -> int:
        return max(1, self._rule(singular_values(site.core()), site.shape))

    def _start(self, weight: Tensor, found: Outcome, generator: torch.Generator) -> dict[str, Tensor]:
        return start(weight, found.rank, generator)
