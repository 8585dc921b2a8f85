"""The run file as types: every key, its type, range, default and meaning.

Errors, overrides and the reference page (`docs/run-file.md`) are all derived from these classes.
A section that comes in kinds (`model`, `schedule`, `method`, a rank rule) is a union of classes;
the first field of such a class is a `Literal` that tells the kinds apart.
"""

from hpclr.config.schema.adapters import Edora, Lora, MoSara, Sara
from hpclr.config.schema.data import Data
from hpclr.config.schema.method import OIALR_AUTO, Cuttlefish, Dense, FixedRank, Nested, Oialr, SvdTraining, Truncate
from hpclr.config.schema.model import FactorsInit, Gpt2, Mlp, Patchtst, Resnet, SvdInit, Target, Vgg, Vit
from hpclr.config.schema.optimization import Constant, Cosine, OneCycle, Optimizer, Step
from hpclr.config.schema.rules import (
    EnergyRule,
    GavishDonohoRule,
    MarchenkoPasturRule,
    RelativeRule,
    StableRankRule,
    SumProportionRule,
)
from hpclr.config.schema.run import Checkpoint, Mlflow, Parallel, RunFile, Slurm, Track, Train, Validation
from hpclr.config.schema.types import RunName, Section, doc

__all__ = [
    "OIALR_AUTO",
    "Checkpoint",
    "Constant",
    "Cosine",
    "Cuttlefish",
    "Data",
    "Dense",
    "Edora",
    "EnergyRule",
    "FactorsInit",
    "FixedRank",
    "GavishDonohoRule",
    "Gpt2",
    "Lora",
    "MarchenkoPasturRule",
    "Mlflow",
    "Mlp",
    "MoSara",
    "Nested",
    "Oialr",
    "OneCycle",
    "Optimizer",
    "Parallel",
    "Patchtst",
    "RelativeRule",
    "Resnet",
    "RunFile",
    "RunName",
    "Sara",
    "Section",
    "Slurm",
    "StableRankRule",
    "Step",
    "SumProportionRule",
    "SvdInit",
    "SvdTraining",
    "Target",
    "Track",
    "Train",
    "Truncate",
    "Validation",
    "Vgg",
    "Vit",
    "doc",
]
