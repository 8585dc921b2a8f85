"""Layers whose weight is U diag(s) Vᵀ with all three trained: the form of SVD training (arXiv 2004.09031).

Beside the form with frozen bases it has the same slots, places in a model and state dicts, but `s` (k) in place of
`sigma` (k×k); the Parameter `s` *is* the Parameter that was `weight`. A convolution is decomposed

    channel-wise   out × (in/groups · kernel)      k filters of the kernel's size, then 1×1
    spatial-wise   (out·kw) × (in/groups · kh)     k filters kh×1 with stride (sh, 1), then 1×kw with stride (1, sw)

both exactly, for every stride, padding, dilation and number of groups, each of which has the k filters. The paper
writes the second the other way round; rows are outputs here as everywhere. s enters linearly, folded into U: no root
and no absolute value, whose slopes at zero are infinite or missing; a singular value may cross zero. A product of two
trained factors is the same with an s of ones, which is frozen (`two_factors.py`).

Through the factors or with W rebuilt, whichever takes fewer operations. Either way a backward pass takes twice those of
the forward pass, so that the choice is the same with one and without.
"""

from collections.abc import Iterator, Mapping
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpclr.lowrank.attention import AttentionWeights, LowRankAttention
from hpclr.lowrank.kinds import (
    KINDS,
    ConvWeight,
    Kind,
    Kinds,
    LinearWeight,
    LowRankConv,
    LowRankLinear,
    LowRankTransposedLinear,
    TransposedWeight,
    subclass_of,
)
from hpclr.lowrank.layers import LowRankModule, Slot
from hpclr.lowrank.product import CONVOLUTIONS, Arithmetic, ConvGeometry, Factors, for_each_group, pointwise


def dense(factors: Factors) -> Tensor:
    """W (m×n) as a differentiable function of all three."""
    u, s, vh = factors
    return (u * s) @ vh if u.shape[0] <= vh.shape[1] else u @ (s[:, None] * vh)


def leading_part(factors: Factors, held: int, k: int) -> Factors:
    """The first k directions, of which the first `held` get no gradient; those after them get one of zero."""
    u, s, vh = (factor if factor.shape[dim] == k else factor.narrow(dim, 0, k) for factor, dim in _directions(factors))
    if held == 0:
        return Factors(u, s, vh)
    return Factors(
        *(
            torch.cat([part.narrow(dim, 0, held).detach(), part.narrow(dim, held, k - held)], dim)
            for part, dim in _directions(Factors(u, s, vh))
        )
    )


def _directions(factors: Factors) -> Iterator[tuple[Tensor, int]]:
    """Each factor with the dimension along which directions count."""
    return zip(factors, (1, 0, 0), strict=True)


def cheaper(*, through: int, rebuilt: int) -> bool:
    """Whether the way through the factors takes fewer multiplications than rebuilding W."""
    return through < rebuilt


def linear(x: Tensor, factors: Factors, bias: Tensor | None) -> Tensor:
    """`F.linear(x, U diag(s) Vᵀ, bias)`; x is (..., n), the result (..., m)."""
    u, s, vh = factors
    (m, k), n = u.shape, vh.shape[1]
    rows = prod(x.shape[:-1])
    if cheaper(through=rows * k * (n + m), rebuilt=(rows + k) * m * n):
        h = F.linear(x, vh)
        any_number = torch.compiler.is_compiling() and not s.requires_grad  # as programs are exported for
        return F.linear(h * s, u, bias) if any_number or rows < m else F.linear(h, u * s, bias)
    return F.linear(x, dense(factors), bias)


def convolution(x: Tensor, factors: Factors, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """A convolution decomposed channel-wise; x is (N, in, *size)."""
    u, s, vh = factors
    kernel, stride, padding, dilation, groups = geometry
    (m, k), n = u.shape, vh.shape[1]
    rows = x.shape[0] * geometry.positions(tuple(x.shape[2:]))
    convolve = CONVOLUTIONS[len(kernel)]
    if cheaper(through=rows * k * (groups * n + m), rebuilt=(rows + k) * m * n):
        h = convolve(x, for_each_group(vh.reshape(k, -1, *kernel), groups), None, stride, padding, dilation, groups)
        return pointwise(h, u * s, bias, groups)
    return convolve(x, dense(factors).reshape(m, -1, *kernel), bias, stride, padding, dilation, groups)


def separable(x: Tensor, factors: Factors, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """A convolution decomposed spatial-wise; x is (N, in, height, width)."""
    u, s, vh = factors
    (kh, kw), (sh, sw), (ph, pw), (dh, dw), groups = geometry
    if kw == 1:  # the two decompositions are the same, and the other one strides both ways at once
        return convolution(x, factors, bias, geometry)
    m, k, n = u.shape[0], u.shape[1], vh.shape[1]
    down = ConvGeometry((kh, 1), (sh, 1), (ph, 0), (dh, 1), groups)
    between, rows = (x.shape[0] * step.positions(tuple(x.shape[2:])) for step in (down, geometry))
    if cheaper(through=k * (between * groups * n + rows * m), rebuilt=(rows + k) * m * n):
        h = F.conv2d(x, for_each_group(vh.reshape(k, -1, kh, 1), groups), None, *down[1:])
        across = (u * s).reshape(-1, kw, 1, k).permute(0, 3, 2, 1)
        return F.conv2d(h, across, bias, (1, sw), (0, pw), (1, dw), groups)
    weight = _from_spatial(dense(factors), (kh, kw))
    return F.conv2d(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, groups)


def _from_spatial(matrix: Tensor, kernel: tuple[int, int]) -> Tensor:
    """(out·kw) × (in/groups · kh) to (out, in/groups, kh, kw)."""
    kh, kw = kernel
    return matrix.reshape(-1, kw, matrix.shape[1] // kh, kh).permute(0, 2, 3, 1)


class TrainedFactors(LowRankModule):
    """All three factors are trained, the middle one is a diagonal."""

    label = "SVD"
    trains_bases = True
    arithmetic = Arithmetic(dense, linear, convolution)

    leading: Mapping[str, tuple[int, int]] = MappingProxyType({})  # stem of a slot → what `leading_part` takes

    @staticmethod
    def core_of(s: Tensor) -> Tensor:
        """The singular values as they are."""
        return s

    def factors_in_use(self, slot: Slot) -> Factors:
        """In training the leading directions alone, where `leading` says so."""
        factors, part = self.factors(slot), self.leading.get(slot.stem) if self.training else None
        return factors if part is None else leading_part(factors, *part)

    def take_leading(self, slot: Slot, held: int, k: int) -> None:
        """Has forward passes of training multiply by the first k directions, of which `held` get no gradient."""
        self.leading = {**self.leading, slot.stem: (held, k)}

    def take_all(self, slot: Slot) -> None:
        """Has them multiply by all directions again."""
        self.leading = {stem: part for stem, part in self.leading.items() if stem != slot.stem}


def _with_diagonal(mixin: type[LowRankModule]) -> tuple[Slot, ...]:
    return tuple(slot._replace(core="s") for slot in mixin.slots)


class SVDLinearWeight(TrainedFactors, LinearWeight):
    """The weight of nn.Linear."""

    slots: tuple[Slot, ...] = _with_diagonal(LinearWeight)


class SVDLinear(TrainedFactors, LowRankLinear):
    """nn.Linear."""

    slots: tuple[Slot, ...] = _with_diagonal(LowRankLinear)


class SVDTransposedWeight(TrainedFactors, TransposedWeight):
    """The weight of Hugging Face's Conv1D."""

    slots: tuple[Slot, ...] = _with_diagonal(TransposedWeight)


class SVDTransposedLinear(TrainedFactors, LowRankTransposedLinear):
    """Hugging Face's Conv1D."""

    slots: tuple[Slot, ...] = _with_diagonal(LowRankTransposedLinear)


class SVDConvWeight(TrainedFactors, ConvWeight):
    """The weight of a convolution, channel-wise."""

    slots: tuple[Slot, ...] = _with_diagonal(ConvWeight)


class SVDConv(TrainedFactors, LowRankConv):
    """nn.Conv1d, 2d, 3d, channel-wise."""

    slots: tuple[Slot, ...] = _with_diagonal(LowRankConv)


class SVDAttentionWeights(TrainedFactors, AttentionWeights):
    """The projections of attention."""

    slots: tuple[Slot, ...] = _with_diagonal(AttentionWeights)


class SVDAttention(TrainedFactors, LowRankAttention):
    """nn.MultiheadAttention."""

    slots: tuple[Slot, ...] = _with_diagonal(LowRankAttention)


class SpatialWeight(SVDConvWeight):
    """The weight of a two-dimensional convolution, spatial-wise."""

    kernel_size: tuple[int, int]

    def to_matrix(self, weight: Tensor) -> Tensor:
        """(out, in/groups, kh, kw) to (out·kw) × (in/groups · kh)."""
        return weight.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)

    def from_matrix(self, matrix: Tensor, slot: Slot) -> Tensor:
        """(out·kw) × (in/groups · kh) to (out, in/groups, kh, kw)."""
        return _from_spatial(matrix, self.kernel_size)


class SpatialConv(SpatialWeight, SVDConv):
    """nn.Conv2d, spatial-wise."""

    arithmetic = Arithmetic(dense, linear, separable)


_FORMS: dict[type[LowRankModule], tuple[type[LowRankModule], type[LowRankModule]]] = {
    LinearWeight: (SVDLinear, SVDLinearWeight),
    ConvWeight: (SVDConv, SVDConvWeight),
    AttentionWeights: (SVDAttention, SVDAttentionWeights),
    TransposedWeight: (SVDTransposedLinear, SVDTransposedWeight),
}
CHANNEL: Kinds = tuple(Kind(kind.matches, *_FORMS[kind.plain]) for kind in KINDS)
SPATIAL: Kinds = (Kind(subclass_of(nn.Conv2d), SpatialConv, SpatialWeight), *CHANNEL)
