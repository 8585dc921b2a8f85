"""Checkpoints: an HDF5 file format without pickle, and a directory of such files that survives crashes.

The room knows nothing of models or training. A checkpoint is a nested tree: dictionaries hold
dictionaries, tensors and `Json` values. `CheckpointStore` saves trees by step and finds the newest
valid one again; `load_file` reads a single file. The format is described in
`docs/checkpoint-format.md`.
"""

from hpclr.checkpoint.format import write_tree
from hpclr.checkpoint.reader import NewerVersionError, read_attrs, read_tree
from hpclr.checkpoint.store import CheckpointStore, Loaded, load_file
from hpclr.checkpoint.tree import Json, Tree, TreeLike

__all__ = [
    "CheckpointStore",
    "Json",
    "Loaded",
    "NewerVersionError",
    "Tree",
    "TreeLike",
    "load_file",
    "read_attrs",
    "read_tree",
    "write_tree",
]
