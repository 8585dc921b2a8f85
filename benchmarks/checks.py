"""How much of the wall time OIALR's checks take.

    python benchmarks/checks.py [--processes 1,2,4] [--layers 24] [--width 384] [--json FILE]
    python benchmarks/checks.py --paper [--models mini-vit,vit-b] [--depth N] [--device cuda] [--dtype bfloat16]
    python benchmarks/checks.py --batched [--device cuda]

The first compares `svd: rank0` with `svd: spread` on 1, 2, 4 … processes. Each number of processes trains the same
multilayer perceptron twice, by torchrun on this machine, with one thread a process; the two ways take turns. `check` is
the time of all checks together, `share` their part of the whole, and `speed-up` how much sooner `spread` has done its
checks than `rank0` on the same number of processes. More processes than cores share them, and show what the ways cost
and not what they bring.

The second, in one process, is for the sizes and the frequency of the paper: one check every 500 steps. Two models
train side by side, step by step: `exact` decomposes every matrix at every check, as all of it could be computed;
`hpclr` does what it does. `share` is the time of one check by that of `--every` steps as they are in that phase: before
the delay (no bases yet), at the conversion, after it (half of the layers covered, then all: what is cut has been made
so that a quarter of the ranks remains), and after the cuts. Time grows with the number of blocks for steps and checks
alike, so `--depth 1` tells the shares too. `--dtype` is that of autocast; weights are float32.

The third asks whether the eigenvalue problems of layers of one shape are solved sooner as one batch than one by one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

WAYS = ("rank0", "spread")
PAPER = {
    # name: sample, classes, what the model is made of, images in a batch
    "mini-vit": ((3, 32, 32), 10, {"patch": 8, "dim": 768, "depth": 6, "heads": 6, "qkv_bias": False}, 256),
    "vit-b": ((3, 224, 224), 1000, {"patch": 16, "dim": 768, "depth": 12, "heads": 12, "pool": "cls"}, 8),
}
PHASES = ("before the delay", "conversion", "half covered, cut", "all covered, cut", "after the cuts")
COLUMNS = ("model, phase", "step s", "exact s", "hpclr s", "exact share", "hpclr share", "speed-up")


def main() -> None:
    """Measures in processes of their own, or in this one, and prints the table."""
    arguments = parse()
    if arguments.worker:
        worker(arguments)
    elif arguments.paper:
        paper(arguments)
    elif arguments.batched:
        batched(arguments)
    else:
        ways(arguments)


def ways(arguments: argparse.Namespace) -> None:
    results = [measured(arguments, n) for n in map(int, arguments.processes.split(","))]
    print(f"{arguments.layers} layers of {arguments.width} x {arguments.width}, float32, {measure.processor()}, "
          f"{os.cpu_count()} cores, one thread a process, medians of {arguments.repeats}")  # fmt: skip
    print(f"{'processes':>9}  {'way':7} {'check s':>8} {'total s':>8} {'share':>6} {'speed-up':>8}")
    for result in results:
        for way in WAYS:
            line = result[way]
            speed_up = result["rank0"]["check"] / line["check"]
            print(f"{result['processes']:>9}  {way:7} {line['check']:8.2f} {line['total']:8.2f} "
                  f"{line['check'] / line['total']:6.1%} {speed_up:7.2f}x")  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps({"processor": measure.processor(), "results": results}, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, help="steps between checks: 10, with --paper 500")
    parser.add_argument("--paper", action="store_true", help="the paper's sizes and frequency, in one process")
    parser.add_argument("--batched", action="store_true", help="eigenvalue problems together and one by one")
    parser.add_argument("--models", default=",".join(PAPER), help=f"with --paper: of {', '.join(PAPER)}")
    parser.add_argument("--depth", type=int, help="with --paper: another number of blocks")
    parser.add_argument("--batch", type=int, help="with --paper: another number of images")
    parser.add_argument("--device", default="cpu", help="with --paper or --batched")
    parser.add_argument("--dtype", default="float32", help="with --paper: float32, or that of autocast")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(arguments: argparse.Namespace, processes: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        subprocess.run(
            [*torchrun, __file__, *sys.argv[1:], "--worker", str(out)],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        times = json.loads(out.read_text())
    medians = {
        way: {what: statistics.median(run[what] for run in times[way]) for what in ("check", "total")} for way in WAYS
    }
    return {"processes": processes, **medians}


def worker(arguments: argparse.Namespace) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    times: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    trained(arguments, "spread", steps=2)  # warms up
    for _ in range(arguments.repeats):
        for way in WAYS:
            times[way].append(trained(arguments, way, arguments.steps))
    if dist.get_rank() == 0:
        arguments.worker.write_text(json.dumps(times))
    dist.barrier()
    dist.destroy_process_group()


def trained(arguments: argparse.Namespace, way: str, steps: int) -> dict[str, float]:
    """Seconds in all, and in checks."""
    import torch
    import torch.distributed as dist
    from torch import nn

    from hpclr import OIALR
    from hpclr.parallel import Replica

    torch.manual_seed(0)
    torch.set_num_threads(1)
    width = arguments.width
    layers = [layer for _ in range(arguments.layers) for layer in (nn.Linear(width, width), nn.ReLU())]
    replica = Replica(nn.Sequential(*layers, nn.Linear(width, 10)), svd=way)
    optimizer = torch.optim.AdamW(replica.parameters(), lr=1e-3)
    every = arguments.every or 10
    oialr = OIALR(replica, optimizer, delay=every, every=every)
    x, y = torch.randn(64, width), torch.randint(0, 10, (64,))
    checking = 0.0
    dist.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        nn.functional.cross_entropy(replica(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = time.perf_counter()
        oialr.step()
        checking += time.perf_counter() - before
    dist.barrier()
    return {"check": checking, "total": time.perf_counter() - began}


# --- the paper's sizes -----------------------------------------------------------------------------------------------


def paper(arguments: argparse.Namespace) -> None:
    facts = measure.machine(arguments.device)
    every = arguments.every or 500
    results = {name: paper_model(arguments, name) for name in arguments.models.split(",")}
    print(f"{measure.heading(facts)}; {arguments.dtype}; a check every {every} steps")
    rows = [
        [f"{name}, {phase}", *paper_row(line, every)]
        for name, lines in results.items()
        for phase, line in lines.items()
    ]
    measure.show(COLUMNS, rows)
    measure.write_json(arguments.json, facts | {"dtype": arguments.dtype, "every": every}, results)


def paper_row(line: dict[str, float], every: int) -> list[str]:
    old, new, steps = line["exact"], line["hpclr"], every * line["step"]
    return [f"{line['step']:.3f}", f"{old:.3f}", f"{new:.3f}", f"{old / steps:.2%}", f"{new / steps:.2%}",
            f"{old / new:.2f}x"]  # fmt: skip


def paper_model(arguments: argparse.Namespace, name: str) -> dict[str, dict[str, float]]:
    """Phase → seconds of a step and of a check, exactly and as hpclr does it; the two models take turns."""
    runs = {"exact": PaperRun(arguments, name, exact_placement()), "hpclr": PaperRun(arguments, name, None)}
    seen: dict[str, list[dict[str, float]]] = {}
    for phase in (PHASES[0], *PHASES, PHASES[-1]):
        steps = {way: run.timed(run.train) for way, run in runs.items()}
        checks = {way: run.timed(run.oialr.step) for way, run in runs.items()}
        seen.setdefault(phase, []).append(checks | {"step": steps["hpclr"]})
    return {phase: {key: min(turn[key] for turn in turns) for key in turns[0]} for phase, turns in seen.items()}


class PaperRun:
    """A model in training with a check after every step, so that seven steps go through all phases."""

    def __init__(self, arguments: argparse.Namespace, name: str, placement: Any) -> None:
        import torch

        from hpclr import OIALR
        from hpclr.models import VisionTransformer

        shape, classes, options, batch = PAPER[name]
        torch.manual_seed(0)
        self.device, self.dtype = arguments.device, getattr(torch, arguments.dtype)
        self.model = VisionTransformer(
            shape, classes, **options | ({"depth": arguments.depth} if arguments.depth else {})
        )
        quarter_of_the_spectrum(self.model)
        self.model.to(self.device)
        batch = arguments.batch or batch
        self.x = torch.randn(batch, *shape, device=self.device)
        self.y = torch.randint(0, classes, (batch,), device=self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        self.oialr = OIALR(
            self.model, self.optimizer, delay=3, every=1, layer_fraction=0.5, max_cut=0.75, placement=placement
        )

    def train(self) -> None:
        import torch
        from torch.nn.functional import cross_entropy

        low = self.dtype != torch.float32
        with torch.autocast(torch.device(self.device).type, dtype=self.dtype if low else None, enabled=low):
            cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self, what: Callable[[], None]) -> float:
        measure.synchronise(self.device)
        began = time.perf_counter()
        what()
        measure.synchronise(self.device)
        return time.perf_counter() - began


def batched(arguments: argparse.Namespace) -> None:
    """Gram matrices in float64, as checks have them."""
    import torch

    print(measure.heading(measure.machine(arguments.device)) + "\n")
    rows = []
    for size, layers in ((96, 24), (192, 24), (384, 8)):
        part = torch.randn(layers, size, size, dtype=torch.float64, device=arguments.device)
        grams = part @ part.mT
        ways = {
            "one by one": lambda grams=grams: [torch.linalg.eigh(gram) for gram in grams],
            "together": lambda grams=grams: torch.linalg.eigh(grams),
        }
        times = measure.interleaved(ways, device=arguments.device, repeats=arguments.repeats)
        speed = measure.speed_ratios(times, "one by one")["together"]
        rows.append([layers, f"{size}x{size}", f"{measure.medians(times)['one by one']:.3f}", f"{speed:.2f}"])
    measure.show(("layers", "size", "one by one s", "speed together"), rows)


def quarter_of_the_spectrum(model: Any) -> None:
    """Leaves a quarter of each weight's singular values, and makes the others a twentieth of what they were."""
    import torch

    from hpclr.lowrank import select

    for site in select(model).eligible:
        u, s, vh = torch.linalg.svd(site.core(), full_matrices=False)
        s[-(-len(s) // 4) :] /= 20
        with torch.no_grad():
            site.core().copy_(u * s @ vh)


def exact_placement() -> Any:
    """Exact decompositions, whatever is asked for."""
    from hpclr.lowrank.factors import svd
    from hpclr.lowrank.spectra import measured_in
    from hpclr.methods.placement import Here

    class Exact(Here):
        def measure(self, matrix: Any, rule: Any, *, dense: bool) -> Any:
            return measured_in(self.decompose(matrix, dense=dense), rule)

        def decompose(self, matrix: Any, *, dense: bool) -> Any:
            return svd(matrix if dense else matrix.double())

    return Exact()


if __name__ == "__main__":
    main()
