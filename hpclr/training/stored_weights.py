"""The weights in a checkpoint, from the file alone: no model is built and nothing that it names is imported."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from hpclr.checkpoint import Json, Tree
from hpclr.errors import UsageError
from hpclr.lowrank.adapters import AdaptedWeight, adapter_names, check_adapters, looks_adapted, merged_state_dict
from hpclr.lowrank.interchange import FactoredWeight, check_factors, looks_factored

Layers = dict[str, FactoredWeight]
Adapters = dict[str, AdaptedWeight]


class StoredWeights(NamedTuple):
    """A state dict, which of its entries are factors or adapters of what, whether they are averages, and merged.

    What the model held under several names is one tensor.
    """

    state: dict[str, Tensor]
    layers: Layers
    adapters: Adapters
    averaged: bool
    merged: bool = False


def stored_weights(tree: Tree, path: Path, *, average: bool = True, merge: bool = True) -> StoredWeights:
    """The weights in a checkpoint's tree.

    Args:
        tree: the content of the file.
        path: the file, for messages.
        average: take the averaged weights where the run keeps them: those that it is judged by.
        merge: merge adapters into their weights, rather than to leave them beside these.

    Raises:
        UsageError: if the file has no model or describes it wrongly, says nothing of the factors that it holds, or
            holds adapters that cannot be merged.
    """
    model = tree.get("model")
    if not isinstance(model, Mapping):
        raise UsageError(f"{path}: expected a checkpoint with an entry 'model', found only {', '.join(tree) or 'none'}")
    state = {key: value for key, value in model.items() if isinstance(value, Tensor)}
    layers = _layers(tree, state, path)
    averages = _averages(tree) if average else {}
    tied = _tied(tree, path)
    aliases = {name: first for name, first in tied.items() if first in averages}
    with_aliases = averages | {name: averages[first] for name, first in aliases.items()}
    for name, value in with_aliases.items():
        if name not in state or state[name].shape != value.shape:
            found = f"shape {tuple(state[name].shape)}" if name in state else "no such entry"
            raise UsageError(
                f"{path}: ema: the average of '{name}' has shape {tuple(value.shape)}, the model {found}. The file is "
                "damaged or was not written by hpclr: use another checkpoint."
            )
        state[name] = value.to(state[name].dtype)
    _join(state, tied)
    adapters = _adapters(tree, state, path)
    if adapters and merge:
        return StoredWeights(_merged(state, adapters, path), layers, {}, bool(averages), merged=True)
    return StoredWeights(state, layers, adapters, bool(averages))


def place_of(tensor: Tensor) -> tuple[int, torch.Size]:
    """Where its numbers are: the same for two names of one parameter."""
    return tensor.data_ptr(), tensor.shape


def once(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    """Those of several names once."""
    return {place_of(tensor): tensor for tensor in tensors}.values()


def _join(state: dict[str, Tensor], tied: Mapping[str, str]) -> None:
    """What the model held under several names is one tensor again, unless somebody has changed one of them."""
    for name, first in tied.items():
        one, other = state.get(name), state.get(first)
        if one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other):
            state[name] = other


def _adapters(tree: Tree, state: Mapping[str, Tensor], path: Path) -> Adapters:
    try:
        adapters: Adapters = msgspec.convert(_json(tree, "adapters") or {}, Adapters)
        check_adapters(state, adapters)
        if spare := set(looks_adapted(state)) - set(adapter_names(adapters)):
            raise ValueError(f"expected a description of every adapter, found none of {', '.join(sorted(spare)[:3])}")
    except ValueError as error:
        raise UsageError(
            f"{path}: adapters: {error}. The file is damaged or was not written by hpclr: use another."
        ) from error
    return adapters


def _merged(state: Mapping[str, Tensor], adapters: Adapters, path: Path) -> dict[str, Tensor]:
    try:
        return merged_state_dict(state, adapters)
    except ValueError as error:
        raise UsageError(f"{path}: {error}. `hpclr export --adapter` writes adapters by themselves.") from error


def parse_layers(value: Any, state: Mapping[str, Tensor], where: str) -> Layers:
    """The description of factored weights as read from JSON, checked against the state dict that it describes.

    Raises:
        UsageError: if it is malformed, or does not fit.
    """
    try:
        layers: Layers = msgspec.convert(value, Layers)
        check_factors(state, layers)
    except ValueError as error:
        raise UsageError(
            f"{where}: layers: {error}. The file is damaged or was not written by hpclr: use another."
        ) from error
    return layers


def _layers(tree: Tree, state: Mapping[str, Tensor], path: Path) -> Layers:
    if "layers" in tree:
        return parse_layers(_json(tree, "layers"), state, str(path))
    if name := looks_factored(state):
        layer = name.removesuffix("sigma").removesuffix("s").rstrip("._")
        raise UsageError(
            f"{path}: it holds factored layers (such as {layer}) but no entry 'layers', which says what dense weights "
            "they make up: an older hpclr has written it. Continue the run with this hpclr (`hpclr train`), which "
            "saves a new checkpoint, and use that one."
        )
    return {}


def _averages(tree: Tree) -> dict[str, Tensor]:
    ema = tree.get("ema")
    found = ema.get("averages") if isinstance(ema, Mapping) else None
    return {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}


def _tied(tree: Tree, path: Path) -> dict[str, str]:
    try:
        tied: dict[str, str] = msgspec.convert(_json(tree, "tied") or {}, dict[str, str])
    except ValueError as error:
        raise UsageError(
            f"{path}: tied: {error}. The file is damaged or was not written by hpclr: use another."
        ) from error
    return tied


def _json(tree: Tree, key: str) -> Any:
    item = tree.get(key)
    return item.value if isinstance(item, Json) else None
