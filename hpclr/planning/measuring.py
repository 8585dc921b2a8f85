"""A few real steps on this machine: of the dense model, and with factors as they begin and as they end."""

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import cast

import torch
from torch import nn

from hpclr.config.schema import Section
from hpclr.data import Batch
from hpclr.errors import UsageError
from hpclr.methods.oialr import OIALR
from hpclr.planning.checking import CheckPace, CheckRange, operations
from hpclr.planning.counting import Counts, Share
from hpclr.planning.forms import Layer, Ranks, formed
from hpclr.planning.pace import MeasuredPace, Timed
from hpclr.planning.ranks import Path
from hpclr.planning.steps import Reached
from hpclr.planning.subject import copied
from hpclr.training.assembly import held_out
from hpclr.training.environment import choose_device, seed_everything, use_threads
from hpclr.training.memory import PeakMemory
from hpclr.training.optimizers import optimizer_of
from hpclr.training.precision import Precision

WARM, MOST, SECONDS = 3, 20, 8.0  # steps before those that count, steps that count, and how long they may take
# What a step of a run takes of one that is measured so: clocks and neighbours differ; a run reads data, keeps records,
# looks at the clock. On two busy cores runs have taken 1.2 to 1.3 times as long (docs/planning.md).
FACTORS = 0.85, 1.35
# Two layers stand for all. In six runs checks took 0.6 to 2.3 times what follows from them (docs/planning.md).
CHECK_FACTORS = 0.5, 2.5
_CHECKS = 5  # that are made of each
_SMALLEST = 4, 4


@dataclass(frozen=True)
class Measured:
    """What was found here.

    Attributes:
        device: what on.
        data: "the run's data" or "random numbers".
        share: the part of a batch.
        timed: by form.
        check: how fast a layer is examined.
        peak: bytes, as `hpclr.training.memory` measures them, in the dense form.
        peak_of: which memory that is.
    """

    device: str
    data: str
    share: Share
    timed: dict[str, Timed]
    check: CheckRange
    peak: int
    peak_of: str

    def paces(self, reached: Sequence[Reached]) -> tuple[MeasuredPace, MeasuredPace]:
        """At best and at worst; the network is still assumed."""
        best, worst = reached
        return tuple(  # type: ignore[return-value]
            MeasuredPace(self.share, self.timed, slow, FACTORS[slow], one)
            for slow, one in ((False, best), (True, worst))
        )


def measured(counts: Counts, layers: Sequence[Layer], path: Path, share: Share) -> Measured:
    """Trains for some seconds, in vain.

    Args:
        counts: of the model.
        layers: that the method may convert.
        path: of their ranks.
        share: the part of a batch that a process has.

    Raises:
        UsageError: if the device is not there, or too small.
    """
    run = counts.subject.run
    try:
        device = choose_device(run.train.device)
    except ValueError as error:
        raise UsageError(f"train.{error}") from None
    use_threads(run.train.threads)
    seed_everything(run.train.seed)
    batch, data = _batch(counts, share, device)
    memory = PeakMemory(device)
    forms: dict[str, Ranks] = {"dense": {}}
    if path.begins is not None:
        forms |= {"begin": path.at(path.begins), "end": path.stages[-1].ranks}
    timed, peak = {}, 0
    try:
        for name, form in forms.items():
            timed[name] = _timed(counts, form, share, batch, device)
            peak = peak or memory.bytes()
    except torch.cuda.OutOfMemoryError as error:
        raise UsageError(
            f"--measure: {share.at_once} samples at once do not fit on {_name(device)} ({error}); measure with more "
            "nodes, or a smaller train.micro_batch"
        ) from None
    return Measured(
        _name(device), data, share, timed, _check_range(layers, device, counts.subject.dtype), peak, memory.of
    )


def _batch(counts: Counts, share: Share, device: torch.device) -> tuple[Batch, str]:
    """The first samples of the run's data, or random numbers in their place."""
    subject = counts.subject
    if subject.dataset is None:
        return _random(subject.batch(share.at_once), subject.samples.outputs).to(device), "random numbers"
    loader = held_out(subject.run, subject.dataset, "train", subject.dtype)
    piece = next(loader.batch(0, 0).split(share.at_once))
    times = -(-share.at_once // len(piece.y))
    x, y = (tensor.repeat(times, *(1,) * (tensor.ndim - 1))[: share.at_once] for tensor in (piece.x, piece.y))
    return Batch(x, y, torch.arange(len(y))).to(device), "the run's data"


def _random(batch: Batch, outputs: tuple[int, ...]) -> Batch:
    for tensor in (batch.x, batch.y):
        if tensor.is_floating_point():
            tensor.normal_()
        else:
            tensor.random_(0, outputs[-1])
    return batch


def _timed(counts: Counts, ranks: Ranks, share: Share, batch: Batch, device: torch.device) -> Timed:
    subject, section = counts.subject, cast(Section, counts.subject.run.method)
    form = formed(counts.model, section, ranks)
    model = copied(form, partial(_filled, device=device)).train()
    optimizer, precision = optimizer_of(subject.run, model), Precision(subject.run.train.precision, device)

    def passes() -> None:
        for _ in range(share.passes):
            with precision.context():
                loss = subject.loss(model, batch)
            precision.backward(loss / share.passes)

    def update() -> None:
        precision.step(optimizer)
        optimizer.zero_grad(set_to_none=True)

    spent = _times((passes, update), device)
    low, _, high = quantiles(spent[0], n=4)
    work = counts.work(ranks, share)
    return Timed(work.flops, work.trained, (low, high), quantiles(spent[1], n=2)[0])


def _filled(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Small numbers; the time of an operation does not depend on what they are."""
    made = torch.zeros_like(tensor, device=device)
    return made.normal_(std=0.02) if made.is_floating_point() else made


def _times(parts: Sequence[Callable[[], None]], device: torch.device) -> list[list[float]]:
    """Seconds of each part, in turn, of a few steps."""
    found: list[list[float]] = [[] for _ in parts]
    began = time.monotonic()
    for number in range(WARM + MOST):
        for part, times in zip(parts, found, strict=True):
            start = _now(device)
            part()
            times.append(_now(device) - start)
        if number >= WARM + 2 and time.monotonic() - began > SECONDS:
            break
    return [times[WARM:] for times in found]


def _now(device: torch.device) -> float:
    """When all is done that the device has been told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _check_range(layers: Sequence[Layer], device: torch.device, dtype: torch.dtype) -> CheckRange:
    """From a layer of middling cost, and from one so small that only what every layer takes is left."""
    if not layers:
        return CheckRange(CheckPace(1.0, 0.0), CheckPace(1.0, 0.0), measured=True)
    shape = sorted((layer.shape for layer in layers), key=lambda shape: operations(*shape))[len(layers) // 2]
    each, whole = (_examined(*one, device, dtype) for one in (_SMALLEST, shape))
    rate = operations(*shape) / max(whole - each, whole / 10)
    fast, slow = (CheckPace(rate / factor, each * factor) for factor in CHECK_FACTORS)
    return CheckRange(slow, fast, measured=True)


def _examined(m: int, n: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of a check of OIALR's of a dense m×n matrix, as it is before the conversion; the middle of a few."""
    model = nn.Sequential(nn.Linear(n, m, bias=False, device=device, dtype=dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    method = OIALR(model, optimizer, delay=2 * _CHECKS, every=1, max_aspect=math.inf, keep_last=False)
    spent = []
    for _ in range(1 + _CHECKS):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        start = _now(device)
        method.step()
        spent.append(_now(device) - start)
    return median(spent[1:])


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"this machine's CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
