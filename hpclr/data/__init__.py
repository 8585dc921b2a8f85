"""Datasets in HDF5: preparing them, opening them, and the order in which training sees the samples.

The names below are loaded when first used, so that a command line that only wants the list of readers
waits for neither torch nor h5py.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpclr.data.augment import Augment
    from hpclr.data.dataset import Dataset, open_dataset
    from hpclr.data.loader import Batch, Loader
    from hpclr.data.order import sample_order
    from hpclr.data.preparation import prepare

__all__ = ["Augment", "Batch", "Dataset", "Loader", "open_dataset", "prepare", "sample_order"]

_MODULES = {
    "Augment": "augment",
    "Batch": "loader",
    "Dataset": "dataset",
    "Loader": "loader",
    "open_dataset": "dataset",
    "prepare": "preparation",
    "sample_order": "order",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
