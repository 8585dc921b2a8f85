"""When and how training changes the weights: one short file for each published method."""

from hpclr.methods.base import Dense, Method
from hpclr.methods.cuttlefish import Cuttlefish
from hpclr.methods.edora import EDoRA
from hpclr.methods.fixed_rank import FixedRank
from hpclr.methods.mo_sara import MoSARA
from hpclr.methods.nested import Nested
from hpclr.methods.oialr import OIALR
from hpclr.methods.placement import Here, Outcome, Placement
from hpclr.methods.sara import SARA
from hpclr.methods.svd_training import SVDTraining
from hpclr.methods.truncate import Truncate

__all__ = [
    "OIALR",
    "SARA",
    "Cuttlefish",
    "Dense",
    "EDoRA",
    "FixedRank",
    "Here",
    "Method",
    "MoSARA",
    "Nested",
    "Outcome",
    "Placement",
    "SVDTraining",
    "Truncate",
]
