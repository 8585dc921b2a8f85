"""Reduced-rank regression from streamed moments, and decompositions of weights in the metric of their inputs.

    B = C_yx (C_xx + λI)⁻¹                the linear map with the least mean square error, with a ridge λ
    B (C_xx + λI)^½ = U diag(s) Vᵀ        orders its directions by what they explain of y
    B_r = U_r U_rᵀ B                      the best map of rank r; its error is that of B plus Σ_{i>r} s_i²

Moments are centred, so that the maps are affine: y ≈ B_r (x − x̄) + ȳ. Sources: Izenman, "Reduced-rank regression for
the multivariate linear model", J. Multivariate Analysis 5, 1975; Bunea, She and Wegkamp, arXiv 1004.2995, for the rank.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from hpclr.lowrank.factors import SVD, finite, negligible, svd
from hpclr.lowrank.noise import noise_edge

_NO_RIDGE = "ridge must be a number of at least 0, a share of the inputs' mean variance; found {!r}"


class Moments:
    """The first and second moments of pairs (x, y), summed up batch by batch in float64.

    Memory: one matrix of (n + m)² numbers. Sums are taken about the mean of the first batch, so that inputs far from
    zero lose no digits.

    Attributes:
        rows: pairs seen.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._n = 0
        self._about = self._first = self._second = torch.zeros(0, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Takes pairs.

        Args:
            x: inputs (r×n), r at least 1.
            y: what is to be told from them (r×m).

        Raises:
            ValueError: if they do not fit one another, or those before them.
        """
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or not len(x):
            raise ValueError(f"moments take r×n and r×m of one r ≥ 1, found {tuple(x.shape)} and {tuple(y.shape)}")
        pairs = torch.cat([x.detach().double(), y.detach().double().to(x.device)], 1)
        if not self.rows:
            self._begin(x.shape[1], pairs)
        if x.shape[1] != self._n or pairs.shape[1] != len(self._about):
            before = f"r×{self._n} and r×{len(self._about) - self._n}"
            raise ValueError(f"moments have taken {before} before, found {tuple(x.shape)} and {tuple(y.shape)}")
        pairs -= self._about
        self._first += pairs.sum(0)
        self._second.addmm_(pairs.mT, pairs)
        self.rows += len(pairs)

    def _begin(self, n: int, pairs: Tensor) -> None:
        self._n, self._about = n, pairs.mean(0)
        self._first = torch.zeros_like(self._about)
        self._second = pairs.new_zeros(pairs.shape[1], pairs.shape[1])

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """x̄ (n) and ȳ (m)."""
        mean = self._about + self._first / self.rows
        return mean[: self._n], mean[self._n :]

    @property
    def covariances(self) -> tuple[Tensor, Tensor, Tensor]:
        """C_xx (n×n), C_yx (m×n) and C_yy (m×m), over the number of pairs."""
        shift, n = self._first / self.rows, self._n
        second = self._second / self.rows - torch.outer(shift, shift)
        return second[:n, :n], second[n:, :n], second[n:, n:]


@dataclass(frozen=True)
class LinearFit:
    """The best linear map of its rank, for every rank.

    Attributes:
        weight: B (m×n), float64.
        basis: U (m×k), s (k) and Vᵀ (k×n) of B (C_xx + λI)^½; k directions explain anything at all.
        x_mean: x̄ (n).
        y_mean: ȳ (m).
        errors: E‖y − ŷ‖² over the pairs seen, summed over the outputs, of ranks 0 to k (k + 1); that of rank 0 is the
            variance of y.
        rows: pairs seen.
        inputs: directions in which the inputs vary, at most n.
    """

    weight: Tensor
    basis: SVD
    x_mean: Tensor
    y_mean: Tensor
    errors: Tensor
    rows: int
    inputs: int

    @property
    def rank(self) -> int:
        """k, the most that a map can use."""
        return len(self.basis.s)

    @cached_property
    def noise(self) -> float | None:
        """Standard deviation of what no linear map explains, an output; None with too few pairs to tell."""
        free = self.rows - self.inputs - 1
        if free < 1:
            return None
        return sqrt(max(0.0, float(self.errors[-1])) * self.rows / (free * len(self.y_mean)))

    @cached_property
    def edge(self) -> float | None:
        """The largest s that outputs without relation to the inputs would give, at 95 %; None as for `noise`."""
        if self.noise is None or not self.inputs:
            return None
        return self.noise * noise_edge((len(self.y_mean), self.inputs)) / sqrt(self.rows)

    @property
    def proposed_rank(self) -> int:
        """How many directions stand out of the noise; all of them where that cannot be told."""
        return self.rank if self.edge is None else int((self.basis.s > self.edge).sum())

    def explained(self, rank: int | None = None) -> float:
        """The share of the variance of y that a map of this rank explains, R²; None: of the highest."""
        total = float(self.errors[0])
        return 1 - float(self.errors[-1 if rank is None else rank]) / total if total else 0.0

    def encoder(self, rank: int) -> tuple[Tensor, Tensor]:
        """A (r×n) and D (m×r) with B_r = D A: A = S_r^(-½) U_rᵀ B, D = U_r S_r^½, as alike in size as can be.

        Raises:
            ValueError: for a rank below 1 or above `rank`.
        """
        if not 1 <= rank <= self.rank:
            raise ValueError(f"the rank of a linear map must be from 1 to {self.rank} here, found {rank}")
        u, s, _ = self.basis.leading(rank)
        return (u.mT @ self.weight) / s.sqrt()[:, None], u * s.sqrt()

    def leading(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best map of a rank: its weight B_r (m×n) and its bias ȳ − B_r x̄ (m).

        Raises:
            ValueError: for a rank below 1 or above `rank`.
        """
        encode, decode = self.encoder(rank)
        weight = decode @ encode
        return weight, self.y_mean - weight @ self.x_mean

    def scaled(self, factor: float) -> "LinearFit":
        """The map whose outputs are `factor` times as large; `errors` remain those of this one."""
        basis = self.basis._replace(s=self.basis.s * factor)
        return replace(self, weight=self.weight * factor, basis=basis, y_mean=self.y_mean * factor)


def fit_linear(moments: Moments, ridge: float = 0.0) -> LinearFit:
    """The linear maps that fit best.

    Args:
        moments: of at least one pair.
        ridge: λ, as a share of the mean variance of the inputs; 0: the pseudo-inverse.

    Raises:
        ValueError: for moments of nothing, or a ridge below 0.
        FactorizationError: if there was anything infinite or NaN in the pairs.
    """
    if not moments.rows:
        raise ValueError("a linear fit needs at least one pair (x, y), found none")
    if not ridge >= 0:
        raise ValueError(_NO_RIDGE.format(ridge))
    cxx, cyx, cyy = moments.covariances
    squares, q = torch.linalg.eigh(finite(cxx, "linear fit"))
    seen = squares > negligible(tuple(cxx.shape), cxx.dtype) * squares[-1].clamp_min(0)
    q, squares = q[:, seen], squares[seen] + ridge * float(cxx.trace()) / len(cxx)
    onto = cyx @ q / squares.sqrt()
    u, s, v = svd(onto) if onto.shape[1] else svd(onto.new_zeros(len(cyy), 1))
    k = int((s > negligible(tuple(onto.shape), onto.dtype) * s[0]).sum())
    weight = onto / squares.sqrt() @ q.mT
    basis = SVD(u[:, :k], s[:k], (v @ q.mT)[:k] if onto.shape[1] else onto.new_zeros(0, len(cxx)))
    return LinearFit(
        weight, basis, *moments.means, _errors(basis.u, weight, moments.covariances), moments.rows, int(seen.sum())
    )


def _errors(u: Tensor, weight: Tensor, covariances: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """E‖y − U_r U_rᵀ B x‖² of ranks 0 to k."""
    cxx, cyx, cyy = covariances
    onto = u.mT @ weight
    gains = 2 * ((onto @ cyx.mT) * u.mT).sum(1) - ((onto @ cxx) * onto).sum(1)
    return cyy.trace() - torch.cat([gains.new_zeros(1), gains.cumsum(0)])


@torch.no_grad()
def decompose_in(weight: Tensor, moment: Tensor) -> SVD:
    """The singular value decomposition of W C^½, which orders directions by what they do to the outputs.

    The best rank-k weight for inputs of second moment C is W_k = U_k U_kᵀ W, with U_k the first k columns of `u`: there
    E‖(W − W_k) x‖² = Σ_{i>k} s_i² is least. That needs no inverse of C, which may be singular.

    Args:
        weight: W (m×n).
        moment: C = E[x xᵀ] (n×n), as `hpclr.lowrank.activations.input_moments` finds it.

    Returns:
        u (m×k), s (k) and vh (k×n) with k = min(m, n), in float64, on the device of C.

    Raises:
        FactorizationError: if either has infinite or NaN entries.
        ValueError: if they do not fit.
    """
    _check_pair(weight, moment)
    squares, q = torch.linalg.eigh(finite(moment, "square root").double())
    wide = weight.detach().to(moment.device, torch.float64)
    u, s, v = svd(wide @ q * squares.clamp_min(0).sqrt())
    return SVD(u, s, v @ q.mT)


class OutputOrder(NamedTuple):
    """The directions of a weight in the order of what they do to outputs.

    Attributes:
        u: U (m×r) of W C^½ = U S Vᵀ, r = min(m, n), orthonormal.
        s: S, descending: E‖(W − U_k U_kᵀ W) x‖² is the sum of the squares behind the first k.
    """

    u: Tensor
    s: Tensor

    def cut(self, weight: Tensor, rank: int) -> SVD:
        """The singular value decomposition of W_k = U_k U_kᵀ W, of all weights of rank k the one that errs least.

        Args:
            weight: W (m×n).
            rank: k.
        """
        u = self.u[:, :rank]
        left, s, vh = svd(u.mT @ weight.detach().to(u))
        return SVD(u @ left, s, vh)


@torch.no_grad()
def order_by_output(weight: Tensor, moment: Tensor) -> OutputOrder:
    """As `decompose_in`, by the eigenvectors of a matrix of the smaller side alone.

    These are of W C Wᵀ, or for a tall W = Q R of R C Rᵀ. In float64 values below 10⁻⁸ of the largest are lost so.

    Args:
        weight: W (m×n).
        moment: C = E[x xᵀ] (n×n).

    Raises:
        FactorizationError: if either has infinite or NaN entries.
        ValueError: if they do not fit.
    """
    _check_pair(weight, moment)
    wide, base = finite(weight, "order of outputs").detach().to(moment.device, torch.float64), None
    if wide.shape[0] > wide.shape[1]:
        base, wide = torch.linalg.qr(wide)
    squares, vectors = torch.linalg.eigh(finite(wide @ moment.double() @ wide.mT, "order of outputs"))
    u = vectors.flip(1)
    return OutputOrder(u if base is None else base @ u, squares.flip(0).clamp_min(0).sqrt())


def _check_pair(weight: Tensor, moment: Tensor) -> None:
    if weight.ndim != 2 or moment.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"a weight m×n and the second moment n×n of its inputs belong together, found {tuple(weight.shape)} and "
            f"{tuple(moment.shape)}"
        )


def nearest_in(weight: Tensor, moment: Tensor, rank: int) -> Tensor:
    """W_k (m×n, float64), of all weights of rank k the one with the least error in the outputs: see `decompose_in`."""
    u = decompose_in(weight, moment).u[:, :rank]
    best: Tensor = u @ (u.mT @ weight.detach().to(u))
    return best
