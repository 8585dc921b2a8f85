"""A plan: everything that is known or assumed of a run before it is submitted."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hpclr.config.schema import Section
from hpclr.planning.checking import CheckPace, CheckRange, examiners, remembered_bytes
from hpclr.planning.counting import Counts, Share, share_of
from hpclr.planning.forms import Layer, Ranks, highest_paying
from hpclr.planning.hardware import Hardware
from hpclr.planning.memory import Held, memory_of, section_of
from hpclr.planning.pace import Pace
from hpclr.planning.ranks import Path
from hpclr.planning.steps import Work, exposed_seconds

JOULES = 3.6e6  # of a kWh
# A device draws half to all of what it is made for; what else is in its node a fifth to four fifths on top of that.
_DRAWN = (0.5 * 1.2, 1.0 * 1.8)


@dataclass(frozen=True)
class Range:
    """Between what and what a number lies."""

    low: float
    high: float


@dataclass(frozen=True)
class Phase:
    """A stretch of the run: its first step, its parameters, the bytes that a step reduces, its operations."""

    first: int
    rank_share: float | None
    trained: int
    stored: int
    gradient_bytes: int
    flops: float


@dataclass(frozen=True)
class Shape:
    """Layers of one shape, how many there are, and the highest rank for which factors pay."""

    shape: tuple[int, int]
    layers: int
    pays_up_to: int


@dataclass(frozen=True)
class Row:
    """A number of nodes.

    Attributes:
        nodes, processes: how many.
        samples: that each process has in a step.
        impossible: why it cannot be, else None, and what follows is None.
        start, end, dense: seconds of a step at the start, at the end, and with dense weights.
        waits: share of a step at the end that waits for the network; likewise with dense weights.
        checks: seconds of all checks together.
        total, dense_total: seconds of the run, and with dense weights.
        energy, dense_energy: kWh, likewise.
        break_even: step from which on the run has taken less time than a dense one; None where that does not happen.
        memory: of a process, phase by phase.
        remembered: bytes of bases in a process's host memory, at most.
    """

    nodes: int
    processes: int
    samples: float
    impossible: str | None = None
    start: Range | None = None
    end: Range | None = None
    dense: Range | None = None
    waits: Range | None = None
    dense_waits: Range | None = None
    checks: Range | None = None
    total: Range | None = None
    dense_total: Range | None = None
    energy: Range | None = None
    dense_energy: Range | None = None
    break_even: tuple[int | None, int | None] = (None, None)
    memory: tuple[Held, ...] = ()
    remembered: int = 0


@dataclass(frozen=True)
class Plan:
    """What is known and assumed of a run."""

    name: str
    method: str
    steps: int
    dense_parameters: int
    hardware: Hardware
    path: Path
    phases: tuple[Phase, ...]
    shapes: tuple[Shape, ...]
    rows: tuple[Row, ...]
    flops: float
    dense_flops: float


@dataclass(frozen=True)
class Means:
    """What a plan is made with.

    Attributes:
        counts: of the model.
        layers: that the method may convert.
        path: of their ranks.
        hardware: where it is to run.
        paces: how fast, at best and at worst.
        check: how fast checks are.
    """

    counts: Counts
    layers: Sequence[Layer]
    path: Path
    hardware: Hardware
    paces: tuple[Pace, Pace]
    check: CheckRange


def plan_of(means: Means, nodes: Sequence[int]) -> Plan:
    """Everything, for each number of nodes."""
    counts, run = means.counts, means.counts.subject.run
    rows = tuple(_row(means, number) for number in nodes)
    share = next((share_of(counts.subject, row.processes) for row in rows if row.impossible is None), Share(1, 1))
    whole = run.data.batch_size / share.samples
    phases = tuple(_phase(means, stage.first, stage.ranks, share, whole) for stage in means.path.stages)
    dense = counts.work({}, share)
    full = counts.subject.seen / (counts.subject.steps * run.data.batch_size)
    spans = [full * (stage.last - stage.first) for stage in means.path.stages]
    return Plan(
        name=run.name,
        method=run.method.name,
        steps=counts.subject.steps,
        dense_parameters=counts.sizes({}).stored,
        hardware=means.hardware,
        path=means.path,
        phases=phases,
        shapes=_shapes(section_of(counts), means.layers),
        rows=rows,
        flops=sum(span * phase.flops for span, phase in zip(spans, phases, strict=True)),
        dense_flops=dense.flops * whole * full * counts.subject.steps,
    )


def _phase(means: Means, first: int, ranks: Ranks, share: Share, whole: float) -> Phase:
    sizes, work = means.counts.sizes(ranks), means.counts.work(ranks, share)
    shares = [ranks[layer.name] / layer.full for layer in means.layers if layer.name in ranks]
    mean = sum(shares) / len(shares) if shares else None
    return Phase(first, mean, sizes.trained, sizes.stored, sizes.gradient_bytes, work.flops * whole)


def _shapes(section: Section, layers: Sequence[Layer]) -> tuple[Shape, ...]:
    alike: dict[tuple[tuple[int, int], int, int | None], list[Layer]] = {}
    for layer in layers:
        alike.setdefault((layer.shape, layer.groups, layer.positions), []).append(layer)
    return tuple(Shape(same[0].shape, len(same), highest_paying(section, same[0])) for same in alike.values())


def _row(means: Means, nodes: int) -> Row:
    processes, batch = nodes * means.hardware.per_node, means.counts.subject.run.data.batch_size
    if batch % processes:
        reason = f"data.batch_size {batch} cannot be shared equally by {processes} processes"
        return Row(nodes, processes, batch / processes, reason)
    share = share_of(means.counts.subject, processes)
    # first, as it traces the forms from which the counts of calls are taken
    memory = memory_of(means.counts, means.path, means.layers, share, processes, means.hardware)
    fast, slow = means.paces
    best = _course(means, fast, means.check.fast, share, processes)
    worst = _course(means, slow, means.check.slow, share, processes)
    total, dense_total = _range(best.total, worst.total), _range(best.dense_total, worst.dense_total)
    watts = means.hardware.watts * processes
    return Row(
        nodes=nodes,
        processes=processes,
        samples=share.samples,
        start=_range(best.start, worst.start),
        end=_range(best.end, worst.end),
        dense=_range(best.dense, worst.dense),
        waits=_range(best.waits, worst.waits),
        dense_waits=_range(best.dense_waits, worst.dense_waits),
        checks=_range(best.checks, worst.checks),
        total=total,
        dense_total=dense_total,
        energy=_energy(total, watts),
        dense_energy=_energy(dense_total, watts),
        break_even=(best.break_even, worst.break_even),
        memory=tuple(memory),
        remembered=_remembered(means, processes),
    )


def _range(one: float, other: float) -> Range:
    """Shares of time may be greater at the faster pace."""
    return Range(min(one, other), max(one, other))


def _energy(seconds: Range, watts: float) -> Range:
    """kWh of devices that are made for so many watts, with the rest of their nodes."""
    low, high = _DRAWN
    return Range(seconds.low * watts * low / JOULES, seconds.high * watts * high / JOULES)


def _remembered(means: Means, processes: int) -> int:
    """Bytes of bases that a process remembers: those of the layers that it examines."""
    section = section_of(means.counts)
    of_all = remembered_bytes(section, means.layers, means.counts.subject.dtype.itemsize)
    return round(of_all / examiners(section, processes))


@dataclass(frozen=True)
class _Course:
    """A run at one pace; seconds."""

    start: float
    end: float
    dense: float
    waits: float
    dense_waits: float
    checks: float
    total: float
    dense_total: float
    break_even: int | None


def _course(means: Means, pace: Pace, checking: CheckPace, share: Share, processes: int) -> _Course:
    """The run at a pace, and its checks at another."""
    counts, path = means.counts, means.path
    steps = [_step(means, pace, stage.ranks, share, processes) for stage in path.stages]
    dense, dense_waits = _step(means, pace, {}, share, processes)
    checks = _checks(means, checking, processes)
    seconds = [one for one, _ in steps]
    total = sum((s.last - s.first) * one for s, one in zip(path.stages, seconds, strict=True)) + sum(checks.values())
    return _Course(
        start=seconds[0],
        end=seconds[-1],
        dense=dense,
        waits=steps[-1][1] / seconds[-1],
        dense_waits=dense_waits / dense,
        checks=sum(checks.values()),
        total=total,
        dense_total=dense * counts.subject.steps,
        break_even=break_even(path, seconds, checks, dense),
    )


def _checks(means: Means, pace: CheckPace, processes: int) -> dict[int, float]:
    """Step → seconds of the check after it."""
    sharing = examiners(section_of(means.counts), processes)
    before = {stage.first: pace.seconds(means.layers, stage.ranks) / sharing for stage in means.path.stages}
    dense = pace.seconds(means.layers, {}) / sharing
    return {step: before[means.path.stage(step - 1).first] if step else dense for step in means.path.checks}


def _step(means: Means, pace: Pace, ranks: Ranks, share: Share, processes: int) -> tuple[float, float]:
    """Seconds of a step, and how many of them wait for the network."""
    work = means.counts.work(ranks, share)
    computing = pace.computing(work, share)
    cluster = means.hardware.cluster(means.counts.subject.run.train.precision)
    # only the last of several passes adds gradients up
    backward = computing.backward / share.passes
    reduced = _moved(means, work)
    waits = exposed_seconds(reduced, processes, cluster, pace.reached, backward)
    shared = means.counts.subject.run.parallel.shard
    return computing.passes + computing.optimizer / (processes if shared else 1) + waits, waits


def _moved(means: Means, work: Work) -> float:
    """Bytes of an all-reduce as long as what a step sends; shared-out weights are gathered twice, half as far each."""
    if not means.counts.subject.run.parallel.shard:
        return work.gradient_bytes
    return work.gradient_bytes / 2 + work.stored * means.counts.subject.dtype.itemsize


def break_even(path: Path, seconds: Sequence[float], checks: dict[int, float], dense: float) -> int | None:
    """The first step with factors from which on a run has always taken less time than a dense one.

    Args:
        path: its stages.
        seconds: of a step in each of them.
        checks: step → seconds of the check after it.
        dense: seconds of a dense step.

    Returns:
        The step; None if the run is at no such step at its end.
    """
    if path.begins is None:
        return None
    moments = sorted({*checks, *(s.first for s in path.stages), path.stages[-1].last})
    lead, since = -checks.get(0, 0.0), None  # seconds that a dense run would be behind
    pace = {stage.first: one for stage, one in zip(path.stages, seconds, strict=True)}
    gain = 0.0
    for first, last in pairwise([0, *[m for m in moments if m > 0]]):
        gain = dense - pace[first] if first in pace else gain
        after = lead + gain * (last - first)
        since = _since(since, first, lead, after, gain)
        lead = after - checks.get(last, 0.0)
        since = since if lead > 0 else None
    return None if since is None else max(since, path.begins)


def _since(since: int | None, first: int, lead: float, after: float, gain: float) -> int | None:
    """Where a lead begins that is there at the end of a stretch."""
    if after <= 0:
        return None
    if since is not None and lead > 0:
        return since
    return first if lead > 0 else first + round(-lead / gain)
