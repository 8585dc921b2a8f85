"""hpclr: training neural networks whose weights become low-rank, on one machine or a whole cluster.

from hpclr import OIALR, SVDTraining, Truncate, FixedRank, Cuttlefish

`import hpclr` is quick; torch is loaded when a name from here is first used.
"""

from typing import TYPE_CHECKING, Any

from hpclr.version import __version__

if TYPE_CHECKING:
    from hpclr.lowrank import EMA, densify, factorize, rank_rule, stability, summarize
    from hpclr.methods import OIALR, Cuttlefish, FixedRank, SVDTraining, Truncate

__all__ = [
    "EMA",
    "OIALR",
    "Cuttlefish",
    "FixedRank",
    "SVDTraining",
    "Truncate",
    "__version__",
    "densify",
    "factorize",
    "rank_rule",
    "stability",
    "summarize",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hpclr' has no attribute '{name}'")
    from hpclr import lowrank, methods

    return getattr(methods if name in methods.__all__ else lowrank, name)
