"""Whole models: which layers can have an adapter, adapters away, merged and not, and state dicts of adapters alone."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hpclr.lowrank.adapters.edora import EDoRALayer
from hpclr.lowrank.adapters.layers import (
    AdaptedModule,
    Sizes,
    adapt,
    adapted_modules,
    sizes_stored,
    strip,
    why_not,
)
from hpclr.lowrank.adapters.mo_sara import MoSARALayer
from hpclr.lowrank.adapters.sara import SARALayer
from hpclr.lowrank.sites import WeightSite, select

FORMS: dict[str, type[AdaptedModule]] = {"sara": SARALayer, "mo_sara": MoSARALayer, "edora": EDoRALayer}
_FORM_OF = {name: form for form in FORMS.values() for name in (*form.frozen, *form.trained)}


@dataclass(frozen=True)
class Adaptable:
    """Which layers of a model can have an adapter.

    Attributes:
        sites: layer name → its weight, in registration order.
        left_alone: layer name → why it is left alone.
        head: the last layer of an eligible kind, if `keep_last` alone keeps it from having an adapter.
    """

    sites: dict[str, WeightSite]
    left_alone: dict[str, str]
    head: WeightSite | None


def adaptable(model: nn.Module, *, keep_last: bool = False, **choice: Any) -> Adaptable:
    """Finds the layers that can have an adapter: nn.Linear, Hugging Face's Conv1D and convolutions of one group.

    Arguments, errors and reasons are those of `hpclr.lowrank.select`, but that it does not matter whether a weight is
    frozen: under an adapter it will be. Layers that have one count as eligible.
    """
    with _as_if_trained(model):
        chosen = select(model, keep_last=keep_last, **choice)
        head = _kept_last(model) if keep_last else None
    reasons = {site.name: reason for site in chosen.candidates if (reason := _why_not(site))}
    left_alone = {name: reasons.get(name, reason) for name, reason in chosen.left_alone.items()} | reasons
    sites = {site.name: site for site in chosen.eligible if site.name not in reasons}
    order = [name for name in chosen.order if name in left_alone]
    return Adaptable(sites, {name: _in_our_words(left_alone[name]) for name in order}, head)


def _kept_last(model: nn.Module) -> WeightSite | None:
    """The last candidate, unless something else (it is tied, say) keeps it from being trained."""
    kept = {site.name for site in select(model, keep_last=True).eligible}
    return next((site for site in select(model).eligible if site.name not in kept), None)


def _why_not(site: WeightSite) -> str | None:
    if site.owner is not None:
        return "torch's attention reads the weight of its output projection itself, past any adapter"
    return why_not(site.module)


def _in_our_words(reason: str) -> str:
    return reason.replace("kept dense as", "without an adapter as").replace("low-rank form", "adapted form")


@contextmanager
def _as_if_trained(model: nn.Module) -> Iterator[None]:
    """In the block all that can require gradients does, so that nothing is passed over for being frozen."""
    frozen = [p for p in model.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    try:
        for parameter in frozen:
            parameter.requires_grad = True
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad = False


def remove_adapters(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Gives every adapted layer its own class and its base weight back, to the bit, in place; returns the model.

    A weight is trained again if its adapter was. Optimisers are not told.

    Args:
        model: with or without adapters.
        merge: leave W' in the weights, for good.

    Raises:
        ValueError: if `merge` is wanted of adapters that cannot be merged; then nothing is changed.
    """
    if merge:
        merge_adapters(model)
    for _, layer in list(adapted_modules(model)):
        strip(layer, merge=merge)
    return model


def merge_adapters(model: nn.Module) -> None:
    """Has every adapted layer compute with W' alone; `unmerge_adapters` gives the base weights back to the bit.

    State dicts of a merged model are those of the unmerged one. A merged model refuses to be trained.

    Raises:
        ValueError: if the adapters cannot be merged (Mo-SARA); then nothing is changed.
    """
    layers = [layer for _, layer in adapted_modules(model)]
    try:
        for layer in layers:
            layer.merge()
    except ValueError:
        unmerge_adapters(model)
        raise


def unmerge_adapters(model: nn.Module) -> None:
    """Gives the weights of merged layers what they held before, to the bit."""
    for _, layer in adapted_modules(model):
        layer.unmerge()


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of all adapters, frozen bases included, by their names in the model's state dict."""
    return {
        f"{path}.{name}" if path else name: layer.parameter(name).detach()
        for path, layer in adapted_modules(model)
        for name in layer.names
    }


def is_of_adapter(name: str) -> bool:
    """Whether an entry of a state dict is, by its name, a parameter of an adapter."""
    return name.rpartition(".")[2] in _FORM_OF


class _Stored(NamedTuple):
    """What a state dict says of the adapter of one layer."""

    form: type[AdaptedModule]
    shapes: dict[str, tuple[int, ...]]


def shape_model_like_adapters(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Gives the layers for which `state` holds adapters such adapters, contents to come.

    Args:
        model: without adapters for these layers, or with ones of the same form, whatever their ranks.
        state: names in a state dict → anything that has a shape; names that are not those of adapters are passed over.

    Raises:
        ValueError: naming the first three differences, if the adapters do not fit the model, which is not changed then.
    """
    stored, _ = _by_layer(state)
    planned, differences = _planned(model, stored)
    _refuse(differences)
    for path, (form, sizes) in planned.items():
        module = model.get_submodule(path)
        if not isinstance(module, AdaptedModule):
            adapt(module, form, _blank(module, stored[path]))
        else:
            module.resize(sizes)


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Loads what `adapter_state_dict` gave, into the base model or one with adapters of the same form.

    The weights under the adapters are frozen, and must be those on which the adapters were trained.

    Raises:
        ValueError: naming the first three differences, if the adapters do not fit the model, or the model has others
            beside them, or their numbers are not finite in its type; the model is not changed then.
    """
    _refuse(adapter_differences(model, state))
    shape_model_like_adapters(model, state)
    unmerge_adapters(model)
    with torch.no_grad():
        for name, value in state.items():
            model.get_parameter(name).copy_(value)


def adapter_differences(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """All that keeps `load_adapter_state_dict` from loading a state dict into a model."""
    stored, unknown = _by_layer(state)
    planned, differences = _planned(model, stored)
    faults = [
        unsound(key, state[key], cast(Tensor, model.get_submodule(path).weight))
        for path in planned
        for key in (f"{path}.{name}" if path else name for name in stored[path].shapes)
    ]
    spare = [
        f"layer '{path}' has an adapter, and none is stored" for path, _ in adapted_modules(model) if path not in stored
    ]
    other = [f"'{name}' is no parameter of an adapter" for name in unknown]
    return other + differences + [fault for fault in faults if fault] + spare


def unsound(name: str, value: Tensor, like: Tensor) -> str | None:
    """Why an entry of a file cannot be the contents of a model's tensor whose shape it has; None if it can."""
    own = str(like.dtype).removeprefix("torch.")
    if value.is_complex() != like.is_complex() or value.is_floating_point() != like.is_floating_point():
        return f"'{name}' is {str(value.dtype).removeprefix('torch.')}, in the model {own}"
    bad = int((~value.to(like.dtype).isfinite()).sum())
    return f"{bad} of the {value.numel()} numbers of '{name}' are not finite as {own}" if bad else None


def _by_layer(state: Mapping[str, Any]) -> tuple[dict[str, _Stored], list[str]]:
    """Module path → its adapter as stored; and the names that are not of adapters."""
    stored: dict[str, _Stored] = {}
    unknown = []
    for key, value in state.items():
        path, _, name = key.rpartition(".")
        if name in _FORM_OF:
            entry = stored.setdefault(path, _Stored(_FORM_OF[name], {}))
            entry.shapes[name] = tuple(value.shape)
        else:
            unknown.append(key)
    return stored, unknown


def _planned(
    model: nn.Module, stored: Mapping[str, _Stored]
) -> tuple[dict[str, tuple[type[AdaptedModule], Sizes]], list[str]]:
    """The adapters to make, by module path; and all that does not fit."""
    found = adaptable(model)
    sites = {site.path: site for site in found.sites.values()}
    planned, differences = {}, []
    for path, entry in stored.items():
        if path not in sites:
            reason = found.left_alone.get(path, "the model has no such layer")
            differences.append(f"layer '{path}' cannot have an adapter: {reason}")
            continue
        sizes, difference = _fitted(sites[path], entry)
        differences += [difference] if difference else []
        if sizes:
            planned[path] = (entry.form, sizes)
    return planned, differences


def _fitted(site: WeightSite, entry: _Stored) -> tuple[Sizes | None, str | None]:
    """The sizes of the adapter stored for a layer; or what does not fit."""
    if isinstance(site.module, AdaptedModule) and site.module.form is not entry.form:
        return (
            None,
            f"layer '{site.name}' has an adapter of {site.module.label}, and one of {entry.form.label} is stored",
        )
    m, n = site.module.matrix_shape if isinstance(site.module, AdaptedModule) else site.shape
    sizes = sizes_stored(entry.form, entry.shapes, m, n)
    if sizes is not None:
        return sizes, None
    shapes = ", ".join(f"{name} {'×'.join(map(str, shape)) or 'a number'}" for name, shape in entry.shapes.items())
    return None, f"layer '{site.name}' has a weight of {m}×{n}, which {shapes} do not fit"


def _blank(module: nn.Module, entry: _Stored) -> dict[str, Tensor]:
    weight: Any = module.weight
    return {name: weight.new_zeros(shape) for name, shape in entry.shapes.items()}


def _refuse(differences: Sequence[str]) -> None:
    if differences:
        raise ValueError(
            f"the adapters do not fit the model: {first_three(differences)}. Load them into the model on which they "
            "were trained"
        )


def first_three(differences: Sequence[str]) -> str:
    """For a message: three of them, and how many more there are."""
    more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
    return f"{'; '.join(differences[:3])}{more}"
