"""Rank-elastic training: the directions of every layer are put into order, so that one model serves at every rank.

A layer is W = A B with A (m×K) and B (K×n), and W_k = A_{:k} B_{:k} are its leading k directions. Each step draws a
share f of the smaller side with probability p_f and takes k = ⌈f·min(m, n)⌉ of every layer:

    joint         A_{:k}, B_{:k} get gradients        E_f loss(W_k): direction i takes part with probability P(k ≥ i)
    sequential    directions of the last block only   those before it are held: direction i is fitted to what they leave

Joint sampling is the nesting of NestedLoRA (Ryu et al., arXiv 2402.03655): for a loss quadratic in W the expected
gradient has the weight P(k ≥ max(i, j)) on the pair of directions (i, j), which is its mask M_ij = v_max(i,j) for
w = p; sequential sampling gives M = triu(1) by blocks. As ordered dropout of layers it is Maestro's (Horváth et al.,
arXiv 2308.14929), which draws for one layer at a time (`draw: layer`). Directions that take no part are not computed.

As in neither of them, training begins late and with directions in the order of W C^½ = U S Vᵀ, where C = E[x xᵀ] of the
layer's inputs: A B = U (Uᵀ W), cut to any rank, errs least in the outputs. In the order of their size, the singular
values of W, the leading directions are far from a good model, and what they must unlearn is lost at full rank, too.

The draw follows from the seed and the number of steps taken, so that it is the same on all processes, in all parts of
an accumulated batch, and after a resume. In evaluation all directions count.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from hpclr.lowrank.elastic import by_output
from hpclr.lowrank.factors import SVD, working_dtype
from hpclr.lowrank.sites import WeightSite
from hpclr.lowrank.svd_layers import TrainedFactors
from hpclr.methods.adapting import generator_for
from hpclr.methods.checks import check_nested_settings
from hpclr.methods.placement import Placement
from hpclr.methods.schedule import in_steps
from hpclr.methods.two_factors import TwoFactors, share_of_side, share_or_rule

FRACTIONS = (1.0, 0.5, 0.25, 0.125)


class Nested(TwoFactors):
    """Trains a model whose layers can be cut to any rank afterwards, inside any training loop.

        nested = Nested(model, optimizer, delay=1000)
        ...
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        nested.step()

    Args:
        model: any module, or a `hpclr.parallel.Replica` of one; its layers are converted in place.
        optimizer: holds the model's parameters; A and B take the place of their weight in it, and its state.
        delay: the optimiser step after which weights become A B, or (below 1) a fraction of the run; 0: now. Two
            thirds of the run are right: what is learnt before costs the least, and lower ranks learn fast.
        fractions: the ranks to nest, as shares of min(m, n), rounded up. The largest is the rank that is kept, the
            smallest the lowest that is trained for.
        weights: p, how often each of them is drawn, in proportion; None: equally often.
        nesting: "joint" or "sequential".
        draw: "model", one share for all layers; or "layer", for one layer at a time, all others at their full rank.
        order: in which directions begin: "output", of what they do to the outputs, by the inputs that layers take in
            while the model trains in the step before; or "size", of singular values. With a delay of 0 there is no
            such step, and it is that of size.
        seed: of the draws.
        frobenius_decay: λ of the penalty λ/2 Σ ‖A B‖²_F of the whole products, which takes the place of the optimiser's
            weight decay of A and B; None: no penalty, and the optimiser's own weight decay.
        max_aspect: weights with max(m, n)/min(m, n) of this or more stay dense.
        keep_first: keep the first layer of an eligible type dense.
        keep_last: keep the last one (the head) dense.
        include: patterns (`*`, `?`) of the names of layers to convert; None means all.
        exclude: patterns of the names of layers to keep dense.
        total_steps: the length of the run; needed if `delay` is a fraction of it.
        placement: which process decomposes which layer; None: as the replica says, else this one all of them.

    Attributes:
        delay: the step of the conversion.
        failures: how many layers could not be decomposed, as they were not finite; they stay dense.
        report: layer name → why it stays dense.

    Raises:
        ValueError: for a setting out of range, a pattern that matches nothing, a model without eligible layers or with
            layers that are factored already, an optimiser that does not hold the model's parameters.
        TypeError: for an optimiser that cannot follow, or a model wrapped in DistributedDataParallel.
    """

    name = "nested"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        delay: float,
        fractions: Sequence[float] = FRACTIONS,
        weights: Sequence[float] | None = None,
        nesting: Literal["joint", "sequential"] = "joint",
        draw: Literal["model", "layer"] = "model",
        order: Literal["output", "size"] = "output",
        seed: int = 0,
        frobenius_decay: float | None = None,
        max_aspect: float = 10.0,
        keep_first: bool = False,
        keep_last: bool = True,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        total_steps: int | None = None,
        placement: Placement | None = None,
    ) -> None:
        check_nested_settings(fractions, weights, nesting, draw, order, frobenius_decay, max_aspect)
        self.delay = in_steps("delay", delay, total_steps)
        pairs = sorted(zip(fractions, weights or [1.0] * len(fractions), strict=True))
        self.fractions = [float(fraction) for fraction, _ in pairs]
        self._weights = torch.tensor([weight for _, weight in pairs], dtype=torch.float64)
        self._joint, self._of_one, self._seed = nesting == "joint", draw == "layer", seed
        super().__init__(
            model,
            optimizer,
            title="nesting",
            frobenius_decay=frobenius_decay,
            placement=placement,
            by_output_at=self.delay if order == "output" else None,
            max_aspect=max_aspect,
            keep_first=keep_first,
            keep_last=keep_last,
            include=include,
            exclude=exclude,
        )
        self._statistics = {m: m.momentum for m in self._model.modules() if isinstance(m, _BatchNorm)}
        self.step()

    @property
    def drawn(self) -> dict[str, int]:
        """Layer name → how many directions take part in the next step."""
        return {site.name: cast(TrainedFactors, site.module).leading[site.slot.stem][1] for site in self._products()}

    def step(self) -> None:
        """Converts when it is time, looks at inputs in the step before, and draws for the next step."""
        if self.steps >= self.delay and not self.converted:
            self._convert()
        self._watch_if_due()
        self._draw()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As for the others; the draw of the next step comes back with the number of those taken."""
        super().load_state_dict(state)
        self._draw()

    def _product(self, site: WeightSite) -> SVD:
        moment = self._moments.get(site.name)
        if moment is None:
            return self._leading(site, share_or_rule(self.fractions[-1]), 0.0)
        kept = by_output(site.core().double(), moment).leading(share_of_side(self.fractions[-1], site.shape))
        return kept.to(working_dtype(site.parameter.dtype))

    def _draw(self) -> None:
        """Which directions of which layer the next step takes; running statistics are those of all directions."""
        products, generator = self._products(), generator_for(self._seed, str(self.steps))
        number = int(torch.multinomial(self._weights, 1, generator=generator))
        only = int(torch.randint(len(products), (), generator=generator)) if self._of_one and products else None
        for place, site in enumerate(products):
            layer = cast(TrainedFactors, site.module)
            layer.take_leading(site.slot, *(self._span(site, number) if only in (None, place) else (0, site.rank)))
        partial = bool(products) and number < len(self.fractions) - 1
        for norm, momentum in self._statistics.items():
            norm.momentum = 0.0 if partial else momentum

    def _span(self, site: WeightSite, number: int) -> tuple[int, int]:
        """(held, k) of a layer for the fraction of this number."""
        last = min(site.rank, share_of_side(self.fractions[number], site.shape))
        if self._joint or number == 0:
            return 0, last
        return min(last - 1, share_of_side(self.fractions[number - 1], site.shape)), last
