"""What a check asks of a matrix, at the least cost: polar factor, rank, decomposition.

All of it follows from the Gram matrix G = WᵀW of the smaller side (of Wᵀ for a wide W): G = V diag(s²) Vᵀ, the polar
factor is W G^(-½), and U = W V diag(s)⁻¹. In float64 that loses half of the digits, and leaves as many as float32 has.
So for weights in float32 or less

    singular values   |s − s_exact| ≤ 10⁻⁷ σ₁, for the exact ones being those of the weight as it is stored
    polar factor      ‖(P − U Vᵀ) on the directions with σ ≥ max(m, n)·2⁻²³·σ₁‖₂ ≤ 10⁻⁶ + 0.08/max(m, n)²: in each of
                      them 5·2⁻⁵²·(σ₁/σ)², beside rounding; the rest is rounding to float32
    decomposition     ‖W − U diag(s) Vᵀ‖₂ ≤ 10⁻⁷ σ₁, ‖UᵀU − I‖₂ and ‖VᵀV − I‖₂ ≤ 10⁻⁸

which are the bounds that the tests hold it to. For float64 weights half of the digits is too few: those are decomposed.

G^(-½) comes from the eigenvectors of G or, on GPUs, from products alone. An eigensolver takes as long as seven products
of its size on a processor (768×768, LAPACK, measured) and as long as hundreds on a GPU (reckoned, not measured: most of
it is matrix-vector products, one after the other); products alone give the polar factor in some forty-five, and the
rank by a relative cutoff in fifty more.
"""

from functools import lru_cache
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from hpclr.lowrank.factors import SVD, finite, negligible, polar, svd, tall
from hpclr.lowrank.ranks import RankRule, RelativeCutoff, noise_estimated_by

_PRODUCTS_ON = ("cuda",)  # types of devices
_NO_CONVERGENCE = torch.linalg.LinAlgError  # type: ignore[attr-defined]
_ON_HOST = 256  # columns up to which LAPACK is faster than a GPU's eigensolver, transfers included (reckoned)
_WELL_APART = 1e-3  # of σ₁, from which W v / s are orthonormal to 10⁻⁸ as they are: the error is about 5·2⁻⁵²·(σ₁/s)²
_BLOCK = 64 << 20  # bytes of the rows in float64 that are multiplied at a time
_CONVERGED = 1e-6  # how far from 1 the iteration leaves the singular values that it was made for
_RESOLUTION = 1e-4  # how close to a cutoff, relatively, a singular value may lie on the other side of it


class Measured(NamedTuple):
    """What a check wants to know of a matrix (m×n)."""

    polar: Tensor  # P = U Vᵀ, m×n, in the working precision
    rank: int | None  # what the rule keeps; None if no rule was given
    noise: float | None  # the noise that the rule estimates, if it does


def measure(matrix: Tensor, rule: RankRule | None) -> Measured:
    """The polar factor and the rank, without singular vectors.

    Which algorithm is used is a function of type and device. On a GPU singular values within a share of 10⁻⁴ of the
    cutoff of `RelativeCutoff` may count as above or below it, and directions beneath rounding to float32 have less than
    their whole weight in P instead of none.

    Args:
        matrix: m×n, any floating-point type.
        rule: says how many of the singular values are to be kept; None: the rank is not wanted.

    Raises:
        FactorizationError: if the matrix has infinite or NaN entries or no algorithm converges.
    """
    if matrix.dtype == torch.float64:
        return measured_in(svd(matrix), rule)
    shape = (matrix.shape[0], matrix.shape[1])
    work = tall(finite(matrix, "polar factor")).double()
    gram, small = work.mT @ work, negligible(shape, torch.float32)
    try:
        if matrix.device.type in _PRODUCTS_ON:
            root, judged = inverse_root(gram, small), _judged_by_products(gram, rule, shape)
        else:
            s, v = _spectrum(gram)
            root, judged = (v * torch.where(s > small * s[0], 1 / s, 0)) @ v.mT, _judged(s, rule, shape)
    except _NO_CONVERGENCE:
        return measured_in(svd(matrix), rule)
    found = (work @ root).float()
    return Measured(found if shape[0] >= shape[1] else found.mT.contiguous(), *judged)


def measured_in(basis: SVD, rule: RankRule | None) -> Measured:
    """The same from a decomposition, whose precision says what is rounding."""
    return Measured(polar(basis), *_judged(basis.s, rule, (basis.u.shape[0], basis.vh.shape[1])))


def decompose(matrix: Tensor) -> SVD:
    """Thin singular value decomposition in float64, through the Gram matrix.

    Singular values below 10⁻⁸ σ₁ are noise; their vectors are orthonormal to the others nonetheless.

    Args:
        matrix: m×n, any floating-point type; float64 takes the ordinary way, as `hpclr.lowrank.factors.svd`.

    Raises:
        FactorizationError: if the matrix has infinite or NaN entries or no algorithm converges.
    """
    if matrix.dtype == torch.float64:
        return svd(matrix)
    work = tall(finite(matrix, "SVD")).double()
    try:
        s, v = _spectrum(work.mT @ work)
    except _NO_CONVERGENCE:
        return svd(matrix.double())
    scaled = work @ v
    u = scaled / s if s[-1] > _WELL_APART * s[0] else _orthonormal(scaled)
    return SVD(u, s, v.mT) if matrix.shape[0] >= matrix.shape[1] else SVD(v, s, u.mT)


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values, descending, in float64 on the host.

    Of a matrix in float32 or less they come from the Gram matrix, which is summed up from blocks of rows: the memory
    taken is that of the Gram matrix, and a few times `_BLOCK` bytes, however long the matrix is.

    Args:
        matrix: m×n, any floating-point type.

    Raises:
        FactorizationError: if the matrix has infinite or NaN entries or no algorithm converges.
    """
    if matrix.dtype == torch.float64:
        return svd(matrix).s.cpu()
    work = tall(matrix.detach())
    gram = torch.zeros(work.shape[1], work.shape[1], dtype=torch.float64, device=work.device)
    for rows in work.split(max(1, _BLOCK // (8 * work.shape[1]))):
        block = finite(rows, "singular values").double()
        gram.addmm_(block.mT, block)
    try:
        return _roots(torch.linalg.eigvalsh(_where_it_is_fast(gram))).cpu()
    except _NO_CONVERGENCE:
        return svd(matrix.double()).s.cpu()


def core_of(u: Tensor, core: Tensor, vh: Tensor) -> Tensor:
    """A k×k matrix with the singular values of a factored weight.

    Args:
        u: m×k.
        core: Σ (k×k), of orthonormal u and vh; or its diagonal (k), of a weight all of whose factors are trained, which
            need not be orthonormal.
        vh: k×n.
    """
    if core.ndim == 2:
        return core
    left, right = (torch.linalg.qr(factor.double(), mode="r").R for factor in (u * core, vh.mT))
    product: Tensor = left @ right.mT
    return product


def effective_rank(s: Tensor) -> float:
    """exp(−Σ p_i ln p_i) with p_i = σ_i / Σ σ, of Roy and Vetterli (EUSIPCO 2007); 0.0 if all are zero.

    Args:
        s: singular values (k).
    """
    p = s[s > 0].double()
    p = p / p.sum()
    return float(torch.exp(-(p * p.log()).sum())) if len(p) else 0.0


def _spectrum(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, descending, and right singular vectors (n×n) from G = WᵀW."""
    squares, v = torch.linalg.eigh(_where_it_is_fast(gram))
    return _roots(squares).to(gram.device), v.flip(1).to(gram.device)


def _roots(squares: Tensor) -> Tensor:
    """Singular values, descending, from eigenvalues, ascending."""
    return squares.flip(0).clamp_min(0).sqrt()


def _where_it_is_fast(gram: Tensor) -> Tensor:
    return gram.cpu() if gram.is_cuda and gram.shape[0] <= _ON_HOST else gram


def _orthonormal(columns: Tensor) -> Tensor:
    """Columns that are orthogonal but for rounding, longest first, made orthonormal; ones without length completed."""
    q, r = torch.linalg.qr(columns)
    signs = torch.copysign(torch.ones_like(r.diagonal()), r.diagonal())
    return torch.mul(q, signs)


def _judged(s: Tensor, rule: RankRule | None, shape: tuple[int, int]) -> tuple[int | None, float | None]:
    return (None, None) if rule is None else (rule(s, shape), noise_estimated_by(rule, s, shape))


def _judged_by_products(gram: Tensor, rule: RankRule | None, shape: tuple[int, int]) -> tuple[int | None, float | None]:
    if isinstance(rule, RelativeCutoff):
        return count_above(gram, rule.cutoff), None
    return (
        (None, None) if rule is None else _judged(_roots(torch.linalg.eigvalsh(_where_it_is_fast(gram))), rule, shape)
    )


# --- products only ---------------------------------------------------------------------------------------------------


def inverse_root(gram: Tensor, floor: float) -> Tensor:
    """About G^(-½), so that W G^(-½) is the polar factor of W, by a scaled Newton-Schulz iteration.

    Each step multiplies W by a polynomial in WᵀW that brings all singular values in [low, 1] closer to 1, the best of
    degree 3 for that interval: x → ½ax(3 − a²x²) with a² = 3/(1 + low + low²) (Chen and Chow, "A stable scaling of
    Newton-Schulz for improving the sign function computation of a Hermitian matrix", 2014; the case d = 3 of the Polar
    Express, Amsel et al., arXiv 2505.16932, whose appendix F is the iteration on the Gram matrix). W itself takes part
    in none of the steps, of which three n×n products are each.

    Args:
        gram: G = WᵀW, n×n, float64.
        floor: singular values down to this share of the largest come out right; smaller ones are damped.
    """
    n, doublings = gram.shape[0], 3
    bound = largest(gram, doublings)
    root, g = torch.eye(n, dtype=gram.dtype, device=gram.device) * bound.rsqrt(), gram / bound
    for a in _steps(floor * n ** (-(0.5 ** (doublings + 2)))):
        linear, cubic = 1.5 * a, -0.5 * a**3
        root = torch.addmm(root, root, g, beta=linear, alpha=cubic)
        half = torch.addmm(g, g, g, beta=linear, alpha=cubic)
        g = torch.addmm(half, half, g, beta=linear, alpha=cubic)
    return root


def count_above(gram: Tensor, cutoff: float) -> int:
    """How many singular values of W are at least cutoff·σ₁: from the trace of the sign of G − (cutoff·σ₁)² I.

    The sign of a symmetric matrix is its polar factor, and comes by the iteration of `inverse_root`.

    Args:
        gram: G = WᵀW, n×n, float64.
        cutoff: above 0 and below 1.
    """
    n = gram.shape[0]
    x = gram / largest(gram, 16) - cutoff**2 * torch.eye(n, dtype=gram.dtype, device=gram.device)
    for a in _steps(2 * cutoff**2 * _RESOLUTION):
        x = torch.addmm(x, x, x @ x, beta=1.5 * a, alpha=-0.5 * a**3)
    return round((n + float(x.trace())) / 2)


def largest(gram: Tensor, doublings: int) -> Tensor:
    """A bound on the largest eigenvalue of G: λ₁ ≤ ‖G^q‖_F^(1/q) ≤ n^(1/2q) λ₁ with q = 2^doublings; 0-dimensional.

    Of the zero matrix it is 1.
    """
    power, bound = gram, torch.ones((), dtype=gram.dtype, device=gram.device)
    for i in range(doublings + 1):
        power = power @ power if i else power
        norm = torch.linalg.matrix_norm(power)
        norm = torch.where(norm > 0, norm, 1)
        power, bound = power / norm, bound * norm ** (0.5**i)
    return bound


@lru_cache(maxsize=256)
def _steps(low: float) -> tuple[float, ...]:
    """The scalings a of the Newton-Schulz steps that bring [low, 1] to within `_CONVERGED` of 1."""
    steps = []
    while 1 - low > _CONVERGED:
        a = sqrt(3 / (1 + low + low**2))
        steps.append(a)
        low = a * low * (3 - a**2 * low**2) / 2
    return tuple(steps)
