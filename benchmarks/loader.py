"""How fast shuffled samples are read: hpclr's loader from disk, its loader in memory, and torch's DataLoader.

    python benchmarks/loader.py [--megabytes 512] [--side 64] [--batch-size 256] [--seconds 1.5] [--json FILE]
    python benchmarks/loader.py --training [--device cuda] [--batch-size 64] [--repeats 5] [--json FILE]

Writes a file of random pictures as `hpclr data prepare` would into a temporary directory, and reads it in every way
for some seconds: normalised float32 batches in a new order each epoch, one torch thread a process. `DataLoader` is a
map-style dataset that reads one row with h5py, under a random sampler, as in most people's training scripts. The file
should be much larger than two windows (128 MiB), which hpclr keeps. It is in the page cache, which only root could
empty: this measures what the software costs, to which a real disk adds its own; it adds least where reading is in
whole chunks.

With `--training` each batch is trained on, forward, backward and AdamW, by a small convolutional network and a small
vision transformer. `speed` is the time of a step from memory, without workers, by the time of this one; the ways take
turns, of which the median counts. Steps that use what was made ahead while others had their turn are not in it. Each
way has been through an epoch before: `first epoch` says how many samples a second that was, without training.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import h5py
import measure
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from hpclr.data import BatchStream, Loader, choose_order, open_dataset
from hpclr.data import Dataset as Pictures
from hpclr.data.layout import LIBVER, chunk_shape, encode_json
from hpclr.models import VisionTransformer

CLASSES = 10
ENDLESS = 10**9
PREFETCH = 2  # as data.prefetch
MEMORY = "memory, 0 workers"
SOURCES = {
    f"{name}, {workers} workers": (kind, in_memory, workers)
    for workers in (0, 2)
    for name, kind, in_memory in (
        ("memory", "samples", True),
        ("disk, shuffle chunks", "chunks", False),
        ("disk, shuffle samples", "samples", False),
    )
}


def main() -> None:
    """Prints the table."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    facts = measure.machine(arguments.device)
    facts |= {"megabytes": arguments.megabytes, "side": arguments.side, "batch_size": arguments.batch_size}
    print(f"pictures 3 x {arguments.side} x {arguments.side} ({arguments.megabytes} MiB), batches of "
          f"{arguments.batch_size}, {measure.heading(facts)}")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="hpclr-loader-", dir=arguments.directory) as folder:
        path = Path(folder) / "pictures.h5"
        write(path, arguments.megabytes << 20, arguments.side)
        results = training(path, arguments) if arguments.training else reading(path, arguments)
    measure.write_json(arguments.json, facts, results)


def reading(path: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Prints and returns the samples a second of each way."""
    turns = [
        {name: rate(batches, arguments.seconds) for name, batches in ways(path, arguments).items()}
        for _ in range(arguments.repeats)
    ]
    rates = {name: max(turn[name] for turn in turns) for name in turns[0]}
    rows = [
        (name, f"{value:,.0f}", f"{value / rates[MEMORY]:.2f}x", f"{value / rates[plain(name)]:.1f}x")
        for name, value in rates.items()
    ]
    measure.show(("way", "samples/s", "of memory", "DataLoader"), rows)
    return rates


def plain(name: str) -> str:
    """The DataLoader with as many workers."""
    return f"DataLoader, {name.rsplit(', ', 1)[1]}"


def training(path: Path, arguments: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Prints and returns, for each model and way, seconds of a step and its speed relative to training from memory."""
    results, rows = {}, []
    with open_dataset(path) as dataset, ExitStack() as streams:
        trained = {name: Trained(dataset, *way, arguments) for name, way in SOURCES.items()}
        for way in trained.values():
            streams.enter_context(way.batches)
        firsts = {name: way.first_epoch() for name, way in trained.items()}
        for model_name, make in MODELS.items():
            model = make(arguments.side).to(arguments.device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            times = turns_of(trained, model, optimizer, arguments)
            speeds, seconds = measure.speed_ratios(times, MEMORY), measure.medians(times)
            results[model_name] = {
                name: {"speed": speeds[name], "step": seconds[name], "first_epoch": firsts[name]} for name in times
            }
            rows += [
                (f"{model_name}: {name}", f"{seconds[name] * 1e3:.1f}", f"{speeds[name]:.2f}x", f"{firsts[name]:,.0f}")
                for name in times
            ]
    measure.show(("model: data", "step ms", "speed", "first epoch"), rows)
    return results


class Trained:
    """Batches of one way, to train on."""

    def __init__(
        self, dataset: Pictures, kind: Any, in_memory: bool, workers: int, arguments: argparse.Namespace
    ) -> None:
        order = choose_order(dataset, kind, arguments.window)
        size, self.device = arguments.batch_size, torch.device(arguments.device)
        self.loader = Loader(dataset, "train", size, 0, shuffle=order, in_memory=in_memory)
        self.batches = BatchStream(
            self.loader, 0, ENDLESS, workers=workers, prefetch=PREFETCH, pinned=self.device.type == "cuda"
        )

    def first_epoch(self) -> float:
        """Samples a second."""
        start = time.perf_counter()
        for _ in range(len(self.loader)):
            next(self.batches)
        return self.loader.size / (time.perf_counter() - start)

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        batch = next(self.batches).to(self.device)
        F.cross_entropy(model(batch.x), batch.y).backward()
        optimizer.step()
        optimizer.zero_grad()


def turns_of(
    trained: dict[str, Trained], model: nn.Module, optimizer: torch.optim.Optimizer, arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """way → seconds of a step in each turn."""
    times: dict[str, list[float]] = {name: [] for name in trained}
    for turn in range(arguments.repeats):
        for name in list(trained)[:: -1 if turn % 2 else 1]:
            for _ in range(PREFETCH + 1):
                trained[name].step(model, optimizer)
            measure.synchronise(arguments.device)
            start = time.perf_counter()
            for _ in range(arguments.steps):
                trained[name].step(model, optimizer)
            measure.synchronise(arguments.device)
            times[name].append((time.perf_counter() - start) / arguments.steps)
    return times


def convolutional(_side: int) -> nn.Module:
    """Three convolutions, each with half the pixels of the one before."""
    widths = (3, 32, 64, 128)
    layers: list[nn.Module] = []
    for wide, wider in pairwise(widths):
        layers += [nn.Conv2d(wide, wider, 3, stride=2, padding=1), nn.BatchNorm2d(wider), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], CLASSES))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "conv net": convolutional,
    "ViT": lambda side: VisionTransformer((3, side, side), CLASSES, patch=8, dim=128, depth=4, heads=4),
}


def parse() -> argparse.Namespace:
    parser = measure.parser(__doc__)
    parser.add_argument("--megabytes", type=int, default=512, help="size of the file in MiB")
    parser.add_argument("--side", type=int, default=64, help="of a picture in pixels")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--window", type=int, default=64, help="as data.window")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each way and repeat")
    parser.add_argument("--training", action="store_true", help="measure training steps")
    parser.add_argument("--steps", type=int, default=5, help="of each way in a turn, with --training")
    parser.add_argument("--directory", type=Path, help="where the file is written; default: the system's for such")
    parser.set_defaults(repeats=2, threads=1)
    return parser.parse_args()


def ways(path: Path, arguments: argparse.Namespace) -> dict[str, Callable[[], Iterator[int]]]:
    """name → what yields the sizes of batches after they were made."""
    found: dict[str, Callable[[], Iterator[int]]] = {
        name: lambda way=way: ours(path, arguments, *way) for name, way in SOURCES.items()
    }
    for workers in (0, 2):
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


def write(path: Path, size_bytes: int, side: int) -> None:
    """A file of random pictures, laid out as `hpclr data prepare` does."""
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


if __name__ == "__main__":
    main()
