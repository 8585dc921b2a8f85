"""Layers that keep their weight, frozen, and train a small correction of it: what is common to all of them.

A layer is adapted in place, as it is converted to factors (`hpclr.lowrank.layers`): its object, name, hooks, bias and
`weight` stay the very same objects, its class becomes a subclass of its own class, and the parameters of the adapter
are added to it. A form (`sara.py`, `mo_sara.py`, `edora.py`) is written once, in terms of the few operations that
differ from one kind of layer to the next:

    base(x)           x Wᵀ                     without the bias
    narrow(x, B)      x Bᵀ                     B (k×n): from inputs to the k directions of an adapter
    wide(h, A)        h Aᵀ                     A (m×k): from there to outputs, at each position
    along(v, y)       v as a factor of y       v (m) or (k): one number a channel

Sizes: the weight seen as a matrix is m×n, of a convolution out × (in · kernel); the rank is k. Autocast works as for
the layer itself. What is frozen does not make autograd keep its input.
"""

import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpclr.lowrank.factors import LowRankWarning, working_dtype
from hpclr.lowrank.interchange import cast_state_dict
from hpclr.lowrank.kinds import WEIGHT, ConvWeight, Kind, LinearWeight, TransposedWeight, kind_of, lowrank_class
from hpclr.lowrank.layers import LowRankModule, replace_data, under_torch_func
from hpclr.lowrank.product import CONVOLUTIONS, ConvGeometry, frozen_convolution, is_transformed, pointwise


class Sizes(NamedTuple):
    """What the shapes of an adapter follow from, beside those of the weight."""

    rank: int
    experts: int = 0  # of Mo-SARA


Shapes = dict[str, tuple[int, ...]]


class AdaptedModule(nn.Module):
    """What an adapted layer can do besides what its class could. Mixed in before that class."""

    form: type["AdaptedModule"]  # the class was made from this one and the next
    dense_class: type[nn.Module]
    kind: Kind
    weight: nn.Parameter
    bias: Tensor | None

    # what a form says of itself
    label: ClassVar[str]
    trained: ClassVar[tuple[str, ...]]  # names of the parameters that it adds
    scales: ClassVar[tuple[str, ...]]  # of `trained`, those with one number for each direction or output
    frozen: ClassVar[tuple[str, ...]]

    _original: Tensor | None = None  # the base weight while merged, on the host

    @classmethod
    def shapes(cls, m: int, n: int, sizes: Sizes) -> Shapes:
        """Names and shapes of all parameters that the form adds to an m×n weight, in their order."""
        raise NotImplementedError

    @classmethod
    def sizes(cls, shapes: Mapping[str, tuple[int, ...]]) -> Sizes:
        """The inverse of `shapes`; a KeyError or IndexError if these cannot be of this form."""
        raise NotImplementedError

    def adapted(self, x: Tensor) -> Tensor:
        """The layer's output for an input as `prepared` gives it."""
        raise NotImplementedError

    def corrected(self) -> Tensor:
        """W', the m×n matrix with which alone the layer computes the same, in float32 at least.

        Raises:
            ValueError: if there is none.
        """
        raise NotImplementedError

    # what a kind of layer does in its own way

    def base(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias."""
        raise NotImplementedError

    def narrow(self, x: Tensor, matrix: Tensor) -> Tensor:
        """x Bᵀ for a k×n matrix B; of the size of the output, with k channels."""
        raise NotImplementedError

    def wide(self, h: Tensor, matrix: Tensor) -> Tensor:
        """h Aᵀ for an m×k matrix A and h with k channels."""
        raise NotImplementedError

    def along(self, vector: Tensor, like: Tensor) -> Tensor:
        """A number for each channel of `like`, as a factor of it, in its type."""
        raise NotImplementedError

    channels: ClassVar[int] = -1  # the dimension of the output that counts them

    def prepared(self, x: Tensor) -> Tensor:
        """The input, in the type in which the layer's own class would compute."""
        return x.to(compute_dtype(x))

    # what is the same for all

    def forward(self, x: Tensor) -> Tensor:
        """As the layer's own class takes and gives it."""
        if self.is_merged:
            self._refuse_training()
            return super().forward(x)  # type: ignore[no-any-return]
        self._keep_frozen()
        return self.adapted(self.prepared(x))

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The m×n view of the weight, or of anything shaped like it."""
        return self.kind.plain.to_matrix(cast(Any, self), weight)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of `to_matrix`."""
        return self.kind.plain.from_matrix(cast(Any, self), matrix, WEIGHT)

    def parameter(self, name: str) -> nn.Parameter:
        """One of the adapter's parameters, or `weight`."""
        found = self._parameters[name]
        assert found is not None
        return found

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(m, n) of the weight seen as a matrix."""
        m, n = self.to_matrix(self.weight).shape
        return m, n

    @property
    def rank(self) -> int:
        """k."""
        return self.sizes({name: tuple(self.parameter(name).shape) for name in self.names}).rank

    @property
    def names(self) -> tuple[str, ...]:
        """Of all parameters that the adapter has added."""
        return *self.frozen, *self.trained

    def in_full(self, *names: str) -> tuple[Tensor, ...]:
        """Parameters in the precision in which W' is computed: float32 at least."""
        parameters = (self.parameter(name).detach() for name in names)
        return tuple(p.to(working_dtype(p.dtype)) for p in parameters)

    def base_matrix(self) -> Tensor:
        """W (m×n) in float32 at least."""
        (weight,) = self.in_full("weight")
        return self.to_matrix(weight)

    def extra_repr(self) -> str:
        """What the class prints of itself, and the rank."""
        return ", ".join(filter(None, [super().extra_repr(), f"rank={self.rank}", "merged" if self.is_merged else ""]))

    @property
    def is_merged(self) -> bool:
        """Whether `weight` holds W' now."""
        return self._original is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Has the layer compute with W' alone, at no more cost than before it was adapted; once merged, does nothing.

        The base weight waits on the host.

        Raises:
            ValueError: if the form has no W', or the weight's type no numbers as large as its.
        """
        if self.is_merged:
            return
        merged = cast_state_dict({"W'": self.from_matrix(self.corrected())}, self.weight.dtype)["W'"]
        original = self.weight.detach().to("cpu", copy=True)
        self.weight.copy_(merged)
        self._original = original

    @torch.no_grad()
    def unmerge(self) -> None:
        """Gives `weight` what it held before `merge`, to the bit; does nothing if it is not merged."""
        if self._original is not None:
            self.weight.copy_(self._original)
            self._original = None

    def _refuse_training(self) -> None:
        if (
            self.training
            and torch.is_grad_enabled()
            and any(self.parameter(name).requires_grad for name in self.trained)
        ):
            raise ValueError(
                f"a {type(self).__name__} is merged: its adapter takes no part in what it computes and would get no "
                "gradient; unmerge before training, with hpclr.lowrank.adapters.unmerge_adapters(model), or evaluate "
                "under model.eval() or torch.no_grad()"
            )

    def _keep_frozen(self) -> None:
        """Whoever calls `model.requires_grad_(True)` means what was trained."""
        thawed = [name for name in ("weight", *self.frozen) if self.parameter(name).requires_grad]
        if not thawed or under_torch_func():
            return
        warnings.warn(
            f"{' and '.join(thawed)} of a {type(self).__name__} had been set to require gradients; frozen again. Only "
            f"the adapter is trained ({', '.join(self.trained)}); to train the whole weight, take the adapters away, "
            "with hpclr.lowrank.adapters.remove_adapters(model).",
            LowRankWarning,
            stacklevel=3,
        )
        for name in thawed:
            self.parameter(name).requires_grad_(False).grad = None

    def resize(self, sizes: Sizes) -> None:
        """Gives the adapter another rank, with contents still to come; its Parameters stay the same objects."""
        for name, shape in self.shapes(*self.matrix_shape, sizes).items():
            parameter = self.parameter(name)
            if parameter.shape != shape:
                replace_data(parameter, parameter.new_zeros(shape))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made at run time, so pickle and copy are told how to make it again
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _empty_layer, (self.form, self.dense_class), state

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._original is not None:  # what is saved is always the adapter and the base weight
            destination[prefix + "weight"] = self._original

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.unmerge()
        stored = {name: tuple(state_dict[prefix + name].shape) for name in self.names if prefix + name in state_dict}
        sizes = sizes_stored(self.form, stored, *self.matrix_shape)
        if sizes is not None:
            self.resize(sizes)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def sizes_stored(form: type[AdaptedModule], stored: Mapping[str, tuple[int, ...]], m: int, n: int) -> Sizes | None:
    """The sizes of an adapter of an m×n weight from the shapes of all its parameters; None if they do not fit."""
    try:
        sizes = form.sizes(stored)
    except (KeyError, IndexError):
        return None
    return sizes if sizes.rank > 0 and form.shapes(m, n, sizes) == dict(stored) else None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which F.linear computes with x: that of autocast, where it is on, else its own."""
    kind = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(kind)


class AdaptedLinear(AdaptedModule):
    """nn.Linear: channels come last."""

    def base(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., n) to (..., m)."""
        return F.linear(x, self.weight, bias)

    def narrow(self, x: Tensor, matrix: Tensor) -> Tensor:
        """x (..., n) to (..., k)."""
        return F.linear(x, matrix)

    def wide(self, h: Tensor, matrix: Tensor) -> Tensor:
        """h (..., k) to (..., m)."""
        return F.linear(h, matrix)

    def along(self, vector: Tensor, like: Tensor) -> Tensor:
        """As it is."""
        return vector.to(like.dtype)


class AdaptedTransposed(AdaptedLinear):
    """Hugging Face's Conv1D: a matrix product, with the weight the other way round."""

    def base(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., n) to (..., m)."""
        return F.linear(x, self.weight.mT, bias)


class AdaptedConv(AdaptedModule):
    """nn.Conv1d, 2d, 3d of one group: channels come second; the k directions are filters, what follows them is 1×1."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str
    kernel_size: tuple[int, ...]
    _reversed_padding_repeated_twice: list[int]

    channels = 1

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in, *size) or (in, *size)."""
        if x.ndim == len(self.kernel_size) + 1:
            return super().forward(x.unsqueeze(0)).squeeze(0)
        return super().forward(x)

    @property
    def _pads_first(self) -> bool:
        return self.padding_mode != "zeros" or isinstance(self.padding, str)  # "same" may need one more on one side

    def prepared(self, x: Tensor) -> Tensor:
        """The input, padded where convolutions do not do that themselves."""
        x = super().prepared(x)
        if not self._pads_first:
            return x
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._reversed_padding_repeated_twice, mode=mode)

    def _convolve(self, x: Tensor, filters: Tensor, bias: Tensor | None = None) -> Tensor:
        padding = (0,) * len(self.kernel_size) if self._pads_first else cast("tuple[int, ...]", self.padding)
        geometry = ConvGeometry(self.kernel_size, self.stride, padding, self.dilation, 1)
        if filters.requires_grad or not torch.is_grad_enabled() or is_transformed():
            return CONVOLUTIONS[len(self.kernel_size)](x, filters, bias, *geometry[1:])
        y = frozen_convolution(x, filters.to(compute_dtype(filters)), geometry)
        return y if bias is None else y + self.along(bias, y)

    def base(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (N, in, *size) to (N, m, *positions)."""
        return self._convolve(x, self.weight, bias)

    def narrow(self, x: Tensor, matrix: Tensor) -> Tensor:
        """x (N, in, *size) to (N, k, *positions)."""
        return self._convolve(x, matrix.reshape(len(matrix), *self.weight.shape[1:]))

    def wide(self, h: Tensor, matrix: Tensor) -> Tensor:
        """h (N, k, *positions) to (N, m, *positions)."""
        return pointwise(h, matrix, None, 1)

    def along(self, vector: Tensor, like: Tensor) -> Tensor:
        """(m, 1, …)."""
        return vector.to(like.dtype).reshape(-1, *(1 for _ in self.kernel_size))


_OPERATIONS: dict[type[LowRankModule], type[AdaptedModule]] = {
    LinearWeight: AdaptedLinear,
    ConvWeight: AdaptedConv,
    TransposedWeight: AdaptedTransposed,
}


def why_not(module: nn.Module) -> str | None:
    """Why a layer cannot be adapted, as far as its class tells; None if it can."""
    dense_class = module.dense_class if isinstance(module, AdaptedModule) else type(module)
    kind = kind_of(dense_class)
    if kind is None or isinstance(module, LowRankModule):
        return f"{dense_class.__name__} has no adapted form"
    if kind.plain not in _OPERATIONS:
        return "torch's attention reads its weights itself, past any adapter"
    if lowrank_class(dense_class).mixin is not kind.quick:
        return f"{dense_class.__name__} has a forward pass of its own, which reads the weight past any adapter"
    if getattr(module, "groups", 1) != 1:
        return "a grouped convolution has no adapted form"
    return None


@cache
def adapted_class(form: Any, dense_class: Any) -> type[AdaptedModule]:
    """The subclass of a layer class with an adapter; made once, so that equal layers have equal classes."""
    kind = kind_of(dense_class)
    assert kind is not None
    body = {
        "form": form,
        "dense_class": dense_class,
        "kind": kind,
        "__module__": form.__module__,
        "__doc__": f"{dense_class.__name__} with an adapter.",
    }
    return type(f"{form.label}{dense_class.__name__}", (form, _OPERATIONS[kind.plain], dense_class), body)


def _empty_layer(form: type[AdaptedModule], dense_class: type[nn.Module]) -> nn.Module:
    """For pickle and copy: an adapted layer whose contents are yet to come."""
    cls = adapted_class(cast(Any, form), cast(Any, dense_class))
    return cls.__new__(cls)


def adapt(module: nn.Module, form: type[AdaptedModule], start: Mapping[str, Tensor]) -> AdaptedModule:
    """Gives a layer an adapter, in place, and freezes its weight; returns the same object.

    Args:
        module: a layer of a kind that can be adapted (`adaptable`), without an adapter.
        form: what the adapter computes.
        start: its parameters, as the `start` of the form's file makes them; kept in the weight's type, on its device.

    Raises:
        ValueError: if the layer cannot be adapted, or has an adapter already.
    """
    reason = "it has an adapter already" if isinstance(module, AdaptedModule) else why_not(module)
    if reason is not None:
        raise ValueError(f"a {type(module).__name__} cannot be given an adapter: {reason}")
    module.__class__ = cast(Any, adapted_class(cast(Any, form), cast(Any, type(module))))
    layer = cast(AdaptedModule, module)
    layer.weight.requires_grad_(False).grad = None
    for name in layer.names:
        value = start[name].detach().to(layer.weight, copy=True, memory_format=torch.contiguous_format)
        layer.register_parameter(name, nn.Parameter(value, name in form.trained))
    return layer


def strip(layer: AdaptedModule, *, merge: bool = False) -> None:
    """Takes a layer's adapter away, in place: its own class again, and its weight trained if the adapter was.

    Args:
        layer: the layer.
        merge: leave W' in the weight rather than what it held before.
    """
    if merge:
        layer.merge()
        layer._original = None
    layer.unmerge()
    layer.weight.requires_grad_(any(layer.parameter(name).requires_grad for name in layer.trained))
    for name in layer.names:
        del layer._parameters[name]
    vars(layer).pop("_original", None)
    layer.__class__ = cast(Any, layer.dense_class)


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, AdaptedModule]]:
    """Every adapted layer of a model with its name."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedModule):
            yield name, module
