"""How long a checkpoint takes to save and to load: hpclr against torch.save, safetensors and torch's distributed one.

    python benchmarks/checkpoint.py [--gib 1] [--repeats 3] [--directory DIR] [--json FILE]

The state is that of a training run: weights in float32, two moments of the same shapes, an average in bfloat16, and
many small tensors. All formats store the same tensors, and take turns. `stops` is how long training stands still,
`total` the time until the file is written, `+ fsync` until it is on the disk, for which hpclr always waits; the others
leave that to whoever calls them. hpclr's time has also in it a digest of all bytes and a checksum of every tensor, and
loading checks them. Before each save as much is written and deleted, so that all of them find memory for the page cache
that was used just before: on virtual machines, other memory is several times as slow. Files are in the page cache when
they are loaded, and a byte of every page of the tensors is read, as safetensors does no more than map the file.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from measure import processor

from hpclr.checkpoint import BackgroundSaver, CheckpointStore

WIDTH = 2048
BALLAST_BYTES = 5 << 28
COLUMNS = ("stops", "total", "+ fsync")
Times = dict[str, dict[str, float]]
Tensors = dict[str, torch.Tensor]


def main() -> None:
    """Measures and prints the tables."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    tensors = state(arguments.gib)
    with tempfile.TemporaryDirectory(prefix="hpclr-checkpoint-", dir=arguments.directory) as folder:
        store = CheckpointStore(Path(folder) / "hpclr", keep=2)
        with BackgroundSaver(store) as saver:
            first = saved_by(saver, 0, tensors)["stops"]
            runs = [turn(Path(folder), saver, store, tensors, n + 1) for n in range(arguments.repeats)]
    median = {
        way: {what: statistics.median(run[way][what] for run in runs) for what in runs[0][way]} for way in runs[0]
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    print(f"{len(tensors)} tensors, {size / 2**30:.2f} GiB, {processor()}, {os.cpu_count()} cores, "
          f"{arguments.threads} torch thread(s), medians of {arguments.repeats}, seconds")  # fmt: skip
    show(median, first)
    goals = goals_of(median)
    for name, (ratio, limit) in goals.items():
        print(f"{name:40} {ratio:5.2f}   (to reach: {limit:g} or less)")
    if arguments.json:
        facts = {"processor": processor(), "cores": os.cpu_count(), "bytes": size, "threads": arguments.threads}
        facts |= {"first_stop": first, "seconds": median, "runs": runs, "goals": goals}
        arguments.json.write_text(json.dumps(facts, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1, help="size of the state")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch; they copy")
    parser.add_argument("--directory", type=Path, help="where files are written; default: the system's for such")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def state(gib: float) -> Tensors:
    """Weights, moments and an average of layers of 2048 x 2048, and as many small tensors of each kind."""
    generator = torch.Generator().manual_seed(0)
    layers = max(1, round(gib * 2**30 / (WIDTH * WIDTH * (3 * 4 + 2))))
    kinds = {"model": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32, "ema": torch.bfloat16}
    made: Tensors = {}
    for kind, dtype in kinds.items():
        for layer in range(layers):
            made[f"{kind}.{layer}.weight"] = torch.randn(WIDTH, WIDTH, generator=generator).to(dtype)
            made[f"{kind}.{layer}.bias"] = torch.randn(WIDTH, generator=generator).to(dtype)
            made[f"{kind}.{layer}.step"] = torch.tensor(float(layer))
    return made


def turn(folder: Path, saver: BackgroundSaver, store: CheckpointStore, tensors: Tensors, step: int) -> Times:
    """Every way of saving and of loading once."""
    times = {}
    for name, wait in {"hpclr, in the background": False, "hpclr, waiting": True}.items():
        prepare(folder, store.directory)
        times[f"save: {name}"] = saved_by(saver, step, tensors, wait)
    for name, (save, _) in OTHERS.items():
        prepare(folder, folder / name)
        times[f"save: {name}"] = saved(save, folder / name, tensors)
    times["load: hpclr, verified"] = {"total": timed_load(store.load_newest)}  # every byte of which was looked at
    times["load: read and hash"] = {"total": timed(lambda: read_and_hash(store.path(step)))}
    for name, (_, load) in OTHERS.items():
        times[f"load: {name}"] = {"total": timed_load(lambda load=load, name=name: touch(load(folder / name, tensors)))}
    return times


def prepare(folder: Path, target: Path) -> None:
    """Nothing is at the target, and there is memory that the page cache has just let go."""
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        for _ in range(BALLAST_BYTES >> 22):
            file.write(bytes(1 << 22))
        os.fsync(file.fileno())
    ballast.unlink()


def saved_by(saver: BackgroundSaver, step: int, tensors: Tensors, wait: bool = False) -> dict[str, float]:
    saver.save(step, tensors, copy=not wait)
    saver.wait()
    report = saver.finished()
    if report.error is not None:
        raise report.error
    return {"stops": report.blocked, "+ fsync": report.seconds}


def saved(save: Callable[[Tensors, Path], Any], path: Path, tensors: Tensors) -> dict[str, float]:
    """Seconds of a save, and with waiting for the disk."""
    start = time.monotonic()
    save(tensors, path)
    total = time.monotonic() - start
    for file in path.iterdir() if path.is_dir() else [path]:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    return {"stops": total, "total": total, "+ fsync": time.monotonic() - start}


def load_distributed(path: Path, tensors: Tensors) -> Tensors:
    """It loads into tensors that are there, which count."""
    loaded = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    dcp.load(loaded, checkpoint_id=path, no_dist=True)
    return loaded


OTHERS: dict[str, tuple[Callable[[Tensors, Path], Any], Callable[[Path, Tensors], Tensors]]] = {
    "torch.save": (torch.save, lambda path, _: torch.load(path, weights_only=True)),
    "safetensors": (safetensors.torch.save_file, lambda path, _: safetensors.torch.load_file(path)),
    "torch.distributed": (
        lambda tensors, path: dcp.save(tensors, checkpoint_id=path, no_dist=True),
        load_distributed,
    ),
}


def read_and_hash(path: Path) -> None:
    """One after the other, in blocks: no memory is needed for the whole."""
    digest, block = hashlib.sha256(), memoryview(bytearray(4 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])


def touch(tensors: Tensors) -> None:
    """Reads a byte of every page."""
    for tensor in tensors.values():
        tensor.reshape(-1).view(torch.uint8)[::4096].sum()


def timed(work: Callable[[], Any]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def timed_load(work: Callable[[], Any]) -> float:
    """With memory that was in use before: what a virtual machine has never used costs the first to take it seconds."""
    torch.ones(5 << 28, dtype=torch.uint8)
    return timed(work)


def show(median: Times, first: float) -> None:
    print(f"{'way':34}" + "".join(f"{column:>10}" for column in COLUMNS))
    for way, times in median.items():
        print(f"{way:34}" + "".join(f"{times[column]:10.2f}" if column in times else " " * 10 for column in COLUMNS))
    print(f"The first save in the background, whose copy needs new memory, stops for {first:.2f}.")


def goals_of(median: Times) -> dict[str, tuple[float, float]]:
    """What is aimed at: a ratio, and the limit for it."""
    background, torch_save = median["save: hpclr, in the background"], median["save: torch.save"]
    verified, plain = median["load: hpclr, verified"], median["load: read and hash"]
    safe = median["save: safetensors"]
    return {
        "stops / torch.save": (background["stops"] / torch_save["total"], 0.35),
        "in the background / safetensors": (background["+ fsync"] / safe["total"], 2.5),
        "in the background / safetensors + fsync": (background["+ fsync"] / safe["+ fsync"], 2.5),
        "verified load / read and hash": (verified["total"] / plain["total"], 1.5),
    }


if __name__ == "__main__":
    main()
