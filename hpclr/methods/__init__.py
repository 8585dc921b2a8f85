"""When and how training changes the weights: one short file for each published method."""

from hpclr.methods.base import Dense, Method
from hpclr.methods.oialr import OIALR
from hpclr.methods.placement import Here, Outcome, Placement
from hpclr.methods.svd_training import SVDTraining

__all__ = ["OIALR", "Dense", "Here", "Method", "Outcome", "Placement", "SVDTraining"]
