"""What a method begins with in a comparison where nobody says anything else.

Shares of the run throughout, so that a run of any length goes through all stages of its method. None of these is tuned
for a task; a comparison file says what is known better.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hpclr.config import RunFile
from hpclr.config.describe import fields, kinds, tag
from hpclr.config.schema import OIALR_AUTO

DEFAULT_METHODS = ("dense", "oialr", "svd_training", "truncate", "fixed_rank")
_STARTING_POINTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "dense": {},
        # The bases settle in the first part of training (the paper's delay); then checks often enough that every
        # layer comes to its turn, and Σ, which is small, is moved faster than W was.
        "oialr": {"delay": 0.4, "every": 0.05, "cutoff": 0.2, "layer_fraction": 0.25, "sigma_lr": 2},
        # The penalty needs time to empty the spectrum; the rest of the run repairs what pruning takes away.
        "svd_training": {"sparsity": 0.03, "prune_at": 0.6, "energy": 0.02},
        # Half the run densely, a quarter of the rank: k(m + n) is half of mn for a square matrix.
        "truncate": {"at": 0.5, "rank": 0.25},
        # The same rank from the first step on.
        "fixed_rank": {"rank": 0.25},
        # The switch at half of the run at the latest, and before that 25 measurements: it takes 15 to see them flatten.
        "cuttlefish": {"every": 0.02, "delay": 0.5},
        # What lower ranks cost the whole model they cost while they train, and they learn fast.
        "nested": {"delay": 0.7},
        # Adapters, for a model that begins with pretrained weights.
        "sara": {"proportion": 0.1},
        "mo_sara": {"proportion": 0.5},
        "edora": {"rank": 16},
        "lora": {"rank": 8},
    }
)
# Which layers may be low-rank does not depend on the method: what the run file says of it counts for the others, too.
_OF_LAYERS = ("include", "exclude", "keep_first", "keep_last", "max_aspect")


def method_names() -> list[str]:
    """All methods, as run files name them."""
    return list(_keys_by_method())


def starting_point(name: str, written: Mapping[str, Any], *, auto: bool = False) -> dict[str, Any]:
    """A method's section of the run file, to which keys may be added.

    Args:
        name: of the method, another than the run file's.
        written: the section of the run file's own method, as it stands there.
        auto: whether the method is to decide its settings itself.
    """
    kept = {key: written[key] for key in _OF_LAYERS if key in written and key in _keys_by_method().get(name, ())}
    start = {"name": name, **kept, **_STARTING_POINTS.get(name, {})}
    return {key: value for key, value in start.items() if not (auto and key in OIALR_AUTO)}


def _keys_by_method() -> dict[str, tuple[str, ...]]:
    found = kinds(fields(RunFile)["method"].type)
    return {name: tuple(fields(kind)) for kind in found for name in tag(kind)[1]}
