"""Small datasets written as anyone would from docs/data.md, with h5py alone."""

import json

import h5py
import numpy as np

CLASSES = ["cat", "dog", "eel"]


def pictures(n, shape=(3, 6, 6), seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape), dtype=np.uint8), rng.integers(0, len(CLASSES), n)


def write_by_hand(path, sizes=None, shape=(3, 6, 6), dtype="uint8"):
    """A classification file as a stranger would write it: nothing that vouches for its content."""
    with h5py.File(path, "w") as file:
        file.attrs.update(format="hpclr-data", version=1, task="classification")
        for number, (split, size) in enumerate((sizes or {"train": 50, "valid": 8, "test": 12}).items()):
            x, y = pictures(size, shape, number)
            file[f"{split}/x"], file[f"{split}/y"] = x.astype(dtype), y.astype(np.int64)
        channels = file["train/x"][...].swapaxes(0, 1).reshape(shape[0], -1)
        file["mean"], file["std"] = channels.mean(axis=1, dtype=float), channels.std(axis=1, dtype=float)
        file["classes"] = np.frombuffer(json.dumps(CLASSES).encode(), dtype=np.uint8)
    return path


def replace(file, name, values):
    del file[name]
    file[name] = values
