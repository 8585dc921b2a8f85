"""Numbers in a dozen characters, as means with what they vary by."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

NONE = "–"
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def mean_and_spread(values: Sequence[float | None]) -> tuple[float, float | None] | None:
    """Mean and standard deviation of those that are known; None where there is nothing to take it of."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return fmean(known), stdev(known) if len(known) > 1 else None


def points(mean: float, spread: float | None) -> str:
    """A share in per cent; what it varies by in points."""
    return _together(100 * mean, spread and 100 * spread, 2)


def short(mean: float, spread: float | None) -> str:
    """Four digits, with the prefix of a unit: "14.02±0.53k"."""
    power = min(max(_exponent(mean), 0) // 3, len(_PREFIXES) - 1)
    scale = 1000**power
    whole = power == 0 and float(mean).is_integer() and not spread
    return (
        _together(mean / scale, spread and spread / scale, 0 if whole else _decimals(mean / scale)) + _PREFIXES[power]
    )


def digits(mean: float, spread: float | None) -> str:
    """Four digits; three of what is below one."""
    return _together(mean, spread, _decimals(mean))


def _together(mean: float, spread: float | None, decimals: int) -> str:
    """A spread that would be shown as nothing is not shown."""
    text = f"{mean:.{decimals}f}"
    varies = f"{spread or 0:.{decimals}f}"
    return text if float(varies) == 0 else f"{text}±{varies}"


def _decimals(value: float) -> int:
    return min(max(3 - _exponent(value), 0), 3 if abs(value) >= 0.1 else 4)


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0
