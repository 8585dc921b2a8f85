"""hpclr: training neural networks whose weights become low-rank, on one machine or a whole cluster.

from hpclr import OIALR, SVDTraining, Truncate, FixedRank, Cuttlefish, Nested, SARA, MoSARA, EDoRA

`import hpclr` is quick; torch is loaded when a name from here is first used.
"""

from typing import TYPE_CHECKING, Any

from hpclr.version import __version__

if TYPE_CHECKING:
    from hpclr.lowrank import EMA, densify, factorize, rank_rule, stability, summarize
    from hpclr.methods import OIALR, SARA, Cuttlefish, EDoRA, FixedRank, MoSARA, Nested, SVDTraining, Truncate
    from hpclr.training.adapter_files import load_adapter, save_adapter

__all__ = [
    "EMA",
    "OIALR",
    "SARA",
    "Cuttlefish",
    "EDoRA",
    "FixedRank",
    "MoSARA",
    "Nested",
    "SVDTraining",
    "Truncate",
    "__version__",
    "densify",
    "factorize",
    "load_adapter",
    "rank_rule",
    "save_adapter",
    "stability",
    "summarize",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hpclr' has no attribute '{name}'")
    from importlib import import_module

    rooms = map(import_module, ("hpclr.methods", "hpclr.lowrank", "hpclr.training.adapter_files"))
    return next(getattr(room, name) for room in rooms if hasattr(room, name))
