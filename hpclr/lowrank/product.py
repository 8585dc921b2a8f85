"""Multiplying by U Σ Vᵀ in whichever order costs least.

Sizes: x has B rows of n, y has B rows of m, the rank is k. Counted in floating-point operations of
a forward pass, or of forward and backward when gradients are wanted:

    rebuild    W = U Σ Vᵀ, then as dense         2Bmn            6Bmn  (+ building W and its gradient)
    through    h = x V, then y = h (U Σ)ᵀ         2B(nk + mk)     B(4nk + 4mk + 4k²)  (+ building U Σ)

U and V are frozen. So on the way through the factors autograd keeps h (B×k) and not x (B×n), and the
backward pass forms (∂y U) once for both gradients. Σ is folded into U when that is cheaper than
taking it as a step of its own. The choice depends on sizes alone, never on a timing: runs repeat.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx


class Factors(NamedTuple):
    """A weight W = u @ sigma @ vh: u m×k and vh k×n frozen, sigma k×k trained.

    In the form of `svd_layers.py` all three are trained, and `sigma` is the diagonal alone (k).
    """

    u: Tensor
    sigma: Tensor
    vh: Tensor


def through_factors(rows: int, m: int, n: int, k: int, *, groups: int = 1, training: bool) -> bool:
    """Whether the way through the factors takes fewer operations than rebuilding W.

    Args:
        rows: B, the rows of the input (for convolutions: images × output positions).
        m: output features (all groups together).
        n: input features of one group (for convolutions: channels per group × kernel size).
        k: the rank.
        groups: groups of a convolution; each needs its own pass through V.
        training: whether a backward pass follows.
    """
    build = 2 * k * (k * min(m, n) + m * n)
    fold = 2 * k * k * min(rows, m)
    if training:
        rebuild = 6 * rows * m * n + 2 * build
        through = rows * (4 * groups * n * k + 4 * m * k + 4 * groups * k * k) + fold
    else:
        rebuild = 2 * rows * m * n + build
        through = rows * 2 * (groups * n * k + m * k) + fold
    return through < rebuild


def pays(m: int, n: int, k: int, *, groups: int = 1) -> bool:
    """Whether factors of rank k are no larger and, in training with many rows, no slower than a dense m×n weight."""
    no_larger = k * (m + n) + k * k <= m * n
    no_slower = 4 * groups * n * k + 4 * m * k + 4 * groups * k * k <= 6 * m * n
    return no_larger and no_slower


def dense(factors: Factors) -> Tensor:
    """W (m×n) as a differentiable function of Σ."""
    u, sigma, vh = factors
    if u.shape[0] <= vh.shape[1]:
        return (u @ sigma) @ vh
    return u @ (sigma @ vh)


def in_compute_dtype(x: Tensor, factors: Factors) -> tuple[Tensor, Factors]:
    """Brings input and factors to autocast's type, where autocast is on, as F.linear would."""
    kind = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype == torch.float64:
        return x, factors
    target = torch.get_autocast_dtype(kind)
    return x.to(target), Factors(*(factor.to(target) for factor in factors))


def linear(x: Tensor, factors: Factors, bias: Tensor | None) -> Tensor:
    """`F.linear(x, U Σ Vᵀ, bias)`; x is (..., n), the result (..., m)."""
    x, factors = in_compute_dtype(x, factors)
    m, k = factors.u.shape
    n = factors.vh.shape[1]
    rows = prod(x.shape[:-1])
    if not through_factors(rows, m, n, k, training=wants_gradient(x, factors)):
        return F.linear(x, dense(factors), bias)
    h = F.linear(x, factors.vh)
    y: Tensor = _SigmaThenU.apply(h, factors.sigma, factors.u, bias)
    return y


def wants_gradient(x: Tensor, factors: Factors) -> bool:
    """Whether a backward pass through this product can follow."""
    return torch.is_grad_enabled() and (x.requires_grad or factors.sigma.requires_grad)


class _SigmaThenU(torch.autograd.Function):
    """y = h (U Σ)ᵀ + b for h (..., k); the backward pass computes ∂y U once for both ∂Σ and ∂h."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, sigma: Tensor, u: Tensor, bias: Tensor | None) -> Tensor:
        if prod(h.shape[:-1]) >= u.shape[0]:
            return F.linear(h, u @ sigma, bias)
        return F.linear(F.linear(h, sigma), u, bias)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        h, sigma, u, _ = inputs
        ctx.save_for_backward(h, sigma, u)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        h, sigma, u = ctx.saved_tensors
        need_h, need_sigma, _, need_bias = ctx.needs_input_grad
        grad_s = grad_y @ u
        grad_h = grad_s @ sigma if need_h else None
        grad_sigma = _rows(grad_s).mT @ _rows(h) if need_sigma else None
        grad_bias = _rows(grad_y).sum(0) if need_bias else None
        return grad_h, grad_sigma, None, grad_bias


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class ConvGeometry(NamedTuple):
    """Where a convolution reads: one number a spatial dimension; the input is already padded as needed."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def positions(self, size: tuple[int, ...]) -> int:
        """The number of output positions for an input of this spatial size."""
        per_axis = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return prod(
            [(length + 2 * pad - step * (width - 1) - 1) // stride + 1 for length, width, stride, pad, step in per_axis]
        )


CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def convolution(x: Tensor, factors: Factors, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """A convolution whose weight, seen as out × (in/groups · kernel), is U Σ Vᵀ.

    x is (N, in, *size). Through the factors: a convolution with the k filters in V (for every group),
    then a 1×1 convolution with U Σ.
    """
    x, factors = in_compute_dtype(x, factors)
    u, _, vh = factors
    kernel, stride, padding, dilation, groups = geometry
    rows = x.shape[0] * geometry.positions(tuple(x.shape[2:]))
    channels = vh.shape[1] // prod(kernel)
    training = wants_gradient(x, factors)
    if not through_factors(rows, u.shape[0], vh.shape[1], u.shape[1], groups=groups, training=training):
        weight = dense(factors).view(u.shape[0], channels, *kernel)
        return CONVOLUTIONS[len(kernel)](x, weight, bias, stride, padding, dilation, groups)
    filters = vh.view(-1, channels, *kernel)
    if groups > 1:
        filters = filters.repeat(groups, *(1 for _ in filters.shape[1:]))
    h = _FrozenConvolution.apply(x, filters, geometry)
    y: Tensor = _SigmaThenUChannels.apply(h, factors.sigma, u, bias, groups)
    return y


class Arithmetic(NamedTuple):
    """How one form of factors gives the dense weight W, W x + b, and a convolution with W."""

    dense: Callable[[Factors], Tensor]
    linear: Callable[[Tensor, Factors, Tensor | None], Tensor]
    convolution: Callable[[Tensor, Factors, Tensor | None, ConvGeometry], Tensor]


FROZEN = Arithmetic(dense, linear, convolution)


class _FrozenConvolution(torch.autograd.Function):
    """A convolution with weights that need no gradient, so that its input need not be kept.

    torch's own keeps the input for the gradient of the weight even where that is not wanted.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, filters: Tensor, geometry: ConvGeometry) -> Tensor:
        kernel, stride, padding, dilation, groups = geometry
        return CONVOLUTIONS[len(kernel)](x, filters, None, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, filters, ctx.geometry = inputs
        ctx.input_shape = x.shape
        ctx.save_for_backward(filters)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        (filters,) = ctx.saved_tensors
        kernel, stride, padding, dilation, groups = ctx.geometry
        shape_only = grad_h.new_empty(1).expand(ctx.input_shape)
        output_padding = [0] * len(kernel)
        grad_x, _, _ = torch.ops.aten.convolution_backward(
            grad_h,
            shape_only,
            filters,
            None,
            stride,
            padding,
            dilation,
            False,
            output_padding,
            groups,
            [True, False, False],
        )
        return grad_x, None, None


class _SigmaThenUChannels(torch.autograd.Function):
    """As `_SigmaThenU`, for channels in the second place: h (N, groups·k, *size), y (N, m, *size)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, sigma: Tensor, u: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        return pointwise(h, u @ sigma, bias, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        h, sigma, u, _, ctx.groups = inputs
        ctx.save_for_backward(h, sigma, u)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        h, sigma, u = ctx.saved_tensors
        groups, k = ctx.groups, sigma.shape[0]
        need_h, need_sigma, _, need_bias, _ = ctx.needs_input_grad
        grad_s = pointwise(grad_y, u.view(groups, -1, k).mT.reshape(groups * k, -1), None, groups)
        grad_h = pointwise(grad_s, sigma.mT.repeat(groups, 1), None, groups) if need_h else None
        grad_sigma = _outer(grad_s, h, groups) if need_sigma else None
        grad_bias = grad_y.sum((0, *range(2, grad_y.ndim))) if need_bias else None
        return grad_h, grad_sigma, None, grad_bias, None


def pointwise(x: Tensor, matrix: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """A 1×1 convolution; matrix is (out, in/groups)."""
    spatial = x.ndim - 2
    weight = matrix.reshape(*matrix.shape, *(1,) * spatial)
    return CONVOLUTIONS[spatial](x, weight, bias, groups=groups)


def _outer(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """Σ over images, groups and positions of a bᵀ: (k, k) from two (N, groups·k, *size)."""
    a, b = (t.unflatten(1, (groups, -1)).flatten(3) for t in (a, b))
    total: Tensor = torch.tensordot(a, b, dims=([0, 1, 3], [0, 1, 3]))
    return total
