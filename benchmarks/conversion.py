"""What memory training holds at its peak before, in and after the checks at which layers become low-rank.

    python benchmarks/conversion.py [--models vit-b,gpt2-bytes] [--depth 4] [--batch 2] [--json FILE]

Trains models of known low rank for a few steps, each way in processes of its own: dense, and with OIALR in both ways
of converting (`convert`). `start`, `step`, `check` and `after` are peaks as shares of the dense run's in a step: in
making the OIALR object, in a step before the conversion, in the costliest check, and in a step after all checks. They
are sums of what torch holds on the model's device, the same in every run. `remembered` is what is kept in main memory
of the bases until they are frozen, in MiB, which on a CPU is in the other columns too. `process` is the system's view,
without a profiler: the most that the process had resident (on a GPU: the device's tensors), as a share of the dense
run's.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import measure
import memory
import torch
from models import CASES
from step import Training
from torch import nn

from hpclr import OIALR
from hpclr.training.memory import PeakMemory

WAYS = ("dense", "at_delay", "when_it_pays")
EVERY, STEPS = 2, 5
PHASES = ("start", "step", "check", "after")
COLUMNS = ("convert", *PHASES, "remembered", "process")


class Run:
    """A few steps of training, whose phases go through `phase`.

    Attributes:
        remembered: bytes kept of the bases before the conversion.
    """

    def __init__(self, options: argparse.Namespace, phase: Callable[[str, Callable[[], Any]], Any]) -> None:
        self.training = Training(CASES[options.models], None, options)
        make_low_rank(self.training.model)
        self.phase = phase
        self.remembered = 0

    def dense(self) -> None:
        for _ in range(STEPS):
            self.phase("step", self.training.step)

    def oialr(self, convert: Any) -> None:
        model, optimizer = self.training.model, self.training.optimizer
        settings = {"delay": EVERY, "every": EVERY, "layer_fraction": 1.0, "convert": convert}
        method = self.phase("start", lambda: OIALR(model, optimizer, **settings))
        self.remembered = remembered(method)
        for step in range(1, STEPS + 1):
            self.phase("after" if step == STEPS else "step", self.training.step)
            self.phase("check", method.step)
        assert all(method.frozen.values()) or convert == "when_it_pays", "nothing was converted"


def remembered(method: OIALR) -> int:
    """Bytes of what is kept of the bases, which are in main memory whatever the model's device."""
    kept = method.state_dict()["stability"]["polar"].values()
    assert all(tensor.device.type == "cpu" for tensor in kept)
    return sum(tensor.nbytes for tensor in kept)


@torch.no_grad()
def make_low_rank(model: nn.Module) -> None:
    """A sixth of the directions in every weight, which is few enough to pay; and noise that a cutoff of 0.1 removes."""
    for weight in model.parameters():
        if weight.ndim == 2 and weight.shape[0] < 10 * weight.shape[1]:
            k = max(1, min(weight.shape) // 6)
            u, v = (torch.linalg.qr(torch.randn(size, k)).Q for size in weight.shape)
            weight.copy_(weight.norm() / k**0.5 * (u @ v.mT) + 1e-3 * weight.std() * torch.randn(weight.shape))


def main() -> None:
    """Measures each way in processes of its own and prints a table for each model."""
    options = parse()
    if options.worker:
        work(options)
        return
    facts = measure.machine(options.device)
    print(measure.heading(facts))
    results = {name: {way: measured(name, way) for way in WAYS} for name in options.models.split(",")}
    for name, found in results.items():
        dense = found["dense"]
        print(f"\n{CASES[name].what}, {options.depth or CASES[name].depth} deep, {options.batch or CASES[name].batch} "
              f"samples, {options.dtype}; dense: {dense['step'] / 2**20:.0f} MiB in a step, process "
              f"{dense['process'] / 2**20:.0f} MiB")  # fmt: skip
        measure.show(COLUMNS, [line(way, row, dense) for way, row in found.items()])
    measure.write_json(options.json, facts | {"dtype": options.dtype}, results)


def line(way: str, row: Mapping[str, int], dense: Mapping[str, int]) -> list[str]:
    shares = [f"{row[phase] / dense['step']:.3f}" if phase in row else "-" for phase in PHASES]
    kept = f"{row.get('remembered', 0) / 2**20:.0f}"
    return [way, *shares, kept, f"{row['process'] / dense['process']:.3f}"]


def measured(model: str, way: str) -> dict[str, int]:
    """The phases from one process, the whole from another."""
    found: dict[str, int] = {}
    for what in ([], ["--whole"]):
        command = [sys.executable, __file__, *sys.argv[1:], "--models", model, "--worker", way, *what]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


def work(options: argparse.Namespace) -> None:
    """One run; prints its peaks."""
    device, _ = measure.begin(options)
    if options.whole:
        whole = PeakMemory(device)
        done(options, lambda name, work: work())
        print(json.dumps({"process": whole.bytes()}))
        return
    with memory.Recording(device) as recording:
        run = done(options, recording.phase)
    print(json.dumps(recording.peaks() | {"remembered": run.remembered}))


def done(options: argparse.Namespace, phase: Callable[[str, Callable[[], Any]], Any]) -> Run:
    """A run to its end."""
    run = Run(options, phase)
    run.dense() if options.worker == "dense" else run.oialr(options.worker)
    return run


def parse() -> argparse.Namespace:
    parser = measure.parser(__doc__)
    parser.add_argument("--models", default="vit-b,gpt2-bytes", help="which, of " + ", ".join(CASES))
    parser.add_argument("--depth", type=int, default=0, help="blocks of the model; 0: its usual")
    parser.add_argument("--batch", type=int, default=0, help="samples in a step; 0: few")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
