"""`method`: whether and how the weights become low-rank."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from hpclr.config.schema.rules import (
    EnergyRule,
    GavishDonohoRule,
    MarchenkoPasturRule,
    RelativeRule,
    StableRankRule,
    SumProportionRule,
)
from hpclr.config.schema.types import (
    BelowOne,
    BetweenZeroAndOne,
    Count,
    Interval,
    Moment,
    NonNegative,
    Positive,
    Section,
    Share,
    doc,
)


class Dense(Section, kw_only=True, frozen=True):
    """Ordinary training; every weight stays dense."""

    name: Annotated[Literal["dense"], doc("This method.")] = "dense"


MinRank = Annotated[Annotated[float, Meta(ge=0, le=1)], doc("Lowest rank, as a share of the layer's smaller side.")]
MaxAspect = Annotated[Annotated[float, Meta(gt=1)], doc("Layers at least this many times longer than wide stay dense.")]
KeepFirst = Annotated[bool, doc("Leave the first layer dense.")]
KeepLast = Annotated[bool, doc("Leave the last layer dense.")]
Include = Annotated[tuple[str, ...] | None, doc("Patterns of layer names; only these are converted. null: all.")]
Exclude = Annotated[tuple[str, ...], doc("Patterns of layer names that stay dense.")]


RankRule = RelativeRule | EnergyRule | SumProportionRule | StableRankRule | MarchenkoPasturRule | GavishDonohoRule
FrobeniusDecay = Annotated[
    NonNegative | None,
    doc("λ of a penalty λ/2·‖AB‖² in place of the factors' weight decay; null: the optimiser's `weight_decay`."),
]


class Oialr(Section, kw_only=True, frozen=True):
    """Orthogonality-Informed Adaptive Low-Rank training (arXiv 2401.08505)."""

    name: Annotated[Literal["oialr"], doc("This method.")] = "oialr"
    delay: Annotated[Moment, doc("When weights become low-rank; with `freeze: stable` the latest moment.")]
    every: Annotated[Interval, doc("Between one check of the ranks and the next.")]
    cutoff: Annotated[
        BetweenZeroAndOne | RankRule,
        doc("Which singular values stay: those from β times the largest up, or a rank rule."),
    ] = 0.1
    layer_fraction: Annotated[Share, doc("Share of the layers that each check adds to those cut.")] = 0.1
    max_cut: Annotated[Share, doc("Largest share of a layer's rank that one check may cut.")] = 0.5
    min_rank: MinRank = 0.01
    max_aspect: MaxAspect = 10.0
    keep_first: KeepFirst = False
    keep_last: KeepLast = True
    include: Include = None
    exclude: Exclude = ()
    freeze: Annotated[
        Literal["schedule", "stable"], doc("All layers at `delay`, or each when its basis has settled.")
    ] = "schedule"
    stability_threshold: Annotated[Share, doc("Stability from which a basis counts as settled.")] = 0.99
    convert: Annotated[
        Literal["at_delay", "when_it_pays"],
        doc("At once, or each layer only when its factors are no larger and no slower than dense."),
    ] = "at_delay"
    sigma_lr: Annotated[Positive, doc("Factor on the learning rate of Σ.")] = 1.0
    svd: Annotated[
        Literal["rank0", "spread", "heat"],
        doc(
            "Who decomposes the layers at a check: the first process; all of them, each its share; or heat, all of "
            "them together on every layer (approximate, for layers too large for one process)."
        ),
    ] = "rank0"
    heat_rank: Annotated[
        Share, doc("Share of a layer's smaller side that `svd: heat` finds; what is beyond is lost at conversion.")
    ] = 0.5


class SvdTraining(Section, kw_only=True, frozen=True):
    """Every layer as trained factors U, s, V, kept orthonormal and made sparse, then pruned (arXiv 2004.09031)."""

    name: Annotated[Literal["svd_training"], doc("This method.")] = "svd_training"
    sparsity: Annotated[NonNegative, doc("Weight λ_s of the penalty R(s) that makes singular values sparse.")]
    prune_at: Annotated[Interval, doc("When the small singular values are removed; then fine-tuning begins.")]
    energy: Annotated[BelowOne, doc("Share of the sum of squares of its singular values that a layer may lose.")] = 1e-3
    decomposition: Annotated[
        Literal["channel", "spatial"],
        doc("Of convolutions: k×k with r filters and 1×1, or k×1 and 1×k (two-dimensional ones only)."),
    ] = "channel"
    orthogonality: Annotated[NonNegative, doc("Weight λ_o of the penalty that keeps U and V orthonormal.")] = 1.0
    regularizer: Annotated[
        Literal["hoyer", "hoyer_square", "l1", "none"],
        doc("R: Hoyer's ‖s‖₁/‖s‖₂ − 1, the same of squares, ‖s‖₁, or nothing."),
    ] = "hoyer"
    init: Annotated[
        Literal["svd", "random"], doc("Start from the weights' decompositions, or from random orthonormal factors.")
    ] = "svd"
    regularize_at: Annotated[Moment, doc("From when on R counts; before that the factors train without it.")] = 0
    min_rank: MinRank = 0.0
    max_aspect: MaxAspect = 10.0
    keep_first: KeepFirst = False
    keep_last: KeepLast = True
    include: Include = None
    exclude: Exclude = ()


class Truncate(Section, kw_only=True, frozen=True):
    """Dense training, one truncation of every weight to two factors A B, fine-tuning of these."""

    name: Annotated[Literal["truncate"], doc("This method.")] = "truncate"
    at: Annotated[Moment, doc("When the weights are truncated.")]
    rank: Annotated[Share | RankRule, doc("Which rank: a share of a layer's smaller side, or a rank rule.")]
    min_rank: MinRank = 0.0
    max_aspect: MaxAspect = 10.0
    keep_first: KeepFirst = False
    keep_last: KeepLast = True
    include: Include = None
    exclude: Exclude = ()


class FixedRank(Section, kw_only=True, frozen=True):
    """Two factors A B of a fixed rank from the first step on (arXiv 2105.01029)."""

    name: Annotated[Literal["fixed_rank"], doc("This method.")] = "fixed_rank"
    rank: Annotated[Share, doc("Rank, as a share of the layer's smaller side.")]
    init: Annotated[
        Literal["spectral", "random"],
        doc("Start from the truncated decomposition of the initial weight, or from normal factors of its norm."),
    ] = "spectral"
    frobenius_decay: FrobeniusDecay = None
    max_aspect: MaxAspect = 10.0
    keep_first: KeepFirst = False
    keep_last: KeepLast = True
    include: Include = None
    exclude: Exclude = ()


class Cuttlefish(Section, kw_only=True, frozen=True):
    """Dense until the stable ranks have flattened, then two factors A B of ranks that follow (arXiv 2305.02538)."""

    name: Annotated[Literal["cuttlefish"], doc("This method.")] = "cuttlefish"
    every: Annotated[Interval, doc("Between one measurement of the stable ranks and the next; an epoch, usually.")]
    delay: Annotated[Moment, doc("When weights become factors at the latest.")]
    window: Annotated[Count, doc("Measurements over which stable ranks are smoothed and their slopes averaged.")] = 15
    flatness: Annotated[NonNegative, doc("Mean slope, in stable rank per measurement, that counts as flat.")] = 0.1
    frobenius_decay: FrobeniusDecay = None
    min_rank: MinRank = 0.0
    max_aspect: MaxAspect = 10.0
    keep_first: KeepFirst = False
    keep_last: KeepLast = True
    include: Include = None
    exclude: Exclude = ()
