"""How much of the wall time OIALR's checks take: `svd: rank0` against `svd: spread`, on 1, 2, 4 … processes.

    python benchmarks/checks.py [--processes 1,2,4] [--layers 24] [--width 384] [--json FILE]

Each number of processes trains the same multilayer perceptron twice, by torchrun on this machine, with one thread a
process; the two ways take turns. `check` is the time of all checks together, `share` their part of the whole, and
`speed-up` how much sooner `spread` has done its checks than `rank0` on the same number of processes. More processes
than cores share them, and show what the ways cost and not what they bring.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("rank0", "spread")


def main() -> None:
    """Measures in processes of their own and prints the table."""
    arguments = parse()
    if arguments.worker:
        worker(arguments)
        return
    results = [measured(arguments, n) for n in map(int, arguments.processes.split(","))]
    print(f"{arguments.layers} layers of {arguments.width} x {arguments.width}, float32, {processor()}, "
          f"{os.cpu_count()} cores, one thread a process, medians of {arguments.repeats}")  # fmt: skip
    print(f"{'processes':>9}  {'way':7} {'check s':>8} {'total s':>8} {'share':>6} {'speed-up':>8}")
    for result in results:
        for way in WAYS:
            line = result[way]
            speed_up = result["rank0"]["check"] / line["check"]
            print(f"{result['processes']:>9}  {way:7} {line['check']:8.2f} {line['total']:8.2f} "
                  f"{line['check'] / line['total']:6.1%} {speed_up:7.2f}x")  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps({"processor": processor(), "results": results}, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def processor() -> str:
    with open("/proc/cpuinfo") as file:
        return next(
            (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), platform.machine()
        )


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
    oialr = OIALR(replica, optimizer, delay=arguments.every, every=arguments.every)
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


if __name__ == "__main__":
    main()
