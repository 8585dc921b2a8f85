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


def write_checked(path, x, chunk):
    """The same samples for train and test, in chunks with checksums, as a program that has checked them writes them."""
    with h5py.File(path, "w", libver="v110") as file:
        file.attrs.update(format="hpclr-data", version=1, task="classification", checked=True, digest="0" * 64)
        for split in ("train", "test"):
            file.create_dataset(f"{split}/x", data=x, chunks=(chunk, *x.shape[1:]), fletcher32=True)
            file.create_dataset(f"{split}/y", data=np.zeros(len(x), np.int64), chunks=True, fletcher32=True)
        file["mean"], file["std"] = np.zeros(x.shape[1]), np.ones(x.shape[1])
        file["classes"] = np.frombuffer(b'["one"]', dtype=np.uint8)
    return path


def damage(path, row):
    """Changes a byte of a training sample behind the back of whoever has the file open."""
    with h5py.File(path) as file:
        chunk, offset = divmod(row, file["train/x"].chunks[0])
        begin = file["train/x"].id.get_chunk_info(chunk).byte_offset + offset * file["train/x"][0].nbytes
    with path.open("r+b") as file:
        file.seek(begin)
        (byte,) = file.read(1)
        file.seek(begin)
        file.write(bytes([byte ^ 1]))


def write_series(path, sizes, columns=2, seed=0):
    """A time series whose splits follow one another; returns what it holds, split → (T, columns)."""
    values = np.random.default_rng(seed).normal(40, 3, (sum(sizes.values()), columns)).astype(np.float32)
    content = dict(zip(sizes, np.split(values, np.cumsum(list(sizes.values()))[:-1]), strict=True))
    with h5py.File(path, "w") as file:
        file.attrs.update(format="hpclr-data", version=1, task="forecasting")
        for split, rows in content.items():
            file[f"{split}/series"] = rows
        std = content["train"].std(axis=0, dtype=float)
        file["mean"], file["std"] = content["train"].mean(axis=0, dtype=float), np.where(std > 0, std, 1)
        file["columns"] = np.frombuffer(json.dumps([str(i) for i in range(columns)]).encode(), dtype=np.uint8)
    return content


def write_tokens(path, sizes, tokens=300, seed=0):
    """A text in numbers; returns what it holds, split → (T,)."""
    rng = np.random.default_rng(seed)
    content = {split: rng.integers(0, tokens, size, dtype=np.uint16) for split, size in sizes.items()}
    with h5py.File(path, "w") as file:
        file.attrs.update(format="hpclr-data", version=1, task="language")
        for split, values in content.items():
            file[f"{split}/tokens"] = values
        file["vocabulary"] = np.frombuffer(json.dumps([f"t{i}" for i in range(tokens)]).encode(), dtype=np.uint8)
    return content


def replace(file, name, values):
    del file[name]
    file[name] = values
