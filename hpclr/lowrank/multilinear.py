"""Tensors with noise: what their unfoldings show, the multilinear rank, truncated MLSVD and HOOI.

A tensor T of dimensions n₁ … n_d is taken as P + noise·Z: P of low multilinear rank (r₁, …, r_d), the entries of Z
independent, of mean 0 and variance 1 (Lebeau, Chatelain and Couillet, arXiv 2402.03169). Its unfolding of mode ℓ is a
matrix n_ℓ × m_ℓ, m_ℓ = Πn / n_ℓ. The squares of its singular values, centred and scaled,

    e = (s² / noise² − m_ℓ) / √Πn

follow, without signal, a semicircle on [−2, 2] once m_ℓ is much larger than n_ℓ. A direction of strength x in P has the
signal-to-noise ratio ρ = x² / (noise² √Πn) in this mode, whatever its length. It is seen if ρ > 1; then, a = n_ℓ / m_ℓ,

    e = ρ + 1/ρ + √a        ⟨u, û⟩² = (1 − ρ⁻²) / (1 + √a / ρ)

with a → 0 in the paper's limit. The terms in a are those of the Marchenko-Pastur law (`hpclr.lowrank.noise`) for the
unfolding, so that these hold for a finite long side, and for matrices.
"""

from collections.abc import Iterable, Mapping
from math import prod, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from hpclr.lowrank.factors import working_dtype
from hpclr.lowrank.ranks import MarchenkoPastur, RankRule
from hpclr.lowrank.spectra import decompose, singular_values

_NOISE_EDGE = MarchenkoPastur()


class Spike(NamedTuple):
    """How a direction of the signal shows in the unfolding of one mode."""

    eigenvalue: float  # e, centred and scaled; the edge if it does not stand out
    alignment: float  # ⟨u, û⟩², between 0 (lost in the noise) and 1


class Tucker(NamedTuple):
    """A tensor as a small core, multiplied in some modes by factors."""

    core: Tensor  # as the tensor, but r_ℓ in place of n_ℓ in the modes that have a factor
    factors: dict[int, Tensor]  # mode ℓ → n_ℓ×r_ℓ, orthonormal columns

    def dense(self) -> Tensor:
        """The whole tensor."""
        return _multiplied(self.core, self.factors)

    @property
    def ranks(self) -> dict[int, int]:
        """Mode → r_ℓ."""
        return {mode: factor.shape[1] for mode, factor in self.factors.items()}


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """The n_ℓ × (Πn / n_ℓ) matrix whose rows belong to the indices of a mode."""
    return tensor.movedim(mode, 0).flatten(1)


def centred_spectrum(tensor: Tensor, mode: int, noise: float) -> Tensor:
    """The values e of one mode, descending, in float64 on the host; min(n_ℓ, m_ℓ) of them.

    Args:
        tensor: any shape.
        mode: which unfolding.
        noise: standard deviation of the noise in its entries.

    Raises:
        FactorizationError: if the tensor has infinite or NaN entries.
    """
    matrix = unfold(tensor, mode)
    return ((singular_values(matrix) / noise).square() - matrix.shape[1]) / sqrt(matrix.numel())


def semicircle_edge(shape: tuple[int, ...], mode: int) -> float:
    """The largest e of noise: 2 + √(n_ℓ / m_ℓ), 2 in the limit of a long unfolding.

    Args:
        shape: of the tensor.
        mode: which unfolding.
    """
    return 2 + sqrt(_aspect(shape, mode))


def signal_to_noise(strength: float, shape: tuple[int, ...], noise: float) -> float:
    """ρ of a singular value of one of the unfoldings of the signal.

    Args:
        strength: that singular value.
        shape: of the tensor.
        noise: standard deviation of the noise in its entries.
    """
    return (strength / noise) ** 2 / sqrt(prod(shape))


def spike(ratio: float, shape: tuple[int, ...], mode: int) -> Spike:
    """Predicts how a direction of this signal-to-noise ratio shows in a mode.

    Args:
        ratio: ρ.
        shape: of the tensor.
        mode: which unfolding.
    """
    if ratio <= 1:
        return Spike(semicircle_edge(shape, mode), 0.0)
    root = sqrt(_aspect(shape, mode))
    return Spike(ratio + 1 / ratio + root, (1 - ratio**-2) / (1 + root / ratio))


def _aspect(shape: tuple[int, ...], mode: int) -> float:
    return shape[mode] ** 2 / prod(shape)


def multilinear_rank(
    tensor: Tensor, modes: Iterable[int] | None = None, rule: RankRule = _NOISE_EDGE
) -> dict[int, int]:
    """Estimates the rank of each mode from the singular values of its unfolding alone.

    Args:
        tensor: any shape, of at least two dimensions.
        modes: which ones; None means all.
        rule: what counts the singular values: those above the edge of the noise, whose size is estimated.

    Returns:
        Mode → rank, 0 where nothing stands out of the noise.

    Raises:
        FactorizationError: if the tensor has infinite or NaN entries.
    """
    found = {}
    for mode in range(tensor.ndim) if modes is None else modes:
        matrix = unfold(tensor, mode)
        found[mode] = rule(singular_values(matrix), (matrix.shape[0], matrix.shape[1]))
    return found


def mlsvd(tensor: Tensor, ranks: Mapping[int, int]) -> Tucker:
    """The truncated multilinear SVD: each mode is projected on the leading directions of its own unfolding.

    Within a factor √(number of modes) of the best approximation of these ranks; with full ranks it is exact.

    Args:
        tensor: any shape, at least two dimensions.
        ranks: mode → rank, from 1 to min(n_ℓ, m_ℓ); modes that are not named are left as they are.

    Returns:
        In the tensor's working precision: float64 for float64, else float32.

    Raises:
        ValueError: for a mode or a rank that the tensor does not have.
        FactorizationError: if the tensor has infinite or NaN entries.
    """
    _check_ranks(tensor, ranks)
    work = tensor.detach().to(working_dtype(tensor.dtype))
    factors = {mode: _leading(work, mode, rank) for mode, rank in ranks.items()}
    return Tucker(_multiplied(work, _transposed(factors)), factors)


def hooi(tensor: Tensor, start: Tucker, sweeps: int = 1) -> Tucker:
    """Higher-order orthogonal iteration: each factor in turn is made the best one, the others being as they are.

    From `mlsvd` one sweep brings almost all that there is to gain, the more so the larger the tensor (arXiv
    2402.03169). No step lowers the norm of the core, that is, none raises ‖T − dense‖_F.

    Args:
        tensor: the one that `start` approximates.
        start: from `mlsvd`, or an earlier sweep.
        sweeps: how often each factor is renewed.

    Returns:
        Factors of the same ranks. Where a rank is larger than the product of what the other modes keep, only as many
        directions as can be told apart.
    """
    work, factors = tensor.detach().to(start.core.dtype), dict(start.factors)
    for mode in list(factors) * sweeps:
        others = {other: factor for other, factor in factors.items() if other != mode}
        factors[mode] = _leading(_multiplied(work, _transposed(others)), mode, factors[mode].shape[1])
    return Tucker(_multiplied(work, _transposed(factors)), factors)


def _leading(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """The first left singular vectors of an unfolding."""
    return decompose(unfold(tensor, mode)).u[:, :rank].to(tensor.dtype)


def _multiplied(tensor: Tensor, factors: Mapping[int, Tensor]) -> Tensor:
    """The tensor times a matrix in each of these modes: index i of mode ℓ becomes Σ_i factor[j, i]."""
    for mode, factor in factors.items():
        tensor = torch.tensordot(factor, tensor, dims=([1], [mode])).movedim(0, mode)
    return tensor


def _transposed(factors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    return {mode: factor.mT for mode, factor in factors.items()}


def _check_ranks(tensor: Tensor, ranks: Mapping[int, int]) -> None:
    for mode, rank in ranks.items():
        size = tensor.shape[mode] if 0 <= mode < tensor.ndim else 0
        full = min(size, tensor.numel() // size) if size else 0
        if not 1 <= rank <= full:
            raise ValueError(
                f"mode {mode} of a tensor of shape {tuple(tensor.shape)} has ranks from 1 to {full}; found {rank}"
                if full
                else f"a tensor of shape {tuple(tensor.shape)} has no mode {mode} with a rank"
            )
