"""Multiplying by U Σ Vᵀ in whichever order costs least.

Sizes: x has B rows of n, y has B rows of m, the rank is k. Counted in floating-point operations of
a forward pass, or of forward and backward when gradients are wanted:

    rebuild    W = U Σ Vᵀ, then as dense         2Bmn            6Bmn  (+ building W and its gradient)
    through    h = x V, then y = h (U Σ)ᵀ         2B(nk + mk)     B(4nk + 4mk + 2k²)  (+ building U Σ and Σ Vᵀ)

U and V are frozen. So on the way through the factors autograd keeps h (B×k) and not x (B×n), and the
backward pass forms s = ∂y U once for both gradients, ∂Σ = sᵀ h and ∂x = s (Σ Vᵀ). Σ is folded into U and
into V when that is cheaper than taking it as a step of its own; then it costs the rows nothing. Where it saves
little, there are three plain products, h Σᵀ being one, of which torch knows the gradients:

    plainly    y = ((x V) Σᵀ) Uᵀ                  2B(nk + mk + k²)   B(4nk + 4mk + 6k²)

The choice depends on sizes alone, never on a timing: runs repeat.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from math import prod
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx


class Factors(NamedTuple):
    """A weight W = u @ sigma @ vh: u m×k and vh k×n frozen, sigma k×k trained.

    In the form of `svd_layers.py` all three are trained, and `sigma` is the diagonal alone (k).
    """

    u: Tensor
    sigma: Tensor
    vh: Tensor


class Operations(NamedTuple):
    """Floating-point operations of each order of multiplication."""

    through: int
    rebuild: int


def operations(
    rows: int,
    m: int,
    n: int,
    k: int,
    *,
    groups: int = 1,
    training: bool,
    input_gradient: bool = True,
    always_folds: bool = False,
    again: bool = False,
) -> Operations:
    """What a layer takes through its factors, and with W rebuilt.

    Args:
        rows: B, the rows of the input (for convolutions: images × output positions).
        m: output features (all groups together).
        n: input features of one group (for convolutions: channels per group × kernel size).
        k: the rank.
        groups: groups of a convolution; each needs its own pass through V.
        training: whether a backward pass follows.
        input_gradient: whether that pass goes on to the input; into the first layer of a model it does not.
        always_folds: whether Σ is folded in even if that saves little, as in convolutions.
        again: whether that pass computes h = x V a second time, rather than to keep it.
    """
    narrow, wide, core, dense = 2 * rows * k * groups * n, 2 * rows * k * m, 2 * rows * k * k, 2 * rows * m * n
    build = 2 * k * (k * min(m, n) + m * n)
    through, rebuild = narrow + wide + core, dense + build
    if training:
        through += wide + core * groups + again * narrow
        rebuild += dense + build
    if training and input_gradient:
        through += narrow + core
        rebuild += dense
    saved = saved_by_folding(rows, m, n, k, input_gradient=training and input_gradient)
    if always_folds or not training or saved >= _WORTH_FOLDING:
        through -= saved
    return Operations(through, rebuild)


# From so many operations saved on, a function of ours is quicker than three products of torch's: its backward pass is
# called from Python. On a CPU that is level at 10 to 30 million (benchmarks/layer.py --rows). Measured on no GPU.
_WORTH_FOLDING = 20_000_000


def saved_by_folding(rows: int, m: int, n: int, k: int, *, input_gradient: bool) -> int:
    """How many operations fewer it is to fold Σ into U, and into V on the way back, where that is fewer at all."""
    return 2 * k * k * (rows - min(rows, m) + input_gradient * (rows - min(rows, n)))


def through_factors(rows: int, m: int, n: int, k: int, **how: Any) -> bool:
    """Whether the way through the factors takes fewer operations than rebuilding W; arguments as for `operations`."""
    counted = operations(rows, m, n, k, **how)
    return counted.through < counted.rebuild


# What two convolutions in place of one cost beside their operations, in operations for each channel that they read and
# write: on a CPU 130 to 560 for 16 to 256 channels (benchmarks/step.py; ResNet-20 at high ranks). Measured on no GPU.
_OPERATIONS_A_CHANNEL = 250


def pays(m: int, n: int, k: int, *, groups: int = 1, positions: int | None = None) -> bool:
    """Whether factors of rank k are no larger and, in training with many rows, no slower than a dense m×n weight.

    Args:
        m: output features.
        n: input features of one group.
        k: the rank.
        groups: groups of a convolution.
        positions: of a convolution, those of its kernel (9 for 3×3); None: a matrix product, where the operations tell.
    """
    no_larger = k * (m + n) + k * k <= m * n
    margin = 0 if positions is None else _OPERATIONS_A_CHANNEL * (m + groups * n // positions)
    no_slower = 4 * groups * n * k + 4 * m * k + 2 * groups * k * k + margin <= 6 * m * n
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
    u, sigma, vh = factors
    training = wants_gradient(x, factors)
    sizes = (prod(x.shape[:-1]), *u.shape, vh.shape[1], training, x.requires_grad)
    order = _order(*sizes) if torch.compiler.is_compiling() else _known_order(*sizes)
    if order == "rebuild":
        return F.linear(x, dense(factors), bias)
    h = F.linear(x, vh)
    if not training or (order == "fold" and is_transformed()):
        return _from_narrow(h, sigma, u, bias)
    if order == "plain":
        return F.linear(F.linear(h, sigma), u, bias)
    return _applied(_Linear, x, h, sigma, u, vh, bias)


def embedding(ids: Tensor, factors: Factors, padding: int | None) -> Tensor:
    """`F.embedding(ids, U Σ Vᵀ, padding)`, by rows of U: W is not built.

    Args:
        ids: (...).
        factors: of the table W (m×n); its rows are looked up.
        padding: the id that leaves no gradient; None: there is none.

    Returns:
        (..., n), in the factors' type under autocast too, as a dense table would give it.
    """
    rows = F.embedding(ids, factors.u)
    rows, narrow = in_compute_dtype(rows, factors._replace(u=rows))
    y = _to_wide(rows, narrow.sigma, narrow.vh).to(factors.u.dtype)
    return y if padding is None else torch.where((ids == padding).unsqueeze(-1), y.detach(), y)


def _order(
    rows: int, m: int, k: int, n: int, training: bool, input_gradient: bool
) -> Literal["rebuild", "fold", "plain"]:
    """The cheapest order for a matrix product."""
    if not through_factors(rows, m, n, k, training=training, input_gradient=input_gradient):
        return "rebuild"
    return "fold" if saved_by_folding(rows, m, n, k, input_gradient=input_gradient) >= _WORTH_FOLDING else "plain"


_known_order = lru_cache(maxsize=4096)(_order)  # to work it out takes as long as a small product


def wants_gradient(x: Tensor, factors: Factors) -> bool:
    """Whether a backward pass through this product can follow."""
    return torch.is_grad_enabled() and (x.requires_grad or factors.sigma.requires_grad)


def is_transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work, which ask for more than functions of ours know.

    They are given torch's own products, of which all derivatives are known, also those with regard to U and V.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _applied(function: type[torch.autograd.Function], *inputs: Any) -> Tensor:
    """The result of a function of ours: quickly, unless a compiler has to see through it."""
    y: Tensor = (function if torch.compiler.is_compiling() else _quick(function)).apply(*inputs)
    return y


@cache
def _quick(function: Any) -> Any:
    """The same function with both halves of its forward pass in one, which torch calls with a third of the overhead."""

    def forward(ctx: FunctionCtx, *inputs: Any) -> Tensor:
        output: Tensor = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    whole = {"forward": staticmethod(forward), "setup_context": staticmethod(torch.autograd.Function.setup_context)}
    return type(function.__name__, (function,), whole)


class _Linear(torch.autograd.Function):
    """y = h (U Σ)ᵀ + b for h = x V; the backward pass computes s = ∂y U once for both ∂Σ and ∂x.

    The gradient goes to x itself and none to h, through which it would cost 2Bk² more. h comes with its own history,
    so that second derivatives, which do go through it, are right too.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, h: Tensor, sigma: Tensor, u: Tensor, vh: Tensor, bias: Tensor | None) -> Tensor:
        return _from_narrow(h, sigma, u, bias)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, h, sigma, u, vh, _ = inputs
        ctx.save_for_backward(h, sigma, u, vh)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        h, sigma, u, vh = ctx.saved_tensors
        need_x, _, need_sigma, _, _, need_bias = ctx.needs_input_grad
        s = grad_y @ u
        grad_x = _to_wide(s, sigma, vh) if need_x else None
        grad_sigma = _rows(s).mT @ _rows(h) if need_sigma else None
        grad_bias = _rows(grad_y).sum(0) if need_bias else None
        return grad_x, None, grad_sigma, None, None, grad_bias


def _from_narrow(h: Tensor, sigma: Tensor, u: Tensor, bias: Tensor | None) -> Tensor:
    """h (U Σ)ᵀ + b."""
    if prod(h.shape[:-1]) >= u.shape[0]:
        return F.linear(h, u @ sigma, bias)
    return F.linear(F.linear(h, sigma), u, bias)


def _to_wide(s: Tensor, sigma: Tensor, vh: Tensor) -> Tensor:
    """s Σ Vᵀ."""
    if prod(s.shape[:-1]) >= vh.shape[1]:
        return s @ (sigma @ vh)
    return (s @ sigma) @ vh


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
    u, sigma, vh = factors
    kernel, stride, padding, dilation, groups = geometry
    (m, k), n = u.shape, vh.shape[1]
    rows = x.shape[0] * geometry.positions(tuple(x.shape[2:]))
    training = wants_gradient(x, factors)
    again = training and _is_kept_anyway(x) and not _has_room(rows, m, n, k, groups)
    how = {"groups": groups, "training": training, "input_gradient": x.requires_grad, "again": again}
    if not through_factors(rows, m, n, k, always_folds=True, **how):
        weight = dense(factors).view(m, -1, *kernel)
        return CONVOLUTIONS[len(kernel)](x, weight, bias, stride, padding, dilation, groups)
    if not training or is_transformed():
        return pointwise(_narrow(x, vh, geometry), u @ sigma, bias, groups)
    filters = for_each_group(vh.view(k, -1, *kernel), groups)
    h = frozen_convolution(x, filters, geometry)
    return _applied(_Convolution, x, h, sigma, u, vh, bias, geometry, again)


def _is_kept_anyway(x: Tensor) -> bool:
    """Whether the operation that made x keeps it for its own backward pass, as ReLU does with its result.

    Then not to keep x saves nothing. A compiler sees for itself what is kept and what is computed again.
    The type is asked: of the object itself the result would be fetched, which checkpointing would compute anew for it.
    """
    return not torch.compiler.is_compiling() and hasattr(type(x.grad_fn), "_saved_result")


def _has_room(rows: int, m: int, n: int, k: int, groups: int) -> bool:
    """Whether h takes no more memory than the factors save of the weight and its gradient.

    So a layer never needs more memory than the dense one, whatever the optimiser keeps.
    """
    return rows * k * groups <= 2 * m * n - k * (m + n) - 2 * k * k


def for_each_group(filters: Tensor, groups: int) -> Tensor:
    """The k filters once for every group."""
    return filters.repeat(groups, *(1 for _ in filters.shape[1:])) if groups > 1 else filters


class Arithmetic(NamedTuple):
    """How one form of factors gives the dense weight W, W x + b, a convolution with W, and rows of W by their ids."""

    dense: Callable[[Factors], Tensor]
    linear: Callable[[Tensor, Factors, Tensor | None], Tensor]
    convolution: Callable[[Tensor, Factors, Tensor | None, ConvGeometry], Tensor]
    embedding: Callable[[Tensor, Factors, int | None], Tensor] = embedding


FROZEN = Arithmetic(dense, linear, convolution)


def frozen_convolution(x: Tensor, filters: Tensor, geometry: ConvGeometry) -> Tensor:
    """A convolution whose input is not kept.

    A compiler keeps only what is used; in a function of ours it would compute with a gradient of h, of zeros.
    """
    if torch.compiler.is_compiling():
        return CONVOLUTIONS[len(geometry.kernel)](x, filters, None, *geometry[1:])
    return _applied(_FrozenConvolution, x, filters, geometry)


class _FrozenConvolution(torch.autograd.Function):
    """A convolution with weights that need no gradient, so that its input need not be kept.

    torch's own keeps the input for the gradient of the weight even where that is not wanted.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, filters: Tensor, geometry: ConvGeometry) -> Tensor:
        return CONVOLUTIONS[len(geometry.kernel)](x, filters, None, *geometry[1:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, filters, ctx.geometry = inputs
        ctx.input = _form(x)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(filters)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad_h is None or not ctx.needs_input_grad[0]:
            return None, None, None
        return _input_gradient(grad_h, ctx.saved_tensors[0], ctx.input, ctx.geometry), None, None


class _Form(NamedTuple):
    """What the gradient with regard to an input must be like."""

    shape: torch.Size
    layout: torch.memory_format


def _form(x: Tensor) -> _Form:
    """Of an input (N, channels, *size); the channels of pictures may come last in memory."""
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return _Form(x.shape, torch.channels_last if last else torch.contiguous_format)


def _input_gradient(grad: Tensor, filters: Tensor, like: _Form, geometry: ConvGeometry) -> Tensor:
    """The gradient with regard to the input of a convolution."""
    kernel, stride, padding, dilation, groups = geometry
    shape_only = grad.new_empty(1).expand(like.shape)
    filters = filters.contiguous(memory_format=like.layout)  # shape_only has no layout to compute in
    no, only_input = [0] * len(kernel), [True, False, False]
    grad_x: Tensor = torch.ops.aten.convolution_backward(
        grad, shape_only, filters, None, stride, padding, dilation, False, no, groups, only_input
    )[0]
    return grad_x


class _Convolution(torch.autograd.Function):
    """As `_Linear`, for channels in the second place: h (N, groups·k, *size), y (N, m, *size).

    With `again`, x is kept in place of h, which the backward pass computes a second time.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        h: Tensor,
        sigma: Tensor,
        u: Tensor,
        vh: Tensor,
        bias: Tensor | None,
        geometry: ConvGeometry,
        again: bool,
    ) -> Tensor:
        return pointwise(h, u @ sigma, bias, geometry.groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, h, sigma, u, vh, _, ctx.geometry, ctx.again = inputs
        ctx.input = _form(x)
        ctx.save_for_backward(x if ctx.again else h, sigma, u, vh)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        kept, sigma, u, vh = ctx.saved_tensors
        need_x, _, need_sigma, _, _, need_bias, *_ = ctx.needs_input_grad
        groups, k = ctx.geometry.groups, sigma.shape[0]
        s = pointwise(grad_y, u.view(groups, -1, k).mT.reshape(groups * k, -1), None, groups)
        grad_x = None
        if need_x:
            filters = for_each_group((sigma @ vh).view(k, -1, *ctx.geometry.kernel), groups)
            grad_x = _input_gradient(s, filters, ctx.input, ctx.geometry)
        grad_sigma = None
        if need_sigma:
            h = _narrow(kept, vh, ctx.geometry) if ctx.again else kept
            grad_sigma = _outer(s, h, groups)
        grad_bias = grad_y.sum((0, *range(2, grad_y.ndim))) if need_bias else None
        return grad_x, None, grad_sigma, None, None, grad_bias, None, None


def _narrow(x: Tensor, vh: Tensor, geometry: ConvGeometry) -> Tensor:
    """h: the convolution with the k filters in V, for every group."""
    filters = for_each_group(vh.view(vh.shape[0], -1, *geometry.kernel), geometry.groups)
    return CONVOLUTIONS[len(geometry.kernel)](x, filters, None, *geometry[1:])


def pointwise(x: Tensor, matrix: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """A 1×1 convolution; matrix is (out, in/groups)."""
    spatial = x.ndim - 2
    weight = matrix.reshape(*matrix.shape, *(1,) * spatial)
    return CONVOLUTIONS[spatial](x, weight, bias, groups=groups)


def _outer(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """Σ over images, groups and positions of a bᵀ: (k, k) from two (N, groups·k, *size)."""
    a, b = (t.reshape(t.shape[0], groups, t.shape[1] // groups, prod(t.shape[2:])) for t in (a, b))
    if a.shape[2] <= a.shape[3]:  # the products of all images take no more room than a itself, and nothing is copied
        return (a @ b.mT).sum((0, 1))
    total: Tensor = torch.tensordot(a, b, dims=([0, 1, 3], [0, 1, 3]))
    return total
