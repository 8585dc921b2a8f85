"""What a low-rank weight is: W = U Σ Vᵀ with U and V frozen and a small dense Σ trained.

This room knows torch and nothing else of hpclr.
"""

from hpclr.lowrank.accounting import (
    LayerSize,
    Summary,
    count_flops,
    count_gradient_flops,
    count_training_flops,
    optimizer_bytes,
    summarize,
)
from hpclr.lowrank.average import EMA
from hpclr.lowrank.compiling import expect_rank_changes
from hpclr.lowrank.convert import LayerReport, densify, factorize, load_state_dict, shape_model_like
from hpclr.lowrank.factors import FactorizationError, LowRankWarning, stability
from hpclr.lowrank.fold import fold
from hpclr.lowrank.kinds import KINDS
from hpclr.lowrank.moments import BasisChange, Change
from hpclr.lowrank.ranks import (
    Energy,
    GavishDonoho,
    MarchenkoPastur,
    RankRule,
    RelativeCutoff,
    StableRank,
    SumProportion,
    rank_rule,
)
from hpclr.lowrank.sites import WeightSite, select
from hpclr.lowrank.tucker import Tucker2Conv, TuckerReport, tucker2, tucker_decompose

__all__ = [
    "EMA",
    "KINDS",
    "BasisChange",
    "Change",
    "Energy",
    "FactorizationError",
    "GavishDonoho",
    "LayerReport",
    "LayerSize",
    "LowRankWarning",
    "MarchenkoPastur",
    "RankRule",
    "RelativeCutoff",
    "StableRank",
    "SumProportion",
    "Summary",
    "Tucker2Conv",
    "TuckerReport",
    "WeightSite",
    "count_flops",
    "count_gradient_flops",
    "count_training_flops",
    "densify",
    "expect_rank_changes",
    "factorize",
    "fold",
    "load_state_dict",
    "optimizer_bytes",
    "rank_rule",
    "select",
    "shape_model_like",
    "stability",
    "summarize",
    "tucker2",
    "tucker_decompose",
]
