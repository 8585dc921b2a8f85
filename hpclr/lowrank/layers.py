"""Layers whose weight is U Σ Vᵀ: what is common to all of them.

A layer is converted in place. Its object, name, hooks and other parameters stay; its class becomes a
subclass of its own class, made here, and its `weight` becomes `u`, `sigma`, `vh`. The Parameter `sigma`
*is* the Parameter that was `weight`, with other contents: an optimiser, a scheduler or a list kept for
clipping that holds it holds the right thing before and after.

There are two forms: here U and V are frozen and Σ is a matrix; in `svd_layers.py` all three are trained, and of Σ
there is only the diagonal, `s`.
"""

import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from hpclr.lowrank.factors import LowRankWarning, numerical_rank, svd
from hpclr.lowrank.product import FROZEN, Arithmetic, Factors


class Slot(NamedTuple):
    """A place in a module where a weight matrix lives: its name when dense, and as factors."""

    weight: str
    stem: str = ""
    core: str = "sigma"

    @property
    def names(self) -> tuple[str, str, str]:
        """The names of the parameters U, Σ and Vᵀ."""
        return _names(self.stem, self.core)


@cache
def _names(stem: str, core: str) -> tuple[str, str, str]:
    return f"{stem}u", f"{stem}{core}", f"{stem}vh"


class LowRankModule(nn.Module):
    """What a converted layer can do besides what its class could. Mixed in before that class."""

    slots: tuple[Slot, ...]
    mixin: type["LowRankModule"]  # the class was made from this one and the next
    dense_class: type[nn.Module]
    followers: int = 0  # embeddings that hold the same factors

    # what another form of the factors does in its own way
    label: ClassVar[str] = "LowRank"
    trains_bases: ClassVar[bool] = False
    arithmetic: ClassVar[Arithmetic] = FROZEN

    @staticmethod
    def core_of(s: Tensor) -> Tensor:
        """Σ, as this form keeps it, of k singular values."""
        return torch.diag(s)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The m×n view of a weight, or of anything shaped like it; m counts outputs."""
        return weight.flatten(1)

    def from_matrix(self, matrix: Tensor, slot: Slot) -> Tensor:
        """The inverse of `to_matrix`."""
        return matrix

    def is_lowrank(self, slot: Slot) -> bool:
        """Whether the weight of this slot is held as factors."""
        return slot.names[1] in self._parameters

    def factors(self, slot: Slot) -> Factors:
        """U, Σ, Vᵀ of a slot; U and V are frozen, in the form in which they must be."""
        (a, b, c), own = slot.names, self._parameters
        u, sigma, vh = own[a], own[b], own[c]
        assert u is not None and sigma is not None and vh is not None  # noqa: PT018 - one fact
        if not self.trains_bases and (u.requires_grad or vh.requires_grad) and not under_torch_func():
            _refreeze(u, vh, type(self).__name__)
        return Factors(u, sigma, vh)

    def factors_in_use(self, slot: Slot) -> Factors:
        """Those that a forward pass multiplies by: all of them, but in training a method may leave some out."""
        return self.factors(slot)

    def take_all(self, slot: Slot) -> None:
        """Has forward passes multiply by all factors of a slot again."""

    def dense_weight(self, slot: Slot) -> Tensor:
        """The weight as its class knows it; a differentiable function of what is trained of its factors."""
        if not self.is_lowrank(slot):
            weight = self._parameters[slot.weight]
            assert weight is not None
            return weight
        return self.from_matrix(self.arithmetic.dense(self.factors_in_use(slot)), slot)

    def extra_repr(self) -> str:
        """What the class prints of itself, and the ranks."""
        ranks = [f"{slot.stem}rank={self.factors(slot).sigma.shape[0]}" for slot in self.slots if self.is_lowrank(slot)]
        return ", ".join(filter(None, [super().extra_repr(), *ranks]))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made at run time, so pickle and copy are told how to make it again
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _empty_layer, (self.mixin, self.dense_class), state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for slot in self.slots:
            weight = state_dict.get(prefix + slot.weight)
            if weight is not None and self.is_lowrank(slot):
                del state_dict[prefix + slot.weight]
                factors = self._decompose(weight, slot)
                state_dict.update({prefix + name: value for name, value in zip(slot.names, factors, strict=True)})
            sigma = state_dict.get(prefix + slot.names[1])
            if sigma is not None and holds(self, slot) and sigma.shape != self._sigma_shape(slot):
                self.resize(slot, int(sigma.shape[0]))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _sigma_shape(self, slot: Slot) -> torch.Size | None:
        sigma = self._parameters.get(slot.names[1])
        return None if sigma is None else sigma.shape

    def _decompose(self, weight: Tensor, slot: Slot) -> Factors:
        """A dense weight for a factored slot: as many directions as it has, so that nothing is lost."""
        u, s, vh = svd(self.to_matrix(weight))
        k = max(1, numerical_rank(s, (u.shape[0], vh.shape[1])))
        dtype = self.factors(slot).sigma.dtype
        return Factors(*(part.to(dtype) for part in (u[:, :k], self.core_of(s[:k]), vh[:k])))

    def resize(self, slot: Slot, rank: int) -> None:
        """Gives a slot factors of this rank with contents still to come (from a state dict)."""
        like = self._parameters.get(slot.names[1])
        like = self._parameters[slot.weight] if like is None else like
        m, n = self.matrix_shape(slot)
        assert like is not None
        u, s, vh = (torch.zeros(size, dtype=like.dtype, device=like.device) for size in ((m, rank), rank, (rank, n)))
        install(self, slot, u, self.core_of(s), vh)

    def matrix_shape(self, slot: Slot) -> tuple[int, int]:
        """(m, n) of the weight seen as a matrix."""
        if self.is_lowrank(slot):
            u, _, vh = self.factors(slot)
            return u.shape[0], vh.shape[1]
        m, n = self.to_matrix(self.dense_weight(slot)).shape
        return m, n


def under_torch_func() -> bool:
    """There whatever is differentiated with regard to requires gradients, which says nothing of what is trained."""
    return bool(torch._C._are_functorch_transforms_active())


def _refreeze(u: Tensor, vh: Tensor, layer: str) -> None:
    """Whoever calls `model.requires_grad_(True)` means the weights, not the frozen bases."""
    warnings.warn(
        f"the frozen factors u and vh of a {layer} had been set to require gradients; they are frozen again. "
        "Only sigma is trained; to train the whole weight, convert back with hpclr.lowrank.densify(model).",
        LowRankWarning,
        stacklevel=4,
    )
    for factor in (u, vh):
        factor.requires_grad_(False)
        factor.grad = None


def holds(module: nn.Module, slot: Slot) -> bool:
    """Whether a module has this weight at all, dense or factored: attention has one packed, or three separate."""
    if isinstance(module, LowRankModule) and module.is_lowrank(slot):
        return True
    return module._parameters.get(slot.weight) is not None


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, of which each process holds a part.

    Asked in this way since torch.distributed.tensor takes longer to import than the rest of this room.
    """
    return hasattr(type(tensor), "full_tensor")


def refuse_shards(parameter: nn.Parameter) -> None:
    """Raises TypeError for a parameter of which each process holds a part."""
    if is_sharded(parameter):
        raise TypeError(
            "the weight is sharded over the processes, and what is here is a part of it, which cannot change its form "
            "or contents alone: OIALR does that for a model given to it as hpclr.parallel.Sharded; for anything else "
            "take the weights out with its full_state_dict()"
        )


def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Gives a Parameter other contents of any shape, keeping its identity.

    A graph of an earlier step that is still referenced (a `loss` variable, usually) keeps the parameter's
    gradient accumulator alive, which remembers the old shape and would refuse the new gradient. A change of
    type on the way makes torch forget it. Where the shape stays, so does the accumulator, on which data
    parallelism has its hooks.

    Raises:
        TypeError: for a sharded one.
    """
    refuse_shards(parameter)
    if parameter.shape != data.shape:
        other = torch.float16 if parameter.dtype != torch.float16 else torch.float32
        parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = data
    parameter.grad = None


def install(layer: LowRankModule, slot: Slot, u: Tensor, sigma: Tensor, vh: Tensor) -> nn.Parameter:
    """Puts factors (or other factors) into a slot; returns the Parameter that was the weight, Σ."""
    u_name, sigma_name, vh_name = slot.names
    if layer.is_lowrank(slot):
        trained = layer._parameters[sigma_name]
        for name, value in ((u_name, u), (vh_name, vh)):
            basis = layer._parameters[name]
            assert basis is not None
            replace_data(basis, value)
    else:
        trained = layer._parameters[slot.weight]
        assert trained is not None
        refuse_shards(trained)
        new_u, new_vh = (nn.Parameter(value, trained.requires_grad and layer.trains_bases) for value in (u, vh))
        rename(layer, {slot.weight: {u_name: new_u, sigma_name: trained, vh_name: new_vh}})
    assert trained is not None
    replace_data(trained, sigma)
    return trained


def uninstall(layer: LowRankModule, slot: Slot) -> None:
    """Makes a slot dense again; its Parameter holds the product, and is trained if any of the factors was."""
    u_name, sigma_name, vh_name = slot.names
    core = layer._parameters[sigma_name]
    assert core is not None
    refuse_shards(core)
    with torch.no_grad():
        weight = layer.from_matrix(layer.arithmetic.dense(layer.factors(slot)), slot).contiguous()
    core.requires_grad_(any(factor.requires_grad for factor in layer.factors(slot)))
    layer.take_all(slot)
    rename(layer, {u_name: {}, sigma_name: {slot.weight: core}, vh_name: {}})
    replace_data(core, weight)


def share(holder: nn.Module, layer: LowRankModule, slot: Slot) -> None:
    """Has a further module hold what a layer holds in a slot, the weight or its factors: the very same Parameters."""
    names = slot.names if layer.is_lowrank(slot) else (slot.weight,)
    held = {name: parameter for name in names if (parameter := layer._parameters[name]) is not None}
    first, *others = [name for name in (slot.weight, *slot.names) if name in holder._parameters]
    rename(holder, {first: held} | {name: {} for name in others})


def rename(layer: nn.Module, changes: dict[str, dict[str, nn.Parameter]]) -> None:
    """Replaces parameters by others in their very places: the order of `parameters()` is part of a contract."""
    entries: dict[str, nn.Parameter | None] = {}
    for name, parameter in layer._parameters.items():
        entries.update(changes.get(name, {name: parameter}))
    layer._parameters.clear()
    layer._parameters.update(entries)


def _empty_layer(mixin: type[LowRankModule], dense_class: type[nn.Module]) -> nn.Module:
    """For pickle and copy: a converted layer whose contents are yet to come."""
    cls = make_class(cast(Any, mixin), cast(Any, dense_class))
    return cls.__new__(cls)


def _weight_property(slot: Slot) -> property:
    def read(self: LowRankModule) -> Tensor | None:
        return self.dense_weight(slot) if self.is_lowrank(slot) else self._parameters[slot.weight]

    return property(read, doc=f"The dense {slot.weight}, rebuilt from its factors where it has been converted.")


@cache
def make_class(mixin: Any, dense_class: Any) -> type[LowRankModule]:
    """The low-rank subclass of a layer class; made once, so that equal layers have equal classes."""
    body: dict[str, Any] = {slot.weight: _weight_property(slot) for slot in mixin.slots}
    body.update(
        mixin=mixin,
        dense_class=dense_class,
        __module__=mixin.__module__,
        __doc__=f"{dense_class.__name__} with factored weights.",
    )
    return type(f"{mixin.label}{dense_class.__name__}", (mixin, dense_class), body)


def lowrank_modules(model: nn.Module) -> Iterator[tuple[str, LowRankModule]]:
    """Every converted layer of a model with its name."""
    for name, module in model.named_modules():
        if isinstance(module, LowRankModule):
            yield name, module
