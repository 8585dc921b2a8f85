"""How long a process computes in a step: from a device's figures and what programs reach of them, or from measuring."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from hpclr.planning.counting import Share
from hpclr.planning.hardware import Hardware
from hpclr.planning.steps import Cluster, Reached, Work, step

# What programs reach, at best and at worst: assumed (docs/planning.md says from what).
ON_GPU = (Reached(0.6, 0.85, 0.9, 4.0, 4e-6), Reached(0.25, 0.6, 0.5, 8.0, 15e-6))
ON_CPU = (Reached(0.7, 0.8, 0.0, 4.0, 4e-6), Reached(0.25, 0.5, 0.0, 8.0, 20e-6))


@dataclass(frozen=True)
class Computing:
    """Seconds of a step without communication: passes, of which the backward pass, and the optimiser."""

    passes: float
    backward: float
    optimizer: float


class Pace(Protocol):
    """Says how long a process computes."""

    @property
    def reached(self) -> Reached:
        """What is assumed of the network."""

    def computing(self, work: Work, share: Share) -> Computing:
        """Of a step of this work."""


@dataclass(frozen=True)
class AssumedPace:
    """From a device's figures."""

    cluster: Cluster
    reached: Reached

    def computing(self, work: Work, share: Share) -> Computing:
        """As `hpclr.planning.steps.step` has it, on one process."""
        alone = step(work, 1, self.cluster, self.reached)
        backward = alone.products * (1 - work.forward / work.flops) + alone.elementwise / 2
        return Computing(alone.products + alone.elementwise + alone.calling, backward, alone.optimizer)


def assumed_paces(hardware: Hardware, precision: str) -> tuple[AssumedPace, AssumedPace]:
    """At best and at worst."""
    cluster = hardware.cluster(precision)
    best, worst = ON_GPU if hardware.queues else ON_CPU
    return AssumedPace(cluster, best), AssumedPace(cluster, worst)


@dataclass(frozen=True)
class Timed:
    """Seconds that were measured, of one form of the model.

    Attributes:
        flops: operations of a step.
        trained: parameters that are trained in it.
        passes: seconds of its forward and backward passes, the fastest and the slowest of the middle half.
        optimizer: seconds of the optimiser.
    """

    flops: float
    trained: float
    passes: tuple[float, float]
    optimizer: float


@dataclass(frozen=True)
class MeasuredPace:
    """From steps that were taken here.

    Between factors at their beginning and at their end, time goes with operations; with other parts of a batch, with
    samples.

    Attributes:
        share: the part of a batch that was measured.
        timed: "dense", and where there are factors "begin" and "end".
        slow: whether the slow end of the range is wanted.
        factor: what a step of a run may take of one that was measured.
        reached: what is assumed of the network.
    """

    share: Share
    timed: Mapping[str, Timed]
    slow: bool
    factor: float
    reached: Reached

    def computing(self, work: Work, share: Share) -> Computing:
        """Between what was measured."""
        dense = self.timed["dense"]
        is_dense = work.trained == dense.trained
        begin, end = (dense if is_dense else self.timed.get(name, dense) for name in ("begin", "end"))
        samples = share.samples / self.share.samples
        place = self._place(work.flops / samples, begin.flops, end.flops)
        first, last = (one.passes[self.slow] for one in (begin, end))
        passes = (last + place * (first - last)) * samples * self.factor
        optimizer = (end.optimizer + place * (begin.optimizer - end.optimizer)) * self.factor
        return Computing(passes, passes * (1 - work.forward / work.flops), optimizer)

    @staticmethod
    def _place(flops: float, begin: float, end: float) -> float:
        """1 for the operations at the beginning, 0 for those at the end."""
        return 1.0 if begin == end else min(1.0, max(0.0, (flops - end) / (begin - end)))
