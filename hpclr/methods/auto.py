"""OIALR without settings (`auto=True`): a layer freezes by the noise in its weight, at the rank that its outputs need.

A weight in training is noise, first of all that of its initialisation, and what it has learned, which is of far lower
rank: a learned direction is seen once its singular value stands out of the spectrum of noise (`hpclr.lowrank.noise`).
So at each check, of which there are twenty in a run, and for each layer that is still dense, W (m×n)

    noise     σ from the median singular value; the k values above the edge of the noise, P = U_k V_kᵀ
    is still  if 0 < k ≤ k', the k of the last check, and ⟨P, P'⟩ / (‖P‖ ‖P'‖) ≥ (1/k) Σᵢ ⟨uᵢ, ûᵢ⟩² ⟨vᵢ, v̂ᵢ⟩²
    settled   if it is still at two checks in a row: W becomes U_r Σ V_rᵀ, and Σ is what is trained from then on

No direction has come out of the noise since the last check, and those that are out have turned no further than they
would have if only the noise had been drawn anew: û = √a u + √(1 − a) w with w independent of u and of another draw, so
that ⟨û, û'⟩ is a = ⟨u, û⟩² on average, and likewise for v. A layer that has not settled by `delay` is taken as it is
then. As long as factors of rank r would be larger or slower than the dense weight, W stays as it is and is watched.

r is the least rank at which the layer's outputs, of the inputs of the step before, are those of W to 1.4 %:
E‖(W − W_r) x‖² ≤ 0.0002 E‖W x‖². That is more than k: what lies below the edge of the noise still does something to
outputs, and a Σ of k directions has too little left to learn.

The published method freezes at a step that is chosen by hand and cuts by a share β of σ₁, likewise chosen.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, cast

from torch import Tensor

from hpclr.lowrank.factors import SVD
from hpclr.lowrank.noise import outlier, strength
from hpclr.lowrank.ranks import MarchenkoPastur, noise_judged_by

P = ParamSpec("P")

AUTO: Mapping[str, Any] = {
    "delay": 0.6,
    "every": 0.05,
    "cutoff": {"rule": "energy", "share": 0.9998},
    "layer_fraction": 1.0,
    "max_cut": 1.0,
    "keep_first": True,
    "freeze": "stable",
    "stability_threshold": 0.99,
    "convert": "when_it_pays",
    "sigma_lr": 2.0,
    "order": "output",
}
"""What `auto` decides, in the words of OIALR's settings; the threshold of stability is that of each layer's noise."""


class Signal(NamedTuple):
    """What stands out of the noise in a weight (m×n).

    Attributes:
        polar: U_k V_kᵀ (m×n) of the k directions that do.
        rank: k.
        noise: standard deviation of an entry's noise.
        redrawn: the stability of `polar` that is left if nothing but the noise is drawn anew.
    """

    polar: Tensor
    rank: int
    noise: float
    redrawn: float

    def is_still(self, stability: float | None, before: int) -> bool:
        """Whether it is what it was at the last check, but for noise.

        Args:
            stability: of `polar` since then; None if that is not known.
            before: the rank at that check.
        """
        return 0 < self.rank <= before and stability is not None and stability >= self.redrawn


def signal_in(basis: SVD, rule: MarchenkoPastur) -> Signal:
    """The part of a weight that stands out of the noise.

    Args:
        basis: the weight's decomposition, of which at most half of the singular values may be missing.
        rule: counts the values above the edge.
    """
    shape = (basis.u.shape[0], basis.vh.shape[1])
    rank, noise = rule(basis.s, shape), noise_judged_by(rule, basis.s, shape)
    kept = basis.leading(rank)
    seen = [outlier(strength(value / noise, shape), shape) for value in kept.s.tolist()] if noise else []
    redrawn = sum(left * right for _, left, right in seen) / rank if seen else 1.0
    return Signal(kept.u @ kept.vh, rank, noise, redrawn)


def decides_alone(init: Callable[P, None]) -> Callable[P, None]:
    """A constructor that, told `auto=True`, is given `AUTO` as well.

    It then raises ValueError for a setting that is decided so and given too, or if the length of the run is unknown.
    """

    @wraps(init)
    def with_auto(*args: P.args, **settings: P.kwargs) -> None:
        given = cast(dict[str, Any], settings)
        init(*args, **(_decided(given) if given.get("auto") else given))

    return with_auto


def _decided(given: Mapping[str, Any]) -> dict[str, Any]:
    clashes = [f"{key}={given[key]!r}" for key in AUTO if key in given and given[key] != AUTO[key]]
    if clashes:
        raise ValueError(
            f"auto=True decides {', '.join(AUTO)} itself, but {', '.join(clashes)} is given; leave it out, or set auto "
            "to False and give delay, every and whatever else is to differ from its default"
        )
    if given.get("total_steps") is None:
        raise ValueError("auto=True shares its checks out over the run, whose length is not known; pass total_steps=")
    return {**given, **AUTO}
