"""How long it takes to the first training step: `hpclr train` against a bare script of torch's; and `hpclr --help`.

    python benchmarks/startup.py [--repeats 5] [--device cuda] [--json FILE]

A small vision transformer on pictures of 8×8 pixels, so that the step itself takes next to nothing. The script reads
the whole file with h5py, builds the same model and AdamW, and takes one step. All times are from the start of the
process; the ways take turns, and medians count. The parts are those of `hpclr train` up to the end of its first step,
by which time it has checked run file, data and model, taken its directory, and written a checkpoint that restores it.
torch loads its compiler when the first optimiser is made, whether anything is compiled or not: the script too.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

STARTED = time.monotonic()

CLASSES, PATCH, DIM, DEPTH, HEADS, BATCH = 10, 2, 64, 4, 4, 64
RUN = f"""
name: startup
model: {{name: vit, patch: {PATCH}, dim: {DIM}, depth: {DEPTH}, heads: {HEADS}}}
data: {{path: pictures.h5, batch_size: {BATCH}}}
optimizer: {{name: adamw, lr: 1e-3}}
method: {{name: oialr, delay: 1, every: 1}}
train: {{steps: 2, seed: 0}}
"""
TRAIN, SCRIPT = "hpclr train: first step", "script: first step"
PARTS = {
    "read the run file": ["hpclr.config:load_run_file"],
    "open the data": ["hpclr.training.assembly:open_dataset", "hpclr.training.assembly:_loaders"],
    "build and check the model": [
        f"hpclr.training.assembly:{name}" for name in ("build_model", "check_outputs", "check_smallest_piece")
    ],
    "optimiser and method": ["hpclr.training.assembly:optimizer_of", "hpclr.training.assembly:build_method"],
    "record the environment": ["hpclr.training.assembly:record"],
    "take and lock the directory": ["hpclr.training.run:_take", "hpclr.training.run:_begin_records"],
    "first checkpoint": ["hpclr.training.loop:Trainer._save"],
    "first step": ["hpclr.training.loop:Trainer._accumulate"],
    "count its operations": ["hpclr.training.loop:Meter.add"],
}


def main() -> None:
    """Prints the tables."""
    import measure  # not above: it loads torch, and the children below begin with this file

    arguments = measure.parser(__doc__).parse_args()
    facts = measure.machine(arguments.device)
    print(f"seconds, medians of {arguments.repeats}; {measure.heading(facts)}")
    with tempfile.TemporaryDirectory(prefix="hpclr-startup-") as folder:
        prepare(Path(folder))
        turns = [turn(Path(folder), arguments.device) for _ in range(arguments.repeats)]
    seconds = measure.medians({name: [times[name] for times in turns] for name in turns[0]})
    wholes = ("hpclr --help", "python, import torch", SCRIPT, TRAIN)
    rows = [(name, f"{seconds[name]:.2f}", f"{seconds[name] / seconds[SCRIPT]:.2f}x") for name in wholes]
    measure.show(("from the start of the process", "s", "of the script"), rows)
    parts = [name for name in seconds if name not in wholes]
    measure.show(
        ("of hpclr train", "s", "share"),
        [(name, f"{seconds[name]:.3f}", f"{seconds[name] / seconds[TRAIN]:.0%}") for name in parts],
    )
    measure.write_json(arguments.json, facts, {"median": seconds, "turns": turns})


def prepare(folder: Path) -> None:
    """A dataset and a run file."""
    import h5py
    import numpy as np

    random = np.random.default_rng(0)
    with h5py.File(folder / "pictures.h5", "w") as file:
        file.attrs.update(format="hpclr-data", version=1, task="classification", checked=True, digest="0" * 64)
        for split, count in {"train": 1280, "test": 256}.items():
            file[f"{split}/x"] = random.integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)
            file[f"{split}/y"] = random.integers(0, CLASSES, count)
        file["mean"], file["std"] = np.full(1, 127.5), np.full(1, 73.9)
        file["classes"] = np.frombuffer(json.dumps([str(label) for label in range(CLASSES)]).encode(), dtype=np.uint8)
    (folder / "run.yaml").write_text(RUN)


def turn(folder: Path, device: str) -> dict[str, float]:
    """Seconds of everything, once."""
    found = {
        "hpclr --help": timed([sys.executable, "-m", "hpclr", "--help"]),
        "python, import torch": timed([sys.executable, "-c", "import torch"]),
    }
    script, train = (measured(folder, child, device) for child in ("script", "train"))
    return found | {SCRIPT: script["whole"], TRAIN: train.pop("whole")} | train


def timed(command: list[str]) -> float:
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def measured(folder: Path, child: str, device: str) -> dict[str, float]:
    """What a process like this one, in which a child of this name runs, has measured."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", child, str(time.monotonic()), device]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the {child} failed:\n{done.stderr}")
    times: dict[str, float] = json.loads((folder / "times.json").read_text())
    return times


class Clock:
    """Adds up what functions take, up to the end of the first step."""

    def __init__(self, began: float) -> None:
        self._began, self._running = began, True
        self.seconds: dict[str, float] = {"start python": STARTED - began}

    def watch(self, name: str, place: str) -> None:
        """Adds what a function, "module:object.function", takes to the part called `name`."""
        module, _, path = place.partition(":")
        *outer, function = path.split(".")
        owner: Any = import_module(module)
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, function, self._timed(name, getattr(owner, function)))

    def imports(self, module: str) -> None:
        self._timed(f"import {module}", import_module)(module)

    def stop(self) -> None:
        """The first step has been taken."""
        if self._running:
            self._running = False
            known = sum(self.seconds.values())
            self.seconds["whole"] = time.monotonic() - self._began
            self.seconds["everything else"] = self.seconds["whole"] - known

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*values: Any, **named: Any) -> Any:
            start = time.monotonic()
            result = function(*values, **named)
            if self._running:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
            return result

        return timed


def script(clock: Clock, device: str) -> None:
    """What one would write with torch alone."""
    import h5py
    import torch
    import torch.nn.functional as F

    from hpclr.models import VisionTransformer

    with h5py.File("pictures.h5") as file:
        mean, std = (torch.from_numpy(file[name][...]).float().view(-1, 1, 1) for name in ("mean", "std"))
        x = (torch.from_numpy(file["train/x"][...]).float() - mean) / std
        y = torch.from_numpy(file["train/y"][...])
    torch.manual_seed(0)
    model = VisionTransformer((1, 8, 8), CLASSES, patch=PATCH, dim=DIM, depth=DEPTH, heads=HEADS).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = torch.randperm(len(x))[:BATCH]
    loss = F.cross_entropy(model(x[rows].to(device)), y[rows].to(device))
    loss.backward()
    optimizer.step()
    loss.item()
    clock.stop()


def train(clock: Clock, device: str) -> None:
    """`hpclr train`."""
    for module in ("torch", "torch._dynamo", "hpclr.training.run"):
        clock.imports(module)
    for name, places in PARTS.items():
        for place in places:
            clock.watch(name, place)
    trainer: Any = import_module("hpclr.training.loop").Trainer
    take_step = trainer._take_step

    def first_step(self: Any) -> None:
        take_step(self)
        clock.stop()

    trainer._take_step = first_step
    sys.argv = ["hpclr", "train", "run.yaml", "--fresh", f"train.device={device}"]
    from hpclr.cli import main as hpclr

    hpclr()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child, began, device = sys.argv[2:]
        clock = Clock(float(began))
        try:
            {"script": script, "train": train}[child](clock, device)
        finally:  # hpclr ends by leaving the process
            Path("times.json").write_text(json.dumps(clock.seconds))
    else:
        main()
