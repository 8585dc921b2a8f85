"""How fast shuffled samples are read: hpclr's loader from disk, its loader in memory, and torch's DataLoader.

    python benchmarks/loader.py [--megabytes 512] [--side 64] [--batch-size 256] [--seconds 1.5] [--json FILE]

Writes a file of random pictures as `hpclr data prepare` would into a temporary directory, and reads it in every way
for some seconds: normalised float32 batches in a new order each epoch, one torch thread a process. `DataLoader` is a
map-style dataset that reads one row with h5py, under a random sampler, as in most people's training scripts. The file
should be much larger than two windows (128 MiB), which hpclr keeps. It is in the page cache, which only root could
empty: this measures what the software costs, to which a real disk adds its own; it adds least where reading is in
whole chunks.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from hpclr.data import BatchStream, Loader, choose_order, open_dataset
from hpclr.data.layout import LIBVER, chunk_shape, encode_json

CLASSES = 10
ENDLESS = 10**9


def main() -> None:
    """Prints the table."""
    arguments = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hpclr-loader-", dir=arguments.directory) as folder:
        path = Path(folder) / "pictures.h5"
        samples = write(path, arguments.megabytes << 20, arguments.side)
        turns = [
            {name: rate(batches, arguments.seconds) for name, batches in ways(path, arguments).items()}
            for _ in range(arguments.repeats)
        ]
    rates = {name: max(turn[name] for turn in turns) for name in turns[0]}
    print(f"{samples:,} pictures 3 x {arguments.side} x {arguments.side} ({arguments.megabytes} MiB), batches of "
          f"{arguments.batch_size}, {processor()}, {os.cpu_count()} cores")  # fmt: skip
    print(f"{'way':38} {'samples/s':>10} {'of memory':>10} {'DataLoader':>11}")
    for name, value in rates.items():
        workers = name.rsplit(", ", 1)[1]
        plain = rates[f"DataLoader, {workers}"]
        print(f"{name:38} {value:10,.0f} {value / rates['memory, 0 workers']:9.2f}x {value / plain:10.1f}x")
    if arguments.json:
        facts = {"processor": processor(), "cores": os.cpu_count(), "samples": samples, "side": arguments.side}
        facts |= {"batch_size": arguments.batch_size, "samples_per_second": rates}
        arguments.json.write_text(json.dumps(facts, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512, help="size of the file in MiB")
    parser.add_argument("--side", type=int, default=64, help="of a picture in pixels")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--window", type=int, default=64, help="as data.window")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each way and repeat")
    parser.add_argument("--repeats", type=int, default=2, help="the ways take turns; the best of each counts")
    parser.add_argument("--directory", type=Path, help="where the file is written; default: the system's for such")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def ways(path: Path, arguments: argparse.Namespace) -> dict[str, Callable[[], Iterator[int]]]:
    """name → what yields the sizes of batches after they were made."""
    found: dict[str, Callable[[], Iterator[int]]] = {}
    for workers in (0, 2):
        found[f"memory, {workers} workers"] = lambda w=workers: ours(path, arguments, "samples", True, w)
        found[f"disk, shuffle chunks, {workers} workers"] = lambda w=workers: ours(path, arguments, "chunks", False, w)
        found[f"disk, shuffle samples, {workers} workers"] = lambda w=workers: ours(
            path, arguments, "samples", False, w
        )
        found[f"DataLoader, {workers} workers"] = lambda w=workers: theirs(path, arguments, w)
    return found


def ours(path: Path, arguments: argparse.Namespace, kind: Any, in_memory: bool, workers: int) -> Iterator[int]:
    with open_dataset(path) as dataset:
        order = choose_order(dataset, kind, arguments.window)
        loader = Loader(dataset, "train", arguments.batch_size, 0, shuffle=order, in_memory=in_memory)
        with BatchStream(loader, 0, ENDLESS, workers=workers) as batches:
            for batch in batches:
                yield len(batch.y)


def theirs(path: Path, arguments: argparse.Namespace, workers: int) -> Iterator[int]:
    loader = DataLoader(
        Rows(path),
        arguments.batch_size,
        shuffle=True,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
        persistent_workers=workers > 0,
    )
    while True:
        for _, y in loader:
            yield len(y)


class Rows(Dataset):
    """What people write: row by row."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, None
        with h5py.File(path) as file:
            self.size = len(file["train/y"])
            self.mean, self.std = (torch.from_numpy(file[name][...]).float()[:, None, None] for name in ("mean", "std"))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        if self.file is None:
            self.file = h5py.File(self.path)["train"]
        x = torch.from_numpy(self.file["x"][row]).float()
        return (x - self.mean) / self.std, int(self.file["y"][row])


def rate(batches: Callable[[], Iterator[int]], seconds: float) -> float:
    """Samples a second, without the start and the first two batches."""
    sizes = batches()
    for _ in islice(sizes, 2):
        pass
    start, samples = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < seconds:
        samples += next(sizes)
    sizes.close()
    return samples / taken


def write(path: Path, size_bytes: int, side: int) -> int:
    """A file of random pictures, laid out as `hpclr data prepare` does; returns how many."""
    shape = (size_bytes // (3 * side * side), 3, side, side)
    random = np.random.default_rng(0)
    with h5py.File(path, "w", libver=LIBVER) as file:
        file.attrs.update(format="hpclr-data", version=1, task="classification", checked=True, digest="0" * 64)
        for split, count in {"train": shape[0], "test": 1}.items():
            x = file.create_dataset(
                f"{split}/x", (count, *shape[1:]), "uint8", chunks=chunk_shape((count, *shape[1:]), 1), fletcher32=True
            )
            for first in range(0, count, x.chunks[0]):
                rows = min(x.chunks[0], count - first)
                x[first : first + rows] = random.integers(0, 256, (rows, *shape[1:]), dtype=np.uint8)
            file.create_dataset(f"{split}/y", data=random.integers(0, CLASSES, count), chunks=True, fletcher32=True)
        file["mean"], file["std"] = np.full(3, 127.5), np.full(3, 73.9)
        file["classes"] = encode_json([str(label) for label in range(CLASSES)])
    return shape[0]


def processor() -> str:
    with open("/proc/cpuinfo") as file:
        return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown CPU")


if __name__ == "__main__":
    main()
