"""Axes: from values to points of a picture, ticks at round numbers, and how those are written."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_MOST_LINEAR = 50  # positive values that differ by more than this factor are drawn on a logarithmic axis
_AROUND_ONE = 0.05  # of a single value is shown below and above it: an accuracy of 97 % needs no axis to 146 %


@dataclass(frozen=True)
class Axis:
    """What stands for the values from `low` to `high`, on `begin` to `end` of a picture.

    Attributes:
        low: value at `begin`.
        high: value at `end`.
        begin: coordinate, in units of the picture.
        end: likewise; less than `begin` for an axis that goes up.
        logarithmic: whether equal distances are equal factors.
        whole: whether only whole numbers are values, such as steps.
    """

    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool = False
    whole: bool = False

    def at(self, value: float) -> float:
        """Where a value is."""
        low, high, value = (math.log10(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return self.begin + (value - low) / (high - low) * (self.end - self.begin)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values in the range, at most so many."""
        if self.logarithmic and math.log10(self.high / self.low) >= 1:
            return _powers(self.low, self.high, most)
        return _round_values(self.low, self.high, most, self.whole)


def axis_over(
    values: Iterable[float],
    begin: float,
    end: float,
    *,
    may_be_logarithmic: bool = False,
    from_zero: bool = False,
    margin: float = 0.0,
    whole: bool = False,
) -> Axis:
    """An axis on which all values are.

    Args:
        values: zero, or of a size from 1e-100 to 1e100.
        begin: coordinate of the lowest.
        end: of the highest.
        may_be_logarithmic: take logarithms if the values are positive and differ by orders of magnitude.
        from_zero: begin at zero if the axis is linear and no value is less.
        margin: room at both ends, as a share of the range.
        whole: as `Axis.whole`.
    """
    values = list(values)
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if may_be_logarithmic and low > 0 and high / low > _MOST_LINEAR:
        room = (high / low) ** margin
        return Axis(low / room, high * room, begin, end, logarithmic=True)
    if from_zero and low >= 0:
        low = 0.0
    if high <= low:  # a single value stands in the middle
        half = _AROUND_ONE * abs(low) or 0.5
        low, high = (low, high + half) if from_zero and low >= 0 else (low - half, high + half)
    room = margin * (high - low)
    return Axis(low if from_zero and low == 0 else low - room, high + room, begin, end, whole=whole)


def compact(value: float) -> str:
    """A number in few characters: 0.01, 250, 1.5k, 20M."""
    size = abs(value)
    if 0 < size < 1e-3 or size >= 1e18:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for unit, letter in _UNITS:
        if size >= unit * 0.9995:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def percent(value: float) -> str:
    """A share as per cent."""
    return f"{100 * value:.4g}%"


def _round_values(low: float, high: float, most: int, whole: bool) -> list[float]:
    step = _round_step(max(1.0, (high - low) / most) if whole else (high - low) / most, whole)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _round_step(least: float, whole: bool) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that is not less, and is whole where it has to be."""
    power = 10.0 ** math.floor(math.log10(least))
    steps = [power * factor for factor in (1, 2, 2.5, 5)]
    found = (step for step in steps if step >= least * (1 - 1e-9) and (step.is_integer() or not whole))
    return next(found, power * 10)


def _powers(low: float, high: float, most: int) -> list[float]:
    """Powers of ten, and what is between them where there is room."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**power for power in range(first, last + 1) for f in factors]
        inside = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(inside) <= most:
            return inside
    return inside[:: -(-len(inside) // most)]
