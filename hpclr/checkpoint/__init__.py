"""Checkpoints: an HDF5 file format without pickle, and a directory of such files that survives crashes.

The room knows nothing of models or training. A checkpoint is a nested tree: dictionaries hold
dictionaries, tensors and `Json` values. `CheckpointStore` saves trees by step and finds the newest
valid one again, `BackgroundSaver` does so while training goes on; `load_file` reads a single file.
Tensors may be sharded: each process saves a `Piece` of them in a file of its own, and `open_file`
reads any rows of them, on any number of processes. The format is described in `docs/checkpoint-format.md`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpclr.checkpoint.background import BackgroundSaver, SaveReport
    from hpclr.checkpoint.loading import Loaded, load_file
    from hpclr.checkpoint.parts import MissingPartError, PartReport
    from hpclr.checkpoint.reader import NewerVersionError, read_attrs, read_tree
    from hpclr.checkpoint.rows import OpenCheckpoint, open_file
    from hpclr.checkpoint.store import CheckpointStore
    from hpclr.checkpoint.tree import Json, Piece, Tree, TreeLike
    from hpclr.checkpoint.writer import write_tree

_MODULES = {
    "BackgroundSaver": "background",
    "CheckpointStore": "store",
    "Json": "tree",
    "Loaded": "loading",
    "MissingPartError": "parts",
    "NewerVersionError": "reader",
    "OpenCheckpoint": "rows",
    "PartReport": "parts",
    "Piece": "tree",
    "SaveReport": "background",
    "Tree": "tree",
    "TreeLike": "tree",
    "load_file": "loading",
    "open_file": "rows",
    "read_attrs": "reader",
    "read_tree": "reader",
    "write_tree": "writer",
}
__all__ = [
    "BackgroundSaver",
    "CheckpointStore",
    "Json",
    "Loaded",
    "MissingPartError",
    "NewerVersionError",
    "OpenCheckpoint",
    "PartReport",
    "Piece",
    "SaveReport",
    "Tree",
    "TreeLike",
    "load_file",
    "open_file",
    "read_attrs",
    "read_tree",
    "write_tree",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
