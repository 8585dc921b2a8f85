"""Singular value decompositions, polar factors and the stability of a basis.

Everything here is a function of matrices; nothing knows of layers.
Sizes: a matrix W is m×n, its rank is k, and W = U diag(s) Vᵀ.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_NO_CONVERGENCE = torch.linalg.LinAlgError  # type: ignore[attr-defined]


class FactorizationError(ValueError):
    """A matrix could not be decomposed: it is not finite, or the SVD did not converge."""


class LowRankWarning(UserWarning):
    """Something about a low-rank model that its owner should know, such as optimiser state that was reset."""


class SVD(NamedTuple):
    """The thin decomposition `W = u @ diag(s) @ vh`."""

    u: Tensor  # m×k, orthonormal columns
    s: Tensor  # k, descending, non-negative
    vh: Tensor  # k×n, orthonormal rows

    def leading(self, k: int) -> "SVD":
        """The part with the k largest singular values."""
        return SVD(self.u[:, :k], self.s[:k], self.vh[:k])

    def to(self, dtype: torch.dtype) -> "SVD":
        """The same in another precision."""
        return SVD(*(part.to(dtype) for part in self))


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which matrices of `dtype` are decomposed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def svd(matrix: Tensor) -> SVD:
    """Thin singular value decomposition in at least float32.

    Args:
        matrix: m×n, any floating-point type.

    Returns:
        u (m×k), s (k), vh (k×n) with k = min(m, n), in the working precision, on the matrix's device.

    Raises:
        FactorizationError: if the matrix has infinite or NaN entries or no algorithm converges.
    """
    work = finite(matrix, "SVD").to(working_dtype(matrix.dtype))
    try:
        return SVD(*torch.linalg.svd(work, full_matrices=False))
    except _NO_CONVERGENCE:
        return _svd_of_last_resort(work)


def _svd_of_last_resort(work: Tensor) -> SVD:
    """Float64 on the CPU converges for some matrices for which the quick way does not."""
    try:
        u, s, vh = torch.linalg.svd(work.to("cpu", torch.float64), full_matrices=False)
    except _NO_CONVERGENCE as error:
        raise FactorizationError(f"the SVD of a {_size(work)} matrix did not converge: {error}") from error
    return SVD(u.to(work), s.to(work), vh.to(work))


def finite(matrix: Tensor, lacks: str) -> Tensor:
    """The matrix without its history; a FactorizationError with what it lacks if it has infinite or NaN entries."""
    if not torch.isfinite(matrix).all():
        raise FactorizationError(f"a {_size(matrix)} matrix has entries that are not finite; it has no {lacks}")
    return matrix.detach()


def _size(matrix: Tensor) -> str:
    return "×".join(str(length) for length in matrix.shape)


def tall(matrix: Tensor) -> Tensor:
    """W or Wᵀ, whichever has at least as many rows as columns."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT


def stable_rank(matrix: Tensor) -> float:
    """‖W‖²_F / σ₁² of a matrix W (m×n), between 1 and min(m, n); 0.0 if it is zero.

    Raises:
        FactorizationError: if it has infinite or NaN entries or no algorithm finds its singular values.
    """
    work = tall(finite(matrix, "stable rank")).double()
    work = work / work.abs().amax().clamp_min(torch.finfo(work.dtype).tiny)  # or else squares of float64 might overflow
    gram = work.mT @ work
    try:
        largest = torch.linalg.eigvalsh(gram)[-1]
    except _NO_CONVERGENCE:
        largest = _svd_of_last_resort(work).s[0].square()
    return float(gram.trace() / largest) if largest > 0 else 0.0


def negligible(shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """The share of the largest singular value up to which others are rounding: max(m, n)·eps."""
    return max(shape) * torch.finfo(dtype).eps


def numerical_rank(s: Tensor, shape: tuple[int, int]) -> int:
    """How many singular values stand above rounding: s_i > max(m, n)·eps·s_1."""
    if s.numel() == 0:
        return 0
    return int((s > negligible(shape, s.dtype) * s[0]).sum())


def polar(decomposition: SVD) -> Tensor:
    """The polar factor P = U Vᵀ (m×n), the orthogonal basis whose settling OIALR watches.

    Directions whose singular value is zero within rounding are left out: they are not unique.
    """
    u, s, vh = decomposition
    k = numerical_rank(s, (u.shape[0], vh.shape[1]))
    return u[:, :k] @ vh[:k]


def alignment(p: Tensor, q: Tensor) -> float:
    """Normalised Frobenius product ⟨P, Q⟩ / (‖P‖ ‖Q‖); 0 if either is zero.

    For polar factors of full rank this equals the paper's mean column-wise cosine similarity
    (arXiv 2401.08505, the stability metric), and it stays defined when their ranks differ.
    """
    norms = torch.linalg.vector_norm(p) * torch.linalg.vector_norm(q)
    if norms == 0:
        return 0.0
    return float((p * q).sum() / norms)


def stability(before: Tensor, after: Tensor) -> float:
    """How much of its orthogonal basis U Vᵀ a weight has kept between two moments.

    Args:
        before: m×n (convolutions: already seen as a matrix).
        after: m×n, the same weight later.

    Returns:
        1.0 if the basis is the same, near 0.0 for unrelated matrices. Changing singular values
        alone does not change it.

    Raises:
        ValueError: if the two differ in shape or are not matrices.
        FactorizationError: if either has no SVD.
    """
    if before.ndim != 2 or before.shape != after.shape:
        raise ValueError(f"stability compares two matrices of one shape, found {_size(before)} and {_size(after)}")
    return alignment(polar(svd(before)), polar(svd(after)))
