"""Datasets in HDF5: preparing them, opening them, and the order in which training sees the samples.

The names below are loaded when first used, so that a command line that only wants the list of readers
waits for neither torch nor h5py.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpclr.data.augment import Augment
    from hpclr.data.batches import Batch, BatchLoader
    from hpclr.data.dataset import Dataset, open_dataset
    from hpclr.data.loader import Loader, choose_order
    from hpclr.data.order import Order, sample_order
    from hpclr.data.preparation import prepare
    from hpclr.data.staging import stage, staged
    from hpclr.data.stream import BatchStream
    from hpclr.data.windows import WindowLoader, count_windows

__all__ = [
    "Augment",
    "Batch",
    "BatchLoader",
    "BatchStream",
    "Dataset",
    "Loader",
    "Order",
    "WindowLoader",
    "choose_order",
    "count_windows",
    "open_dataset",
    "prepare",
    "sample_order",
    "stage",
    "staged",
]

_MODULES = {
    "Augment": "augment",
    "Batch": "batches",
    "BatchLoader": "batches",
    "BatchStream": "stream",
    "Dataset": "dataset",
    "Loader": "loader",
    "Order": "order",
    "WindowLoader": "windows",
    "choose_order": "loader",
    "count_windows": "windows",
    "open_dataset": "dataset",
    "prepare": "preparation",
    "sample_order": "order",
    "stage": "staging",
    "staged": "staging",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
