"""When and how training changes the weights: one short file for each published method."""

from hpclr.methods.base import Dense, Method
from hpclr.methods.cuttlefish import Cuttlefish
from hpclr.methods.fixed_rank import FixedRank
from hpclr.methods.oialr import OIALR
from hpclr.methods.placement import Here, Outcome, Placement
from hpclr.methods.svd_training import SVDTraining
from hpclr.methods.truncate import Truncate

__all__ = [
    "OIALR",
    "Cuttlefish",
    "Dense",
    "FixedRank",
    "Here",
    "Method",
    "Outcome",
    "Placement",
    "SVDTraining",
    "Truncate",
]
