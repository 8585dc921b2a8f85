"""The kinds of layer that have a low-rank form.

To add one: write a mixin (its slots, how its weight is seen as an m×n matrix, and a forward pass if a
cheaper one than rebuilding the weight is worth having) and add a line to `KINDS`; and the same in `svd_layers.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, nn

from hpclr.lowrank.attention import AttentionWeights, LowRankAttention
from hpclr.lowrank.embedding import EmbeddingWeight, LowRankEmbedding
from hpclr.lowrank.layers import LowRankModule, Slot, make_class
from hpclr.lowrank.product import ConvGeometry

WEIGHT = Slot("weight")


class LinearWeight(LowRankModule):
    """The weight of nn.Linear, (out, in), is its own matrix."""

    slots: tuple[Slot, ...] = (WEIGHT,)


class LowRankLinear(LinearWeight):
    """nn.Linear with the cheapest order of multiplication."""

    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        return self.arithmetic.linear(x, self.factors_in_use(self.slots[0]), self.bias)


class TransposedWeight(LowRankModule):
    """The weight of Hugging Face's Conv1D, (in, out), is the transpose of its matrix."""

    slots: tuple[Slot, ...] = (WEIGHT,)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """(in, out) to (out, in)."""
        return weight.mT

    def from_matrix(self, matrix: Tensor, slot: Slot) -> Tensor:
        """(out, in) to (in, out)."""
        return matrix.mT


class LowRankTransposedLinear(TransposedWeight):
    """Hugging Face's Conv1D, y = x W + b: of its matrix, the same product."""

    forward = LowRankLinear.forward


class ConvWeight(LowRankModule):
    """The weight of a convolution, (out, in/groups, *kernel), is seen as out × (in/groups · kernel)."""

    slots: tuple[Slot, ...] = (WEIGHT,)
    in_channels: int
    groups: int
    kernel_size: tuple[int, ...]

    def from_matrix(self, matrix: Tensor, slot: Slot) -> Tensor:
        """out × (in/groups · kernel) to (out, in/groups, *kernel)."""
        return matrix.reshape(matrix.shape[0], self.in_channels // self.groups, *self.kernel_size)


class LowRankConv(ConvWeight):
    """nn.Conv1d, 2d, 3d with the cheapest order of multiplication."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str
    bias: Tensor | None
    _reversed_padding_repeated_twice: list[int]

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in, *size) or (in, *size), as the layer's own class takes it."""
        if x.ndim == len(self.kernel_size) + 1:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * len(self.kernel_size)
        elif isinstance(padding, str):  # "same" may need one more on one side; "valid" needs none
            x = F.pad(x, self._reversed_padding_repeated_twice)
            padding = (0,) * len(self.kernel_size)
        geometry = ConvGeometry(self.kernel_size, self.stride, padding, self.dilation, self.groups)
        return self.arithmetic.convolution(x, self.factors_in_use(self.slots[0]), self.bias, geometry)


class Kind(NamedTuple):
    """One kind of layer: how to know it, its forms, and whose forward pass the quick form replaces."""

    matches: Callable[[type[nn.Module]], bool]
    quick: type[LowRankModule]  # has a forward pass of its own
    plain: type[LowRankModule]  # for subclasses with their own forward: they read `weight`, which is rebuilt


def subclass_of(*bases: type[nn.Module]) -> Callable[[type[nn.Module]], bool]:
    """Whether a class is one of these or comes from one."""
    return partial(_is_one_of, bases)  # which can be pickled


def _is_one_of(bases: tuple[type[nn.Module], ...], cls: type[nn.Module]) -> bool:
    return issubclass(cls, bases)


def _is_hugging_face_conv1d(cls: type[nn.Module]) -> bool:
    return any((c.__module__, c.__name__) == ("transformers.pytorch_utils", "Conv1D") for c in cls.__mro__)


Kinds = tuple[Kind, ...]

# with frozen bases
KINDS: Kinds = (
    Kind(subclass_of(nn.Linear), LowRankLinear, LinearWeight),
    Kind(subclass_of(nn.Conv1d, nn.Conv2d, nn.Conv3d), LowRankConv, ConvWeight),
    Kind(subclass_of(nn.MultiheadAttention), LowRankAttention, AttentionWeights),
    Kind(_is_hugging_face_conv1d, LowRankTransposedLinear, TransposedWeight),
)

# no kind that is looked for: the weight is that of a head, and becomes factors with it
EMBEDDINGS: Kinds = (Kind(subclass_of(nn.Embedding), LowRankEmbedding, EmbeddingWeight),)


def kind_of(cls: type[nn.Module], kinds: Kinds = KINDS) -> Kind | None:
    """The kind a layer class belongs to, None if it has no low-rank form."""
    return next((kind for kind in kinds if kind.matches(cls)), None)


def slots_of(module: nn.Module, kinds: Kinds = KINDS) -> tuple[Slot, ...]:
    """The slots of a module's own weights, dense or factored; empty if its class has no low-rank form."""
    if isinstance(module, EmbeddingWeight):
        return ()  # the head's
    if isinstance(module, LowRankModule):
        return module.slots
    kind = kind_of(type(module), kinds)
    return kind.plain.slots if kind else ()


def lowrank_class(dense_class: type[nn.Module], kinds: Kinds = KINDS) -> type[LowRankModule]:
    """The low-rank subclass of an eligible layer class."""
    kind = kind_of(dense_class, kinds)
    if kind is None:
        raise TypeError(f"{dense_class.__name__} has no low-rank form")
    mixin: Any = kind.plain if _has_own_forward(dense_class) else kind.quick
    return make_class(mixin, cast(Any, dense_class))


def _has_own_forward(cls: type[nn.Module]) -> bool:
    """Whether a subclass computes something else than the library class it comes from."""
    home = ("torch.nn.modules", "transformers.pytorch_utils")
    for c in cls.__mro__:
        if "forward" in vars(c) or "_conv_forward" in vars(c):
            return not c.__module__.startswith(home)
    return True
