"""What a step takes while ranks fall: hpclr's own accounting of a model without data, at every stage of a run."""

import argparse
import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from models import Case
from torch import Tensor, nn

from hpclr.lowrank import KINDS, WeightSite, count_flops, count_training_flops, select, summarize
from hpclr.lowrank.product import pays
from hpclr.methods.schedule import CheckSchedule, exact
from hpclr.planning.steps import Work


@dataclass(frozen=True)
class Stage:
    """A share of a run's steps, and what one takes: with all layers as factors, or only those for which that pays."""

    share: float
    all: Work
    pays: Work


def work_of(model: nn.Module, x: Tensor, y: Tensor, *, moved_bytes: float | None = None, size: int = 4) -> Work:
    """What a step of this model takes with a batch.

    Args:
        model: dense or with factors.
        x, y: the batch; only shapes count.
        moved_bytes: of the dense model, if this is another.
        size: bytes of an activation.
    """
    sizes = summarize(model)
    saved = _saved_numbers(model, x.to("meta"), y.to("meta")) * size
    return Work(
        flops=count_training_flops(model, lambda twin: F.cross_entropy(twin(x.to("meta")), y.to("meta"))),
        forward=count_flops(model, x),
        trained=sizes.trainable,
        stored=sizes.stored,
        gradient_bytes=sizes.gradient_bytes,
        saved_bytes=saved,
        moved_bytes=saved if moved_bytes is None else moved_bytes,
    )


def dense_work(case: Case, batch: int) -> Work:
    """Of a model before anything is converted."""
    return _counted(case.make(case.depth), case, batch, None)


def stages_of_formula(case: Case, options: argparse.Namespace, dense: Work) -> list[Stage]:
    """Dense up to `delay`; then every check cuts the layers that it covers, last layers first, down to `final`."""
    every, delay = exact(options.every), exact(options.delay)
    schedule = CheckSchedule(0, 1, options.layer_fraction)
    everything, paying = case.make(case.depth), case.make(case.depth)
    layers = len(_sites(everything))
    shares = [1.0] * layers
    stages = [Stage(float(delay), dense, dense)]
    for j in range(ceil((1 - delay) / every)):
        covered = range(layers - schedule.covered(j, layers), layers)
        for layer in covered:
            shares[layer] = max(options.final, shares[layer] * (1 - options.cut))
        _convert(everything, shares, range(layers), whatever_it_costs=True)
        _convert(paying, shares, covered, whatever_it_costs=False)
        works = (_counted(model, case, options.batch, dense.moved_bytes) for model in (everything, paying))
        stages.append(Stage(float(min(every, 1 - delay - j * every)), *works))
    return stages


def _convert(model: nn.Module, shares: list[float], layers: range, *, whatever_it_costs: bool) -> None:
    """Gives layers factors of these shares of full rank, of whatever content."""
    sites = _sites(model)
    for layer in layers:
        site, (m, n) = sites[layer], sites[layer].shape
        rank = ceil(shares[layer] * min(m, n))
        if whatever_it_costs or pays(m, n, rank, groups=site.groups, positions=site.positions):
            site.set_rank(rank)


def _sites(model: nn.Module) -> list[WeightSite]:
    return select(model, max_aspect=10.0, keep_last=True, kinds=KINDS).eligible


def _counted(model: nn.Module, case: Case, batch: int, moved_bytes: float | None) -> Work:
    with torch.device("meta"):
        x, y = case.example(batch)
    return work_of(model, x, y, moved_bytes=moved_bytes, size=2)


def _saved_numbers(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """How many numbers the forward pass keeps for the backward pass, the model's own parameters left out."""
    twin, kept = copy.deepcopy(model).to("meta"), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(twin(x), y)
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() // t.element_size() for t in (loss, *kept)}
    own = {parameter.untyped_storage()._cdata for parameter in twin.parameters()}
    return sum(size for storage, size in sizes.items() if storage not in own)


def stages_of_run(metrics: Path, dense: Work) -> list[Stage]:
    """What a run has recorded, as shares of its own dense model, applied to `dense`, which gives what is saved, too.

    Raises:
        SystemExit: if it has recorded no check.
    """
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    counted = [record for record in records if record["kind"] in ("check", "valid") and record.get("flops")]
    if not any(record["kind"] == "check" for record in counted):
        raise SystemExit(f"{metrics}: expected the records of a run whose ranks fell, found no check in them")
    stages, form = [], {"gradient_bytes": 1, "dense_gradient_bytes": 1, "trainable": 1, "stored": 1, "dense": 1}
    begin: dict[str, Any] = {"step": 0, "flops": 0, "dense_flops": 0}
    for record in counted:
        if record["step"] > begin["step"]:
            flops = (record["flops"] - begin["flops"]) / (record["dense_flops"] - begin["dense_flops"])
            work = _shrunk(dense, form, flops)
            stages.append(Stage((record["step"] - begin["step"]) / counted[-1]["step"], work, work))
            begin = record
        form = record if record["kind"] == "check" else form
    return stages


def _shrunk(dense: Work, form: Mapping[str, Any], flops: float) -> Work:
    return Work(
        flops=dense.flops * flops,
        forward=dense.forward * flops,
        trained=dense.trained * form["trainable"] / form["dense"],
        stored=dense.stored * form["stored"] / form["dense"],
        gradient_bytes=dense.gradient_bytes * form["gradient_bytes"] / form["dense_gradient_bytes"],
        saved_bytes=dense.saved_bytes,
        moved_bytes=dense.moved_bytes,
    )
