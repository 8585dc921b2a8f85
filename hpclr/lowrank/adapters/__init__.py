"""Small trained corrections of frozen pretrained weights: SARA, Mo-SARA, EDoRA.

Layers are adapted in place (`layers.py`), each in one of three forms: `sara.py`, `mo_sara.py`, `edora.py`.
"""

from hpclr.lowrank.adapters.interchange import (
    AdaptedWeight,
    adapted_weights,
    adapter_names,
    check_adapters,
    looks_adapted,
    merged_state_dict,
    rank_stored,
)
from hpclr.lowrank.adapters.layers import AdaptedModule, adapt, adapted_modules
from hpclr.lowrank.adapters.whole import (
    FORMS,
    Adaptable,
    adaptable,
    adapter_state_dict,
    is_of_adapter,
    load_adapter_state_dict,
    merge_adapters,
    remove_adapters,
    shape_model_like_adapters,
    unmerge_adapters,
)

__all__ = [
    "FORMS",
    "Adaptable",
    "AdaptedModule",
    "AdaptedWeight",
    "adapt",
    "adaptable",
    "adapted_modules",
    "adapted_weights",
    "adapter_names",
    "adapter_state_dict",
    "check_adapters",
    "is_of_adapter",
    "load_adapter_state_dict",
    "looks_adapted",
    "merge_adapters",
    "merged_state_dict",
    "rank_stored",
    "remove_adapters",
    "shape_model_like_adapters",
    "unmerge_adapters",
]
