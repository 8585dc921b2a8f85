"""What a process holds, phase by phase."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

from hpclr.config.schema import Oialr, Section
from hpclr.planning.checking import check_bytes, watched_bytes
from hpclr.planning.counting import Counts, Share, sample_bytes
from hpclr.planning.forms import Layer, Ranks
from hpclr.planning.hardware import Hardware
from hpclr.planning.ranks import Path


@dataclass(frozen=True)
class Held:
    """Bytes that a process holds in a phase.

    Attributes:
        phase: in words.
        weights: parameters and buffers.
        gradients: with more than one process the buckets of DistributedDataParallel, which they lie in.
        optimizer: its state.
        activations: the most that is held for the backward pass at a time, with what comes into being on the way.
        check: what the examination of the largest layer takes, and what is gathered for it in the step before.
        other: the samples, and the averaged weights where the run keeps them.
        total: the most that is held at a time, which is less than the sum.
    """

    phase: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    check: int
    other: int
    total: int


def memory_of(
    counts: Counts, path: Path, layers: Sequence[Layer], share: Share, processes: int, hardware: Hardware
) -> list[Held]:
    """The phases of a run in order: each form of the model that is much unlike the others, and its checks."""
    forms: dict[str, Ranks] = {}
    for name, ranks in (("at the start", path.stages[0].ranks), ("factors begin", path.at(path.begins or 0))):
        forms.setdefault(name, ranks)
    forms["at the end"] = path.stages[-1].ranks
    held = [_training(name, counts, ranks, layers, share, processes, hardware) for name, ranks in _distinct(forms)]
    if path.checks:
        watched = max(watched_bytes(section_of(counts), ranks, layers) for ranks in forms.values())
        held.insert(len(held) - 1 or 1, _check(held, counts, layers, processes, watched))
    return held


def _distinct(forms: dict[str, Ranks]) -> list[tuple[str, Ranks]]:
    found: list[tuple[str, Ranks]] = []
    for name, ranks in forms.items():
        if all(ranks != other for _, other in found):
            found.append((name, ranks))
    return found if len(found) > 1 else [("all the time", ranks) for _, ranks in found]


def probing_bytes(counts: Counts, ranks: Ranks, layers: Sequence[Layer], share: Share) -> int:
    """What is held in the step before a check of OIALR's, which computes with whole weights and keeps their gradients.

    The weights, made for the passes, are let go of as the gradients come.
    """
    section, itemsize = section_of(counts), max(4, counts.subject.dtype.itemsize)
    if not ranks or not isinstance(section, Oialr) or counts.subject.run.parallel.shard:
        return 0
    whole = sum(prod(layer.shape) for layer in layers if layer.name in ranks)
    dense = counts.traced({}, share.at_once)
    # at its peak a dense model has a gradient that is not counted as one yet
    return max(dense.saved, dense.activations - counts.sizes({}).largest) + itemsize * whole


def _training(
    name: str,
    counts: Counts,
    ranks: Ranks,
    layers: Sequence[Layer],
    share: Share,
    processes: int,
    hardware: Hardware,
) -> Held:
    sizes, traced = counts.sizes(ranks), counts.traced(ranks, share.at_once)
    train = counts.subject.run.train
    other = sample_bytes(counts.subject) * share.samples + (sizes.weight_bytes if train.ema is not None else 0)
    parts, gathered = _parts(counts, processes)
    weights, gradients, state = (-(-n // parts) for n in (sizes.weight_bytes, sizes.gradient_bytes, traced.optimizer))
    # on GPUs torch's optimisers treat all parameters at once, and hold an intermediate result of each
    updating = gradients if hardware.queues else traced.updating
    passing = traced.peak if processes == 1 and share.passes == 1 else gradients + traced.activations
    probing = probing_bytes(counts, ranks, layers, share)
    watched = watched_bytes(section_of(counts), ranks, layers)
    peak = max(passing, gradients + probing, gradients + updating)
    total = weights + state + other + gathered * sizes.largest + peak + watched
    return Held(name, weights, gradients, state, max(traced.activations, probing), watched, other, total)


def _check(held: Sequence[Held], counts: Counts, layers: Sequence[Layer], processes: int, watched: int) -> Held:
    """Gradients have been let go of, but for the buckets."""
    before = max(held, key=lambda one: one.weights + one.optimizer)
    check = check_bytes(layers, counts.subject.dtype.itemsize) + watched
    buckets = before.gradients if processes > 1 else 0
    total = before.weights + buckets + before.optimizer + before.other + check
    return Held("a check", before.weights, buckets, before.optimizer, 0, check, before.other, total)


def _parts(counts: Counts, processes: int) -> tuple[int, int]:
    """In how many parts the model is held, and how many of its largest weights are gathered at a time."""
    shared = counts.subject.run.parallel.shard and processes > 1
    return (processes, 2) if shared else (1, 0)


def section_of(counts: Counts) -> Section:
    """The method's section of the run file."""
    return cast(Section, counts.subject.run.method)
