"""What noise does to singular values: where they end, what stands out of them, how far it leans, what it should be.

A weight is taken as Y = X + Z, m×n: X of low rank, the entries of Z independent, of mean 0 and variance 1 (whoever
calls divides by the size of the noise). In the limit of large matrices a singular value x of X shows in Y as follows:

    noise alone        √long − √short  to  √long + √short              Marchenko and Pastur, 1967
    it is seen if      x⁴ > mn                                         Baik, Ben Arous and Péché, 2005
    then it is         y² = (x² + m)(x² + n) / x²                      Benaych-Georges and Nadakuditi, arXiv 1103.2221
    its vectors        ⟨u, û⟩² = (x⁴ − mn) / (x²(x² + m)), ⟨v, v̂⟩² = (x⁴ − mn) / (x²(x² + n))
    best for ‖·‖_F     η(y) = √((y² − m − n)² − 4mn) / y               Gavish and Donoho, arXiv 1405.7511

where short = min(m, n) and long = max(m, n). η(y) is x √(⟨u, û⟩² ⟨v, v̂⟩²): the part of û v̂ᵀ that is signal.
"""

import math
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

TRACY_WIDOM_95 = 0.9793
"""95 % quantile of the Tracy-Widom law for real matrices (β = 1)."""


def marchenko_pastur_median(aspect: float) -> float:
    """Return the median of the Marchenko-Pastur law of eigenvalues; see `marchenko_pastur_quantile`."""
    return marchenko_pastur_quantile(aspect, 0.5)


@lru_cache(maxsize=8192)
def marchenko_pastur_quantile(aspect: float, above: float) -> float:
    """Return the eigenvalue above which this share of the Marchenko-Pastur law lies.

    The law is that of Z Zᵀ / long for Z of shape (short, long) with entries of variance 1. With
    x(θ) = 1 + β + 2√β cos θ the mass above x(θ) has a closed form, which bisection inverts.

    Args:
        aspect: β = short / long, in (0, 1].
        above: between 0 and 1.
    """
    low, high = 0.0, math.pi
    for _ in range(60):
        middle = (low + high) / 2
        if _mass_above(middle, aspect) < above:
            low = middle
        else:
            high = middle
    return 1 + aspect + 2 * math.sqrt(aspect) * math.cos(low)


def noise_edge(shape: tuple[int, int]) -> float:
    """Return the 95 % quantile of the largest singular value of noise with variance 1.

    Args:
        shape: (m, n) of the matrix.
    """
    rows, columns = (math.sqrt(size - 0.5) for size in shape)
    centre = (rows + columns) ** 2
    scale = (rows + columns) * (1 / rows + 1 / columns) ** (1 / 3)
    return math.sqrt(centre + TRACY_WIDOM_95 * scale)


def noise_spectrum(shape: tuple[int, int], points: int) -> list[float]:
    """Return what singular values noise with variance 1 would have: those at `points` even places, descending.

    Place i of p stands for the share (i + ½) / p of the min(m, n) values, in the limit of large matrices.

    Args:
        shape: (m, n) of the matrix.
        points: how many.
    """
    short, long = min(shape), max(shape)
    shares = ((i + 0.5) / points for i in range(points))
    return [math.sqrt(long * max(0.0, marchenko_pastur_quantile(short / long, share))) for share in shares]


def optimal_threshold(aspect: float) -> float:
    """Return λ(β) of Gavish and Donoho, in units of noise · √long; 4/√3 for square matrices.

    Args:
        aspect: β = short / long, in (0, 1].
    """
    root = math.sqrt(aspect**2 + 14 * aspect + 1)
    return math.sqrt(2 * (aspect + 1) + 8 * aspect / (aspect + 1 + root))


def _mass_above(angle: float, aspect: float) -> float:
    """Return the Marchenko-Pastur mass above x(angle): ∫ (2/π) sin²θ / x(θ) dθ from 0 to `angle`."""
    r = math.sqrt(aspect)
    turn = math.atan2((1 - r) * math.sin(angle / 2), (1 + r) * math.cos(angle / 2))
    integral = (1 + aspect) * angle - 2 * (1 - aspect) * turn - 2 * r * math.sin(angle)
    return integral / (2 * math.pi * aspect)


class Outlier(NamedTuple):
    """How a singular value of the signal shows in a matrix with noise."""

    value: float  # the singular value that is seen; the edge of the bulk if it does not stand out
    left: float  # ⟨u, û⟩², between 0 (lost in the noise) and 1
    right: float  # ⟨v, v̂⟩²


def bulk(shape: tuple[int, int]) -> tuple[float, float]:
    """Return between which singular values noise of variance 1 lies, in the limit of large matrices.

    Args:
        shape: (m, n) of the matrix.
    """
    short, long = math.sqrt(min(shape)), math.sqrt(max(shape))
    return long - short, long + short


def detection_threshold(shape: tuple[int, int]) -> float:
    """Return the singular value of a signal below which no singular value stands out of noise of variance 1: (mn)^¼.

    Args:
        shape: (m, n) of the matrix.
    """
    return math.sqrt(math.sqrt(shape[0] * shape[1]))


def outlier(strength: float, shape: tuple[int, int]) -> Outlier:
    """Predict what becomes of a singular value of the signal under noise of variance 1.

    Args:
        strength: the singular value x of X, in units of the noise.
        shape: (m, n) of the matrix.
    """
    if strength <= detection_threshold(shape):
        return Outlier(bulk(shape)[1], 0.0, 0.0)
    (m, n), square = shape, strength**2
    common = square - m * n / square
    return Outlier(math.sqrt((square + m) * (square + n) / square), common / (square + m), common / (square + n))


def strength(value: float, shape: tuple[int, int]) -> float:
    """Return the singular value of the signal that shows as this one: the inverse of `outlier`; 0 within the bulk.

    Args:
        value: the singular value y that is seen, in units of the noise.
        shape: (m, n) of the matrix.
    """
    m, n = shape
    if value <= bulk(shape)[1]:
        return 0.0
    twice = value**2 - m - n
    return math.sqrt((twice + math.sqrt(twice**2 - 4 * m * n)) / 2)


def shrunk(singular_values: Tensor, shape: tuple[int, int], noise: float) -> Tensor:
    """Return the singular values that bring a noisy matrix closest to its signal in the Frobenius norm.

    Those within the bulk become 0. Without noise all stay as they are.

    Args:
        singular_values: any shape, of the noisy matrix.
        shape: (m, n) of the full matrix.
        noise: standard deviation of the noise; 0 for none.
    """
    lower, upper = (noise * edge for edge in bulk(shape))
    y = singular_values.double()
    # (y² − m − n)² − 4mn, as a product that loses no digits near the edge
    above = (y.square() - upper**2).clamp_min(0) * (y.square() - lower**2).clamp_min(0)
    return (above.sqrt() / y.clamp_min(upper or math.ulp(0.0))).to(singular_values.dtype)
