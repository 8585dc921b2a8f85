"""Penalties: for orthogonal factors and sparse singular values, and for small products.

The former are those of SVD training (Yang et al., arXiv 2004.09031), the latter is Frobenius decay (Khodak et al.,
arXiv 2105.01029). All are finite and have finite slopes everywhere, at s = 0 too: |s| has slope 0 there, a subgradient,
by which a singular value that has become zero stays until the loss wants it back. Nothing takes a root of a singular
value.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def not_orthonormal(rows: Tensor) -> Tensor:
    """‖M Mᵀ − I‖²_F / r² for r rows: 0 if they are orthonormal.

    The factors of a weight have no more directions r than entries in each, so that this Gram matrix is the smaller one.
    """
    r = rows.shape[0]
    return (rows @ rows.mT - torch.eye(r, dtype=rows.dtype, device=rows.device)).square().sum() / r**2


def squared_norm(a: Tensor, b: Tensor) -> Tensor:
    """‖A B‖²_F of A (m×k) and B (k×n) as tr(AᵀA BBᵀ): k²(m + n) multiplications in place of the product's kmn."""
    return ((a.mT @ a) * (b @ b.mT)).sum()


def l1(s: Tensor) -> Tensor:
    """‖s‖₁: shrinks all singular values alike."""
    return s.abs().sum()


def hoyer(s: Tensor) -> Tensor:
    """‖s‖₁ / ‖s‖₂ − 1: 0 for a single value, √r − 1 for r equal ones, the same for any multiple of s."""
    return (_ratio(s) - 1).clamp_min(0)


def hoyer_square(s: Tensor) -> Tensor:
    """‖s‖₁² / ‖s‖₂² − 1: 0 for a single value, r − 1 for r equal ones, the same for any multiple of s."""
    return (_ratio(s).square() - 1).clamp_min(0)


def none(s: Tensor) -> Tensor:
    """0."""
    return s.new_zeros(())


REGULARIZERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "hoyer": hoyer,
    "hoyer_square": hoyer_square,
    "l1": l1,
    "none": none,
}


def _ratio(s: Tensor) -> Tensor:
    """‖s‖₁ / ‖s‖₂, whose slope grows as 1/‖s‖₂; the denominator stays where that comes to the type's precision.

    At s = 0 the ratio is 0, and its slope finite.
    """
    ratio: Tensor = s.abs().sum() / torch.linalg.vector_norm(s).clamp_min(torch.finfo(s.dtype).eps)
    return ratio
