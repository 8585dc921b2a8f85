"""When things are due, in exact arithmetic."""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from numbers import Real


def is_number(value: object) -> bool:
    """Whether it is a real number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def exact(number: float) -> Fraction:
    """The simple fraction that a decimal number stands for: 0.1 is 1/10, 0.3333333333333333 is 1/3."""
    return Fraction(number).limit_denominator(10**6) or Fraction(number)


def in_steps(name: str, value: float | None, total_steps: int | None) -> int:
    """A number of steps, given as such or (below 1) as a fraction of the run.

    Raises:
        ValueError: if it is no number, negative, not whole, or a fraction of a run of unknown length.
    """
    if value is None or not is_number(value) or not value >= 0 or (value >= 1 and value % 1 != 0):
        raise ValueError(f"{name} must be a whole number of steps or a fraction of the run below 1, found {value!r}")
    if value >= 1 or value == 0:
        return int(value)
    if total_steps is None:
        raise ValueError(f"{name}={value} is a fraction of the run, whose length is not known; pass total_steps= too")
    return max(1, round(exact(value) * total_steps))


@dataclass(frozen=True)
class CheckSchedule:
    """The checks at delay + j·every: measuring only for j < 0, conversion at j = 0, ranks for j ≥ 1.

    Attributes:
        delay: optimiser steps of full-rank training.
        every: optimiser steps between checks.
        layer_fraction: ℓ, the share of the layers that each further check covers, last layers first.
    """

    delay: int
    every: int
    layer_fraction: float

    def latest(self, steps: int) -> int:
        """The index j of the last check due after this many steps; its time may lie before the first step."""
        return floor(Fraction(steps - self.delay, self.every))

    def is_due(self, steps: int) -> bool:
        """Whether a check falls on this very step."""
        return (steps - self.delay) % self.every == 0

    def covered(self, j: int, layers: int) -> int:
        """How many of the last layers check j covers: min(L, ⌈j·ℓ·L⌉)."""
        return min(layers, max(0, ceil(j * exact(self.layer_fraction) * layers)))
