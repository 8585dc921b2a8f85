"""Rank rules: which singular values of a weight stay."""

from __future__ import annotations

from typing import Annotated, Literal

from hpclr.config.schema.types import BetweenZeroAndOne, Positive, Section, Share, doc


class RelativeRule(Section, kw_only=True, frozen=True):
    """Keep the singular values from `cutoff` times the largest up (the paper's rule)."""

    rule: Annotated[Literal["relative"], doc("This rank rule.")] = "relative"
    cutoff: Annotated[BetweenZeroAndOne, doc("Cutoff β, relative to the largest singular value.")]


class EnergyRule(Section, kw_only=True, frozen=True):
    """Keep the fewest singular values whose squares make up `share` of the sum of squares."""

    rule: Annotated[Literal["energy"], doc("This rank rule.")] = "energy"
    share: Annotated[Share, doc("Share of the sum of squares to keep.")]


class SumProportionRule(Section, kw_only=True, frozen=True):
    """Keep the fewest singular values that make up `share` of their sum (SARA)."""

    rule: Annotated[Literal["sum_proportion"], doc("This rank rule.")] = "sum_proportion"
    share: Annotated[Share, doc("Share of the sum to keep.")]


class StableRankRule(Section, kw_only=True, frozen=True):
    """Keep as many as the stable rank ‖W‖²_F / ‖W‖²₂ (Cuttlefish)."""

    rule: Annotated[Literal["stable_rank"], doc("This rank rule.")] = "stable_rank"
    scale: Annotated[Positive, doc("Factor on the stable rank.")] = 1.0


class MarchenkoPasturRule(Section, kw_only=True, frozen=True):
    """Keep what stands out of the spectrum of pure noise (Marchenko and Pastur's edge)."""

    rule: Annotated[Literal["marchenko_pastur"], doc("This rank rule.")] = "marchenko_pastur"
    noise: Annotated[
        Positive | None, doc("Standard deviation of an entry's noise; null: estimated from the spectrum.")
    ] = None


class GavishDonohoRule(Section, kw_only=True, frozen=True):
    """Keep what the optimal hard threshold of Gavish and Donoho keeps."""

    rule: Annotated[Literal["gavish_donoho"], doc("This rank rule.")] = "gavish_donoho"
    noise: Annotated[
        Positive | None, doc("Standard deviation of an entry's noise; null: estimated from the spectrum.")
    ] = None
