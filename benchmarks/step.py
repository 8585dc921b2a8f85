"""A whole training step, forward, backward and optimiser: low-rank against dense, in time and in memory.

    python benchmarks/step.py [--models vit-tiny,resnet20] [--shares 1,0.5,0.25,0.125] [--depth N] [--json FILE]
    python benchmarks/step.py --device cuda --dtype bfloat16 --compile --batch 64
    python benchmarks/step.py --models vit-tiny --probing
    python benchmarks/step.py --models gpt2 --shares 0.25 --tied

Every layer that OIALR would convert gets a rank that is a share of min(m, n): in `equal` rows the same share for all,
in `sloped` rows share·(3/2 − l/(L − 1)) for layer l = 0 … L − 1, at most 1: the later a layer, the lower, as OIALR's
checks reach the last layers first. `all` holds every layer as factors (`convert: at_delay`), `pays` only those for
which `hpclr.lowrank.product.pays` says so (`convert: when_it_pays`); the rest is dense. AdamW updates what is trained.

`speed` is the dense model's time by this one's, from steps taken in turns. The other columns are shares of the dense
model's: multiply-adds of forward and backward, parameters trained and stored, bytes of optimiser state, peak of memory
in a step (weights, gradients, optimiser state and activations), and bytes kept for the backward pass.

With --tied the head is among the layers whose weight is that of an embedding, and both have the same factors
(`tied: true`); for models with such a head.

With --probing, two columns more, for the step before a check, which rebuilds the weights and leaves the gradients with
regard to them (`hpclr.lowrank.probing`): how many times as long it takes as another step of the same form, and its peak
of memory as a share of the dense model's.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import measure
import memory
import torch
import torch.nn.functional as F
from models import CASES, Case
from torch import Tensor, nn

from hpclr.lowrank import KINDS, WeightSite, count_training_flops, select
from hpclr.lowrank.accounting import optimizer_bytes
from hpclr.lowrank.probing import dense_gradients
from hpclr.lowrank.product import pays

COLUMNS = ("ranks", "held as", "speed", "FLOPs", "trained", "stored", "optimiser", "peak", "saved")
PROBING = ("probing: time", "peak")
SHARES = ("flops", "trained", "stored", "optimizer_bytes", "peak_bytes", "saved_bytes")


@dataclass(frozen=True)
class Form:
    """How the weights are held: ranks as a share of min(m, n), how they are spread, and which layers are factored."""

    share: float
    spread: str  # "equal" or "sloped"
    held: str  # "all" or "pays"

    def rank(self, site: WeightSite, place: float) -> int:
        """The rank of a layer at a place from 0 (the first) to 1 (the last)."""
        slope = 1.5 - place if self.spread == "sloped" else 1.0
        return ceil(min(1.0, self.share * slope) * min(site.shape))


class Training:
    """A model, dense or in some form, with its optimiser and a batch."""

    def __init__(self, case: Case, form: Form | None, options: argparse.Namespace) -> None:
        device, dtype = torch.device(options.device), getattr(torch, options.dtype)
        torch.manual_seed(0)
        self.device = device
        self.model = case.make(options.depth or case.depth).to(device, dtype)
        if form is not None:
            give(form, self.model, tied=options.tied)
        self.inputs, self.targets = (t.to(device) for t in case.example(options.batch or case.batch))
        if self.inputs.is_floating_point():
            self.inputs = self.inputs.to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.forward = torch.compile(self.model) if options.compile else self.model

    def loss(self, model: Callable[[Tensor], Tensor], device: str | None = None) -> Tensor:
        return F.cross_entropy(model(self.inputs.to(device)), self.targets.to(device))

    def step(self) -> None:
        self.loss(self.forward).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def probing_step(self) -> None:
        with dense_gradients({site.name: site for site in select(self.model).candidates}):
            self.step()

    def sizes(self) -> dict[str, int]:
        """Bytes and counts, after a first step."""
        self.step()
        held = memory.held_bytes(self.model, self.optimizer, self.inputs, self.targets)
        return {
            "trained": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "stored": sum(p.numel() for p in self.model.parameters()),
            "flops": count_training_flops(self.model, lambda twin: self.loss(twin, "meta")),
            "optimizer_bytes": optimizer_bytes(self.optimizer),
            "peak_bytes": held + memory.peak_bytes(self.step, self.device),
            "saved_bytes": memory.saved_bytes(lambda: self.loss(self.forward), self.model),
        }


@torch.no_grad()
def give(form: Form, model: nn.Module, *, tied: bool = False) -> None:
    """Orthonormal bases and a Σ of small numbers: the time does not depend on what they are."""
    sites = select(model, max_aspect=10.0, keep_last=True, kinds=KINDS, tied=tied).eligible
    for number, site in enumerate(sites):
        (m, n), k = site.shape, form.rank(site, number / max(1, len(sites) - 1))
        if form.held == "all" or pays(m, n, k, groups=site.groups, positions=site.positions):
            u, v = (torch.linalg.qr(torch.randn(size, k)).Q for size in (m, n))
            site.convert(u, torch.eye(k) * 0.1, v.mT)


def forms(share: float) -> list[Form]:
    """With full rank everywhere there is nothing to spread."""
    return [
        Form(share, spread, held)
        for spread in ("equal", "sloped")[: 1 if share == 1 else 2]
        for held in ("all", "pays")
    ]


def measured(case: Case, share: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row of the table for each form; what is alive at a time is the dense model and the forms of one share."""
    trainings = {"dense": Training(case, None, options)}
    trainings |= {f"{form.spread} {form.held}": Training(case, form, options) for form in forms(share)}
    ways = {name: training.step for name, training in trainings.items()}
    if options.probing:
        ways |= {f"{name}, probing": one.probing_step for name, one in trainings.items() if name != "dense"}
    times = measure.interleaved(ways, device=options.device, repeats=options.repeats)
    speed, seconds = measure.speed_ratios(times, "dense"), measure.medians(times)
    dense = trainings.pop("dense").sizes()
    return [
        {
            "share": share,
            "form": name,
            "speed": speed[name],
            "seconds": seconds[name],
            "dense_seconds": seconds["dense"],
        }
        | {"sizes": (sizes := training.sizes()), "of_dense": {key: sizes[key] / dense[key] for key in dense}}
        | {"dense_sizes": dense}
        | (probed(name, training, times, dense["peak_bytes"]) if options.probing else {})
        for name, training in trainings.items()
    ]


def probed(
    name: str, training: Training, times: Mapping[str, list[float]], dense_peak: int
) -> dict[str, dict[str, float]]:
    """What the step before a check takes, relative to another one and to dense memory."""
    held = memory.held_bytes(training.model, training.optimizer, training.inputs, training.targets)
    peak = held + memory.peak_bytes(training.probing_step, training.device)
    time = 1 / measure.speed_ratios(times, name)[f"{name}, probing"]
    return {"probing": {"time": time, "peak_of_dense": peak / dense_peak}}


def line(row: Mapping[str, Any]) -> list[str]:
    spread, held = row["form"].split()
    return [
        f"{row['share']:7.1%} {spread}",
        held,
        f"{row['speed']:.2f}x",
        *(f"{row['of_dense'][key]:.3f}" for key in SHARES),
        *([f"{row['probing']['time']:.2f}", f"{row['probing']['peak_of_dense']:.3f}"] if "probing" in row else []),
    ]


def main() -> None:
    """Measures, prints one table a model, and writes JSON."""
    options = parse()
    measure.begin(options)
    facts = measure.machine(options.device)
    print(measure.heading(facts))
    results = {}
    for name in options.models.split(","):
        case = CASES[name]
        rows = [row for share in map(float, options.shares.split(",")) for row in measured(case, share, options)]
        results[name] = rows
        dense = rows[0]["dense_sizes"]
        print(
            f"\n{case.what}, {options.depth or case.depth} deep, {options.batch or case.batch} samples, {options.dtype}"
            f"{', compiled' if options.compile else ''}{', tied head too' if options.tied else ''}; "
            f"dense: {rows[0]['dense_seconds'] * 1e3:.0f} ms, "
            f"{dense['stored'] / 1e6:.1f} M parameters, peak {dense['peak_bytes'] / 2**20:.0f} MiB, "
            f"{dense['saved_bytes'] / 2**20:.0f} MiB saved"
        )
        measure.show(COLUMNS + PROBING * options.probing, [line(row) for row in rows])
    about = {"dtype": options.dtype, "compiled": options.compile, "tied": options.tied}
    measure.write_json(options.json, facts | about, results)


def parse() -> argparse.Namespace:
    parser = measure.parser(__doc__)
    parser.add_argument("--models", default=",".join(CASES), help="which, of " + ", ".join(CASES))
    parser.add_argument("--shares", default="1,0.5,0.25,0.125", help="mean ranks as shares of min(m, n)")
    parser.add_argument("--depth", type=int, default=0, help="blocks of the model (VGG16 has always 13); 0: its usual")
    parser.add_argument("--batch", type=int, default=0, help="samples in a step; 0: few")
    parser.add_argument("--probing", action="store_true", help="the step before a check too")
    parser.add_argument("--tied", action="store_true", help="a head with the weight of an embedding, and that, too")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    return parser.parse_args()


if __name__ == "__main__":
    main()
