"""Rank rules: from the singular values of a weight to the number of them worth keeping.

A rule is any callable `(singular values, shape) -> rank`. The rules here are frozen dataclasses:
they compare, print and pickle as values, draw no random numbers, and count in float64 whatever the
dtype of the model. `rank_rule` makes one from what stands in a run file.

Two kinds. The *relative* rules (`RelativeCutoff`, `Energy`, `SumProportion`, `StableRank`) look at
the shape of the spectrum only: multiplying the weight by a number changes nothing. The *noise*
rules (`MarchenkoPastur`, `GavishDonoho`) ask which singular values a matrix of pure noise could not
have produced; they need the size of the noise, or estimate it from the median singular value.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hpclr.lowrank.noise import marchenko_pastur_median, noise_edge, optimal_threshold


class RankRule(Protocol):
    """How many of a weight's singular values to keep."""

    def __call__(self, singular_values: Tensor, shape: tuple[int, int]) -> int:
        """Return the rank, between 0 and k; whoever calls applies a floor of its own.

        Args:
            singular_values: shape (k,), descending. A layer that has been cut before has fewer
                than min(m, n): those that are missing count as zeros.
            shape: (m, n) of the full matrix.

        Raises:
            ValueError: the values are not a spectrum (NaN, negative, out of order, too many).
        """
        ...


@dataclass(frozen=True)
class RelativeCutoff:
    """Keep σ_i ≥ cutoff · σ_1, the rule of OIALR (arXiv 2401.08505), whose β the cutoff is."""

    cutoff: float

    def __post_init__(self) -> None:
        """Check the range, 0 < cutoff < 1."""
        _check_number("RelativeCutoff: cutoff", self.cutoff, "above 0 and below 1", math.nextafter(1, 0))

    def __call__(self, singular_values: Tensor, shape: tuple[int, int]) -> int:
        """Count the singular values at or above the cutoff."""
        spectrum = _positive_spectrum(singular_values, shape)
        return int((spectrum >= self.cutoff * spectrum[:1]).sum())


@dataclass(frozen=True)
class Energy:
    """Keep the fewest singular values whose squares sum to `share` of the total ‖W‖_F²."""

    share: float

    def __post_init__(self) -> None:
        """Check the range, 0 < share ≤ 1."""
        _check_number("Energy: share", self.share, "above 0 and at most 1", 1)

    def __call__(self, singular_values: Tensor, shape: tuple[int, int]) -> int:
        """Return the length of the shortest prefix with that share; 1.0 keeps all but zeros."""
        spectrum = _rescaled(_positive_spectrum(singular_values, shape))
        return _shortest_prefix(spectrum.square(), self.share)


@dataclass(frozen=True)
class SumProportion:
    """Keep the fewest singular values that sum to `share` of their total, as SARA (arXiv 2408.03290)."""

    share: float

    def __post_init__(self) -> None:
        """Check the range, 0 < share ≤ 1."""
        _check_number("SumProportion: share", self.share, "above 0 and at most 1", 1)

    def __call__(self, singular_values: Tensor, shape: tuple[int, int]) -> int:
        """Return the length of the shortest prefix with that share; 1.0 keeps all but zeros."""
        return _shortest_prefix(_rescaled(_positive_spectrum(singular_values, shape)), self.share)


@dataclass(frozen=True)
class StableRank:
    """Keep ⌈scale · ‖W‖_F² / ‖W‖₂²⌉, as Cuttlefish (MLSys 2023).

    Cuttlefish takes for `scale` the ratio of full to stable rank at initialisation.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the range, scale > 0."""
        _check_number("StableRank: scale", self.scale, "above 0 and finite")

    def __call__(self, singular_values: Tensor, shape: tuple[int, int]) -> int:
        """Return the scaled stable rank, rounded up."""
        spectrum = _rescaled(_positive_spectrum(singular_values, shape))
        if not len(spectrum):
            return 0
        wanted = self.scale * float(spectrum.square().sum() / spectrum[0].square())
        # Singular values come from float32 as a rule: r equal ones must give r, not r + 1.
        return min(len(spectrum), math.ceil(wanted * (1 - 1e-6)))


@dataclass(frozen=True)
class MarchenkoPastur:
    """Keep what lies above the largest singular value that noise alone would have.

    The edge is noise · (√m + √n), sharpened for finite sizes by the Tracy-Widom law in Ma's form
    (Bernoulli 18, 2012): a matrix of pure noise keeps nothing in 95 of 100 cases.
    `noise` is the standard deviation of the entries; None estimates it with `noise_level`.
    """

    noise: float | None = None

    def __post_init__(self) -> None:
        """Check the range, noise > 0."""
        _check_noise("MarchenkoPastur", self.noise)

    def __call__(self, singular_values: Tensor, shape: tuple[int, int]) -> int:
        """Count the singular values above the edge of the noise."""
        spectrum = _positive_spectrum(singular_values, shape)
        noise = _noise_level(spectrum, shape) if self.noise is None else self.noise
        return int((spectrum > noise * noise_edge(shape)).sum())


@dataclass(frozen=True)
class GavishDonoho:
    """Keep what lies above the optimal hard threshold of Gavish and Donoho (arXiv 1305.5870).

    Optimal for the Frobenius error of the kept part; stricter than the edge of the noise, since a
    direction barely above it is mostly noise. `noise` is as in `MarchenkoPastur`.
    """

    noise: float | None = None

    def __post_init__(self) -> None:
        """Check the range, noise > 0."""
        _check_noise("GavishDonoho", self.noise)

    def __call__(self, singular_values: Tensor, shape: tuple[int, int]) -> int:
        """Count the singular values above the threshold."""
        spectrum = _positive_spectrum(singular_values, shape)
        noise = _noise_level(spectrum, shape) if self.noise is None else self.noise
        threshold = optimal_threshold(min(shape) / max(shape)) * math.sqrt(max(shape))
        return int((spectrum > noise * threshold).sum())


_RULES: dict[str, type[Any]] = {
    "relative": RelativeCutoff,
    "energy": Energy,
    "sum_proportion": SumProportion,
    "stable_rank": StableRank,
    "marchenko_pastur": MarchenkoPastur,
    "gavish_donoho": GavishDonoho,
}


def rank_rule(spec: float | Mapping[str, Any] | RankRule) -> RankRule:
    """Return the rule that `spec` stands for.

    Args:
        spec: a number (the cutoff of `RelativeCutoff`), a mapping such as
            `{"rule": "energy", "share": 0.99}`, or a rule, which passes through.

    Raises:
        ValueError: unknown rule, unknown or missing option, number out of its range.
        TypeError: `spec` is none of the three.
    """
    if isinstance(spec, Mapping):
        return _rule_from_mapping(spec)
    if isinstance(spec, (int, float)) and not isinstance(spec, bool):
        return RelativeCutoff(float(spec))
    if callable(spec) and not isinstance(spec, type):
        return spec
    raise TypeError(
        f"A rank rule is a number (the relative cutoff), a mapping such as "
        f"{{'rule': 'energy', 'share': 0.99}} with one of the rules {', '.join(_RULES)}, or a callable "
        f"(singular values, shape) -> rank; found {spec!r}."
    )


def label_of(rule: RankRule) -> str:
    """Return a rule as few words: its name in a run file and its numbers; of one that is not ours, its own words."""
    name = next((name for name, kind in _RULES.items() if type(rule) is kind), None)
    if name is None:
        return str(rule)
    numbers = (getattr(rule, field.name) for field in fields(_RULES[name]))
    return " ".join([name, *(f"{number:g}" for number in numbers if number is not None)])


def noise_level(singular_values: Tensor, shape: tuple[int, int]) -> float:
    """Estimate the standard deviation of the noise in a weight from its median singular value.

    The singular values of pure noise follow the Marchenko-Pastur law; a signal of low rank hardly
    moves their median. Values missing from a spectrum that was cut count as zeros: exact while
    fewer than half are missing, as those were the smallest. From half on nothing is known about
    the noise, and the estimate is smaller than the truth: half of the smallest value just there,
    0.0 beyond, where the rules that use it cut nothing. A layer that is cut step by step wants the
    noise of its full spectrum, handed to the rule as `noise`.

    Args:
        singular_values: shape (k,), descending.
        shape: (m, n) of the full matrix.
    """
    return _noise_level(_positive_spectrum(singular_values, shape), shape)


def noise_judged_by(rule: MarchenkoPastur | GavishDonoho, singular_values: Tensor, shape: tuple[int, int]) -> float:
    """Return the noise that a rule takes this spectrum to hold: its own or, if it has none, the estimate."""
    return noise_level(singular_values, shape) if rule.noise is None else rule.noise


def noise_estimated_by(rule: RankRule, singular_values: Tensor, shape: tuple[int, int]) -> float | None:
    """Return the noise that a rule would estimate from this spectrum; None if it estimates none, or finds none."""
    if not isinstance(rule, MarchenkoPastur | GavishDonoho) or rule.noise is not None:
        return None
    return noise_level(singular_values, shape) or None


def with_noise(rule: RankRule, noise: float | None) -> RankRule:
    """Return a rule that estimates the noise with this noise instead; other rules, and None, as they are."""
    if noise is None or not isinstance(rule, MarchenkoPastur | GavishDonoho) or rule.noise is not None:
        return rule
    return replace(rule, noise=noise)


def _noise_level(spectrum: Tensor, shape: tuple[int, int]) -> float:
    """Do `noise_level` on a spectrum that has been checked."""
    short, long = min(shape), max(shape)
    full = torch.zeros(short, dtype=torch.float64)
    full[: len(spectrum)] = spectrum
    return float(full.quantile(0.5)) / math.sqrt(long * marchenko_pastur_median(short / long))


def _shortest_prefix(parts: Tensor, share: float) -> int:
    """Return how many of the leading `parts` (all positive) it takes to reach `share` of their sum."""
    if share == 1 or not len(parts):
        return len(parts)
    sums = parts.cumsum(0)
    return 1 + int((sums < share * sums[-1]).sum())


def _rescaled(spectrum: Tensor) -> Tensor:
    """Bring the largest value near 1 by a power of two: exact, and squares cannot overflow."""
    if not len(spectrum):
        return spectrum
    _, exponent = math.frexp(float(spectrum[0]))
    return spectrum * math.ldexp(1.0, -max(exponent, -1000))


def _positive_spectrum(singular_values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the singular values above zero in float64 on the CPU, once they are what they should be."""
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"The shape of a weight is (rows, columns), each at least 1; found {tuple(shape)}.")
    if singular_values.ndim != 1 or len(singular_values) > min(shape):
        raise ValueError(
            f"A weight of shape {tuple(shape)} has at most {min(shape)} singular values in one dimension; "
            f"found a tensor of shape {tuple(singular_values.shape)}."
        )
    spectrum = singular_values.detach().cpu().double()
    if not bool(spectrum.isfinite().all()):
        raise ValueError(
            f"The singular values of a weight of shape {tuple(shape)} hold "
            f"{int((~spectrum.isfinite()).sum())} NaN or infinite values of {len(spectrum)}: "
            f"the weight itself does, or its decomposition failed."
        )
    if bool((spectrum < 0).any()) or bool((spectrum.diff() > 0).any()):
        raise ValueError(
            f"The singular values of a weight of shape {tuple(shape)} must descend and not be negative; "
            f"found values between {float(spectrum.min()):g} and {float(spectrum.max()):g}, "
            f"the first {float(spectrum[0]):g} and the last {float(spectrum[-1]):g}."
        )
    return spectrum[spectrum > 0]


def _rule_from_mapping(spec: Mapping[str, Any]) -> RankRule:
    """Make the rule that the mapping names under `rule` from its other keys."""
    options = dict(spec)
    name = options.pop("rule", None)
    if not isinstance(name, str) or name not in _RULES:
        raise ValueError(f"Unknown rank rule {name!r}: 'rule' must be one of {', '.join(_RULES)}.")
    known = [field.name for field in fields(_RULES[name])]
    needed = [field.name for field in fields(_RULES[name]) if field.default is MISSING]
    if not set(needed) <= options.keys() <= set(known):
        raise ValueError(
            f"The rank rule '{name}' takes {', '.join(known)} ({'required' if needed else 'optional'}); "
            f"found {', '.join(map(str, options)) or 'nothing'}."
        )
    rule: RankRule = _RULES[name](**options)
    return rule


def _check_noise(rule: str, noise: float | None) -> None:
    """Refuse a noise that is neither None nor a positive number."""
    if noise is not None:
        _check_number(f"{rule}: noise", noise, "above 0 and finite, or None to estimate it")


def _check_number(what: str, value: object, expected: str, highest: float = math.inf) -> None:
    """Refuse `value` unless it is a finite number with 0 < value ≤ highest."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what} must be a number {expected}, found {value!r}.")
    if not (0 < value <= highest and math.isfinite(value)):
        raise ValueError(f"{what} must be a number {expected}, found {value!r}.")
