"""What the gradient outside frozen bases is good for: bases that grow by it, layers that freeze by it.

    hpclr data prepare digits datasets/digits.h5 --valid-fraction 0.1
    python benchmarks/refresh.py jobs/quickstart.yaml --ways kept,refreshed method.cutoff=0.4 train.threads=1
    python benchmarks/refresh.py jobs/quickstart.yaml --ways stable,inside train.threads=1

`kept` is the run file's OIALR. `refreshed` is the same, but after each check that finds frozen bases, until 85 % of the
run, U and V of each layer are extended by --share of its smaller side: by the leading left singular vectors of
(I − U Uᵀ) G and the leading right ones of G (I − V Vᵀ), with zeros in Σ, for the gradient G of the step before. The
weight stays what it is. Adam's second moments of the new entries are the mean of the others'. Later checks cut as ever.

In the other ways, layers freeze at the ranks of the cutoff, equally many at each of the checks from 20 to 60 % of the
run, so that the average step of freezing is the same: first the most stable (`stable`), or those with the least
gradient outside of what is kept (`inside`), or the other way round (`unstable`, `outside`). Later checks cut as ever.

Accuracy and loss are those of the test split after the last step, sizes shares of the dense model's. The columns on the
right are differences to the first way, paired by seed: the mean ± its standard error.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from hpclr.config import RunFile, load_run_file
from hpclr.data import BatchStream
from hpclr.lowrank import KINDS, WeightSite, rank_rule, select, summarize
from hpclr.lowrank.factors import alignment, polar, svd
from hpclr.lowrank.moments import Change, carry
from hpclr.lowrank.probing import dense_gradients, outside
from hpclr.lowrank.product import Factors
from hpclr.methods import OIALR
from hpclr.methods.factoring import change_basis
from hpclr.training.assembly import Assembly, assemble
from hpclr.training.schedules import set_learning_rate

EVERY, FIRST, LAST, GROWS_UNTIL = 0.05, 0.2, 0.6, 0.85  # of the run
MEASURES = ("accuracy", "loss", "stored", "trained")
After = Callable[[int, Mapping[str, Tensor]], None]


@dataclass(frozen=True)
class Grown(Change):
    """Σ with so many new rows and columns, of which there are no gradients yet."""

    extra: int

    def _applied(self, state: Tensor, power: int) -> Tensor:
        return F.pad(state, (0, self.extra, 0, self.extra), value=float(state.mean()) if power == 2 else 0.0)


def sites_of(parts: Assembly) -> dict[str, WeightSite]:
    names = {key: getattr(parts.run.method, key) for key in ("max_aspect", "keep_first", "keep_last", "exclude")}
    return {site.name: site for site in select(parts.model, kinds=KINDS, **names).eligible}


def train(parts: Assembly, sites: Mapping[str, WeightSite], due: Callable[[int], bool], after: After) -> None:
    """All steps; after one that is due, what its pass has left: gradients with regard to whole weights."""
    parts.model.train()
    for number, batch in enumerate(BatchStream(parts.loader, 0, parts.total_steps), start=1):
        set_learning_rate(parts.optimizer, parts.learning_rate(number - 1))
        parts.optimizer.zero_grad()
        with dense_gradients(sites if due(number) else {}) as gradients:
            parts.task.loss(parts.model(batch.x), batch).backward()
        parts.optimizer.step()
        dense = {name: site.to_matrix(p.grad) for name, site in sites.items() if (p := site.parameter).grad is not None}
        after(number, {**dense, **gradients} if due(number) else {})


def oialr(parts: Assembly, share: float) -> None:
    """The run file's own training; where `share` is not 0, bases grow after the checks."""
    method, sites = parts.method, sites_of(parts)
    assert isinstance(method, OIALR)
    grows = range(method.delay + 1, int(GROWS_UNTIL * parts.total_steps)) if share else range(0)

    def after(number: int, gradients: Mapping[str, Tensor]) -> None:
        checks = method.checks
        method.step()
        for name, site in sites.items() if method.checks > checks and number in grows else ():
            if site.is_lowrank:
                grow(site, gradients[name], ceil(share * min(site.shape)), parts.optimizer)
                method._tracker.memory.pop(name)  # its Σ has another size now

    train(parts, sites, method._schedule.is_due, after)


@torch.no_grad()
def grow(site: WeightSite, gradient: Tensor, most: int, optimizer: torch.optim.Optimizer) -> None:
    """Extends both bases by directions of the gradient outside them."""
    u, sigma, vh = (factor.detach() for factor in site.factors)
    extra = min(most, min(site.shape) - len(sigma))
    left = torch.linalg.svd(gradient - u @ (u.mT @ gradient), full_matrices=False).U[:, :extra]
    right = torch.linalg.svd(gradient - (gradient @ vh.mT) @ vh, full_matrices=False).Vh[:extra]
    old_shape, old_grad = site.parameter.shape, site.parameter.grad
    site.convert(extended(u, left), F.pad(sigma, (0, extra, 0, extra)), extended(vh.mT, right.mT).mT)
    carry(optimizer, Grown(site.name, site.parameter, extra), old_shape, old_grad)


def extended(basis: Tensor, new: Tensor) -> Tensor:
    for _ in range(2):  # once is not enough in float32
        new = new - basis @ (basis.mT @ new)
    return torch.cat([basis, torch.linalg.qr(new).Q], dim=1)


class Ordered:
    """Freezes layers one after another, by what is measured of them."""

    def __init__(self, parts: Assembly, way: str) -> None:
        self.sites, self.optimizer, self.way = sites_of(parts), parts.optimizer, way
        options: Any = parts.run.method
        self.rule, self.most = rank_rule(options.cutoff), options.max_cut
        self.polar = {name: polar(svd(site.core())) for name, site in self.sites.items()}
        self.every = round(EVERY * parts.total_steps)
        numbers = range(self.every, parts.total_steps, self.every)
        self.checks = [number for number in numbers if FIRST <= number / parts.total_steps <= LAST]

    @torch.no_grad()
    def after(self, number: int, gradients: Mapping[str, Tensor]) -> None:
        if number % self.every:
            return
        frozen = [name for name, site in self.sites.items() if site.is_lowrank]
        for name in frozen:
            self.cut(name, self.most)
        found = {name: self.measured(name, gradients[name]) for name in self.sites.keys() - set(frozen)}
        until = ceil(len(self.sites) * sum(check <= number for check in self.checks) / len(self.checks))
        for name in sorted(found, key=lambda name: (found[name], name))[: max(0, until - len(frozen))]:
            self.cut(name)

    def measured(self, name: str, gradient: Tensor) -> float:
        """What says when a dense layer's turn is: the lower, the earlier."""
        basis, before = svd(self.sites[name].core()), self.polar[name]
        self.polar[name] = polar(basis)
        kept = basis.leading(self.rule(basis.s, self.sites[name].shape))
        rest = outside(gradient, Factors(kept.u, torch.diag(kept.s), kept.vh)).norm() / gradient.norm()
        value = float(rest) if self.way in ("inside", "outside") else 1 - alignment(before, self.polar[name])
        return value if self.way in ("inside", "stable") else -value

    def cut(self, name: str, most: float = 1.0) -> None:
        """Freezes a layer at the rank of the rule, or cuts one that is frozen, by this share at most."""
        basis = svd(self.sites[name].core())
        rank = max(1, self.rule(basis.s, self.sites[name].shape), ceil((1 - most) * len(basis.s)))
        change_basis(self.sites[name], basis.leading(rank), self.optimizer)


def result(run: RunFile, way: str, share: float) -> dict[str, float]:
    parts = assemble(run)
    if way in ("kept", "refreshed"):
        oialr(parts, share if way == "refreshed" else 0.0)
    else:
        layers = Ordered(parts, way)
        train(parts, layers.sites, lambda number: number % layers.every == 0, layers.after)
    score, sizes = parts.task.score(parts.model, parts.test, parts.precision), summarize(parts.model)
    values = 100 * score.metrics["accuracy"], score.loss, 100 * sizes.stored_share, 100 * sizes.trainable_share
    found = dict(zip(MEASURES, values, strict=True))
    print(f"{way}, seed {run.train.seed}: {found}", flush=True)
    return found


def rows(ways: Sequence[str], found: Mapping[str, list[dict[str, float]]]) -> Iterator[list[str]]:
    for way in ways:
        means = [f"{statistics.fmean(one[name] for one in found[way]):.4g}" for name in MEASURES]
        pairs = list(zip(found[way], found[ways[0]], strict=True))
        yield [way, *means, *(spread([a[name] - b[name] for a, b in pairs]) if pairs else "" for name in MEASURES)]


def spread(values: Sequence[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):+.4f} ± {error:.4f}" if any(values) else ""


def parse() -> argparse.Namespace:
    parser = measure.parser(__doc__)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("settings", nargs="*", help="section.key=value, as for hpclr train")
    parser.add_argument("--ways", default="kept,refreshed")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--share", type=float, default=0.05, help="by which bases grow, of the smaller side")
    return parser.parse_intermixed_args()


def main() -> None:
    options = parse()
    measure.begin(options)
    ways, seeds = options.ways.split(","), [f"train.seed={seed}" for seed in options.seeds.split(",")]
    runs = [load_run_file(options.run_file, [*options.settings, seed]) for seed in seeds]
    found = {way: [result(run, way, options.share) for run in runs] for way in ways}
    measure.show(("way", *MEASURES, *(f"Δ {name}" for name in MEASURES)), list(rows(ways, found)))
    measure.write_json(options.json, measure.machine(), found)


if __name__ == "__main__":
    main()
