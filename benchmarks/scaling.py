"""Data-parallel training, dense against OIALR: measured on this machine, and worked out for 1 to 1,024 GPUs.

    python benchmarks/scaling.py [--processes 2,4] [--repeats 5] [--json FILE] [--plot FILE.svg]
    python benchmarks/scaling.py --processes "" --clusters jupiter --batch 16 --path runs/NAME/metrics.jsonl

Measured: a small vision transformer on 2 and 4 processes (torchrun, gloo, one thread each), dense in torch's own
DistributedDataParallel and low-rank in hpclr's Replica, which take turns in the same processes. `all` holds every layer
as factors, `pays` only those for which that is no larger and no slower. From dense models alone the parameters of
`hpclr/planning/steps.py` are fitted (operations a second and passes through memory from steps without communication, of
the model and of one half as wide; the memory's bandwidth from the optimiser; the network's from what communication
adds; a hop from the sum of one number). It then predicts the others: `error` is how far off it is. `ms` are the least
of all turns, in which the machine was least disturbed; `speed` is the median of the turns' ratios.

Worked out: a step of each GPU, with its own batch however many there are, dense and low-rank. The ranks' path is that
of a run's `metrics.jsonl`, or this one: all of it dense for the first `--delay` of the run; then, every `--every`, one
more `--layer-fraction` of the layers, last layers first, loses `--cut` of its rank, until `--final` of it is left.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from math import ceil, log2
from pathlib import Path
from typing import Any

import measure
import torch
import torch.nn.functional as F
from clusters import CLUSTERS
from models import CASES
from scaling_path import Stage, dense_work, stages_of_formula, stages_of_run, work_of
from step import Form, give

from hpclr.models import VisionTransformer
from hpclr.planning.steps import ADAMW_PASSES, Cluster, Reached, Work, all_reduce_seconds
from hpclr.planning.steps import step as step_of

HELD = ("all", "pays")
STEPS = 3  # of each way in a turn
SIDE, PATCH, DIM, DEPTH, HEADS, CLASSES, LOCAL_BATCH = 64, 16, 256, 6, 4, 10, 8


def main() -> None:
    """Measures, checks the model, and shows what it says of clusters."""
    options = parse()
    if options.worker:
        worker(options)
        return
    facts = measure.machine()
    results: dict[str, Any] = {}
    for processes in filter(None, options.processes.split(",")):
        results[f"measured on {processes}"] = rows = measured(options, int(processes))
        show_measured(rows, int(processes), facts)
    if options.clusters:
        results |= on_clusters(options)
    if options.plot:
        plot(results, options)
    measure.write_json(options.json, facts, results)


def on_clusters(options: argparse.Namespace) -> dict[str, Any]:
    """Shows and returns a row for each number of GPUs of each cluster."""
    reached = Reached(options.flops, options.bandwidth, options.overlap, options.passes)
    case = CASES[options.model]
    dense = dense_work(case, options.batch)
    stages = stages_of_run(options.path, dense) if options.path else stages_of_formula(case, options, dense)
    print(assumed(reached, options))
    results = {}
    for name in options.clusters.split(","):
        rows = [worked_out(gpus, CLUSTERS[name], reached, dense, stages) for gpus in map(int, options.gpus.split(","))]
        results[name] = rows
        show_worked_out(rows, CLUSTERS[name])
    return results


def parse() -> argparse.Namespace:
    parser = measure.parser(__doc__)
    parser.set_defaults(repeats=5)
    parser.add_argument("--processes", default="2,4", help='how many are measured; "" for none')
    parser.add_argument("--shares", default="1,0.5,0.25,0.125", help="ranks that are measured")
    parser.add_argument("--clusters", default=",".join(CLUSTERS), help="of " + ", ".join(CLUSTERS))
    parser.add_argument("--gpus", default="1,4,8,16,64,256,1024")
    parser.add_argument("--model", default="vit-b", help="of " + ", ".join(CASES))
    parser.add_argument("--batch", type=int, default=64, help="samples of each GPU")
    parser.add_argument("--flops", type=float, default=Reached.flops, help="share of the GPUs' operations a second")
    parser.add_argument("--bandwidth", type=float, default=Reached.bandwidth, help="share of the bandwidths")
    parser.add_argument("--overlap", type=float, default=Reached.overlap, help="of the backward pass with all-reduces")
    parser.add_argument("--passes", type=float, default=Reached.passes, help="of activations through memory")
    parser.add_argument("--path", type=Path, metavar="METRICS", help="metrics.jsonl of a run, for its path of ranks")
    parser.add_argument("--delay", type=float, default=0.1, help="of the run")
    parser.add_argument("--every", type=float, default=0.05, help="of the run")
    parser.add_argument("--layer-fraction", type=float, default=0.1)
    parser.add_argument("--cut", type=float, default=0.2, help="what a check takes of a rank")
    parser.add_argument("--final", type=float, default=0.2, help="share of full rank at which it stops")
    parser.add_argument("--plot", type=Path, help="an SVG or PNG file; needs matplotlib")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# Measured


def measured(options: argparse.Namespace, processes: int) -> list[dict[str, Any]]:
    """A row for each form of the model."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        subprocess.run(
            [*torchrun, __file__, *sys.argv[1:], "--worker", str(out)],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


class Way:
    """One form of the model, in training."""

    def __init__(self, form: Form | None, dim: int = DIM) -> None:
        from torch.nn.parallel import DistributedDataParallel

        from hpclr.parallel import Replica

        torch.manual_seed(0)
        self.model = VisionTransformer((3, SIDE, SIDE), CLASSES, patch=PATCH, dim=dim, depth=DEPTH, heads=HEADS)
        if form is not None:
            give(form, self.model)
        self.replica: Any = (
            DistributedDataParallel(self.model, gradient_as_bucket_view=True) if form is None else Replica(self.model)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.x, self.y = torch.randn(LOCAL_BATCH, 3, SIDE, SIDE), torch.randint(0, CLASSES, (LOCAL_BATCH,))

    def work(self, moved_bytes: float | None = None) -> Work:
        return work_of(self.model, self.x, self.y, moved_bytes=moved_bytes)

    def gradients(self, *, communicate: bool = True) -> None:
        with nullcontext() if communicate else self.replica.no_sync():
            F.cross_entropy(self.replica(self.x), self.y).backward()

    def update(self) -> None:
        self.optimizer.step()

    def step(self) -> None:
        self.gradients()
        self.update()
        self.optimizer.zero_grad()


def worker(options: argparse.Namespace) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    shares = [float(share) for share in options.shares.split(",")]
    forms = {f"{share:6.1%} {held}": Form(share, "equal", held) for share in shares for held in HELD}
    ways = {"dense": Way(None)} | {name: Way(form) for name, form in forms.items()}
    dense, narrow, updated = ways["dense"], Way(None, DIM // 2), Way(None)
    updated.gradients(communicate=False)  # which it keeps
    number = torch.zeros(1)
    timed: dict[str, Callable[[], object]] = {
        "alone": lambda: dense.gradients(communicate=False),
        "narrow": lambda: narrow.gradients(communicate=False),
        "update": updated.update,
        "one number": lambda: dist.all_reduce(number),
    } | {name: way.step for name, way in ways.items()}
    times = turns(timed, options.repeats)
    seconds = {name: min(values) for name, values in times.items()}  # in the turns that others disturbed least
    fitted = fit(seconds, dense.work(), narrow.work(), dist.get_world_size())
    speeds = measure.speed_ratios(times, "dense")
    rows = []
    for name, way in ways.items():
        work = way.work(dense.work().moved_bytes)
        predicted = step_of(work, dist.get_world_size(), *fitted).seconds
        rows.append(
            {"way": name, "seconds": seconds[name], "speed": speeds[name], "predicted": predicted}
            | {"work": asdict(work), "fitted": [asdict(part) for part in fitted]}
        )
    if dist.get_rank() == 0:
        options.worker.write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def turns(timed: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, in turns, until the last process is done."""
    import torch.distributed as dist

    times: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(-1, repeats):
        for name in list(timed)[:: -1 if turn % 2 else 1]:
            dist.barrier()
            start = time.perf_counter()
            for _ in range(STEPS):
                timed[name]()
            dist.barrier()
            if turn >= 0:  # the first one warms up
                times[name].append((time.perf_counter() - start) / STEPS)
    return times


def fit(seconds: Mapping[str, float], work: Work, narrow: Work, processes: int) -> tuple[Cluster, Reached]:
    """A cluster on which the dense model takes what it has taken here; nothing is hidden, as all cores compute."""
    # alone = flops · a + moved_bytes · b, for both models
    sizes = torch.tensor([[one.flops, one.moved_bytes] for one in (work, narrow)], dtype=torch.float64)
    taken = torch.tensor([seconds["alone"], seconds["narrow"]], dtype=torch.float64)
    a, b = torch.linalg.solve(sizes, taken).tolist()
    memory = ADAMW_PASSES * 4 * work.trained / seconds["update"]
    hop = seconds["one number"] / (2 * ceil(log2(processes)))
    found = Cluster("this machine", processes, 1 / a, memory, inside=1.0, between=1.0, hop_inside=hop)
    added = seconds["dense"] - seconds["alone"] - seconds["update"]
    hops = all_reduce_seconds(0.0, processes, found)
    at_one_byte_a_second = all_reduce_seconds(work.gradient_bytes, processes, found) - hops
    bandwidth = at_one_byte_a_second / max(added - hops, 1e-6)
    return replace(found, inside=bandwidth), Reached(flops=1.0, bandwidth=1.0, overlap=0.0, passes=b * memory)


def show_measured(rows: Sequence[Mapping[str, Any]], processes: int, facts: Mapping[str, Any]) -> None:
    (cluster, reached), dense = rows[0]["fitted"], rows[0]["work"]["gradient_bytes"]
    print(
        f"\nViT, {DIM} wide, {DEPTH} deep, {LOCAL_BATCH} pictures of {SIDE}x{SIDE} a process, {processes} processes of "
        f"one thread, gloo; {facts['processor']}, {facts['cores']} cores\n"
        f"fitted to dense: {cluster['flops'] / 1e9:.1f} GFLOP/s, memory {cluster['memory'] / 1e9:.1f} GB/s with "
        f"{reached['passes']:.1f} passes, "
        f"network {cluster['inside'] / 1e9:.2f} GB/s, hop {cluster['hop_inside'] * 1e6:.0f} us"
    )
    table = [
        (
            row["way"],
            f"{row['work']['gradient_bytes'] / 1e6:.2f}",
            f"{row['work']['gradient_bytes'] / dense:.3f}",
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['speed']:.2f}x",
            f"{row['predicted'] * 1e3:.1f}",
            f"{row['predicted'] / row['seconds'] - 1:+.0%}",
        )
        for row in rows
    ]
    measure.show(("ranks", "MB reduced", "of dense", "step ms", "speed", "predicted ms", "error"), table)


# Worked out


def worked_out(gpus: int, cluster: Cluster, reached: Reached, dense: Work, stages: Sequence[Stage]) -> dict[str, Any]:
    """Dense, and low-rank over the whole run and at its end, for so many GPUs."""

    def outcome(works: Sequence[tuple[float, Work]]) -> dict[str, Any]:
        steps = [(share, step_of(work, gpus, cluster, reached)) for share, work in works]
        return {
            "seconds": sum(share * one.seconds for share, one in steps),
            "end": asdict(steps[-1][1]) | {"seconds": steps[-1][1].seconds},
            "bytes": sum(share * work.gradient_bytes for share, work in works) if gpus > 1 else 0.0,
            "memory": max(one.memory for _, one in steps),
        }

    return {
        "gpus": gpus,
        "dense": outcome([(1.0, dense)]),
        "all": outcome([(stage.share, stage.all) for stage in stages]),
        "pays": outcome([(stage.share, stage.pays) for stage in stages]),
    }


ASSUMED = """
Worked out from these assumptions:
* Each GPU has {batch} samples of {model}, however many GPUs there are.
  AdamW; weights, gradients and moments in 32 bits, activations in 16.
* Products of matrices reach {flops:.0%} of the operations a second, low-rank ones too; activations go through memory
  {passes:g} times, the optimiser's numbers 7 times; bandwidths are {bandwidth:.0%} of those stated.
* All-reduce inside nodes, then between them with each GPU's share of the bytes: 2(n - 1)/n of the bytes, and 2 log2(n)
  hops a message of 25 MiB. It hides behind {overlap:.0%} of the backward pass, its last message behind nothing.
* Ranks: {path}
* Left out: checks, validation, checkpoints, reading data; temporary tensors.
`waits`: what of a dense step the network takes. `all`, `pays`: speed relative to dense, and below MB what a GPU reduces
a step, both over the whole run; below GB the most that it holds. `end`: with the ranks at the end of the run."""
FORMULA = """dense for {delay:.0%} of the run; then, each {every:.0%} of it, {layer_fraction:.0%} more of the layers,
  last ones first, lose {cut:.0%} of their rank, down to {final:.0%} of full rank."""


def show_worked_out(rows: Sequence[Mapping[str, Any]], cluster: Cluster) -> None:
    print(
        f"\n{cluster.what}\nassumed: a hop takes {cluster.hop_inside * 1e6:.0f} us inside a node, "
        f"{cluster.hop_between * 1e6:.0f} us between nodes"
    )
    table = [
        (
            f"{row['gpus']:,}",
            f"{row['dense']['seconds'] * 1e3:.1f}",
            f"{row['dense']['end']['exposed'] / row['dense']['seconds']:.0%}",
            *(f"{row['dense']['seconds'] / row[held]['seconds']:.2f}x" for held in HELD),
            *(f"{row['dense']['seconds'] / row[held]['end']['seconds']:.2f}x" for held in HELD),
            f"{row['dense']['bytes'] / 1e6:.0f}",
            *(f"{row[held]['bytes'] / 1e6:.0f}" for held in HELD),
            *(f"{row[held]['memory'] / 1e9:.1f}" for held in ("dense", *HELD)),
            f"{row['pays']['end']['memory'] / 1e9:.1f}",
        )
        for row in rows
    ]
    columns = ("GPUs", "dense ms", "waits", "all", "pays", "all, end", "pays, end")
    megabytes, gigabytes = ("dense MB", "all", "pays"), ("dense GB", "all", "pays", "pays, end")
    measure.show((*columns, *megabytes, *gigabytes), table)


def assumed(reached: Reached, options: argparse.Namespace) -> str:
    """What the figures of all clusters rest on."""
    path = (
        f"as recorded in {options.path}, under `all` and `pays` alike."
        if options.path
        else FORMULA.format(**vars(options))
    )
    return ASSUMED.format(model=CASES[options.model].what, batch=options.batch, path=path, **asdict(reached))


def plot(results: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Speed over the number of GPUs, a panel for each cluster."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in results if name in CLUSTERS]
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.2), sharey=True, squeeze=False)
    for panel, name in zip(axes[0], names, strict=True):
        gpus = [row["gpus"] for row in results[name]]
        for held, colour in zip(HELD, ("tab:orange", "tab:blue"), strict=True):
            whole = [row["dense"]["seconds"] / row[held]["seconds"] for row in results[name]]
            end = [row["dense"]["seconds"] / row[held]["end"]["seconds"] for row in results[name]]
            panel.plot(gpus, whole, color=colour, marker="o", label=f"{held}: whole run")
            panel.plot(gpus, end, color=colour, linestyle="--", label=f"{held}: at its end")
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set(xscale="log", title=name, xlabel="GPUs")
    axes[0][0].set_ylabel("speed, dense = 1")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(options.plot)


if __name__ == "__main__":
    main()
