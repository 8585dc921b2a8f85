"""`method`: whether and how the weights become low-rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta
from msgspec.structs import fields, force_setattr

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
    IntervalUnlessDecided,
    Moment,
    MomentUnlessDecided,
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
    auto: Annotated[
        bool,
        doc("Decide `delay`, `every` and all else that one would tune; see [methods](methods.md#without-settings)."),
    ] = False
    delay: Annotated[
        MomentUnlessDecided,
        doc("When weights become low-rank; with `freeze: stable` the latest moment. Needed unless `auto` is true."),
    ] = None
    every: Annotated[
        IntervalUnlessDecided, doc("Between one check of the ranks and the next. Needed unless `auto` is true.")
    ] = None
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
    order: Annotated[
        Literal["size", "output"],
        doc("Directions are judged and cut by their singular values, or by what they do to their layer's outputs."),
    ] = "size"
    tied: Annotated[
        bool,
        doc(
            "Convert a head too whose weight is that of an embedding, and both to the same factors, whatever "
            "`max_aspect`, `keep_first` and `keep_last` say; see [methods](methods.md#tied-heads)."
        ),
    ] = False
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

    needed_unless: ClassVar[Mapping[str, tuple[str, ...]]] = {"auto": ("delay", "every")}

    @classmethod
    def check_given(cls, given: Mapping[str, Any]) -> None:
        """Raises ValueError for a key that `auto` decides; that it is its default is no excuse, its decision is one."""
        clashes = [key for key, value in OIALR_AUTO.items() if given.get("auto") and given.get(key, value) != value]
        if clashes:
            raise ValueError(
                f"method.auto: true decides {', '.join(OIALR_AUTO)} itself, but {', '.join(clashes)} "
                f"{'is' if len(clashes) == 1 else 'are'} given; leave {', '.join(clashes)} out, or method.auto"
            )

    def __post_init__(self) -> None:
        if self.auto:
            self._decide()
        missing = [f"method.{key}" for key in self.needed_unless["auto"] if getattr(self, key) is None]
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; give a number of steps, or a "
                "fraction of the run below 1, or leave it to method.auto: true"
            )

    def _decide(self) -> None:
        """Puts in what `auto` decides, so that whoever reads the run file sees it."""
        self.check_given(_changed(self))
        if self.svd == "heat" and self.heat_rank <= 0.5:
            raise ValueError(
                "method.auto: true takes the noise of a weight from its median singular value, but of those "
                f"svd: heat finds the largest {self.heat_rank:.0%} only; give method.heat_rank: 0.6 or more"
            )
        for key, value in OIALR_AUTO.items():
            force_setattr(self, key, value)


def _changed(section: Section) -> dict[str, Any]:
    """Keys with values that are not the defaults."""
    found = {field.name: (getattr(section, field.name), field.default) for field in fields(section)}
    return {key: value for key, (value, default) in found.items() if value != default}


# What `hpclr.methods.auto.AUTO` says too: neither room knows the other, and a test compares them.
OIALR_AUTO: Mapping[str, Any] = {
    "delay": 0.6,
    "every": 0.05,
    "cutoff": EnergyRule(share=0.9998),
    "layer_fraction": 1.0,
    "max_cut": 1.0,
    "keep_first": True,
    "freeze": "stable",
    "stability_threshold": 0.99,
    "convert": "when_it_pays",
    "sigma_lr": 2.0,
    "order": "output",
}


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
    order: Annotated[
        Literal["size", "output"],
        doc("Directions are judged by their singular values, or by what they do to their layer's outputs."),
    ] = "size"
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


class Nested(Section, kw_only=True, frozen=True):
    """Factors A B whose directions are in order, so that one checkpoint serves at every rank."""

    name: Annotated[Literal["nested"], doc("This method.")] = "nested"
    delay: Annotated[Moment, doc("When weights become factors; until then they train dense.")]
    fractions: Annotated[
        Annotated[tuple[Share, ...], Meta(min_length=1)],
        doc("The ranks to nest, as shares of a layer's smaller side; the largest is kept."),
    ] = (1.0, 0.5, 0.25, 0.125)
    weights: Annotated[
        tuple[Positive, ...] | None, doc("How often each of them is drawn, in proportion; null: equally often.")
    ] = None
    nesting: Annotated[
        Literal["joint", "sequential"],
        doc("Whether all directions that take part in a step get gradients, or only those that a lower rank lacks."),
    ] = "joint"
    draw: Annotated[Literal["model", "layer"], doc("A rank for all layers in each step, or for one of them.")] = "model"
    order: Annotated[
        Literal["output", "size"],
        doc(
            "Whether directions begin in the order of what they do to a layer's outputs, by the batch of the step "
            "before, or of singular values."
        ),
    ] = "output"
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
