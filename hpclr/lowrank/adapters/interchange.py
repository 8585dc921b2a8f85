"""Adapters on their way to programs that know nothing of them: merged into the weights, from a state dict alone.

What `adapted_weights` says of a model goes beside its state dict, as `hpclr.lowrank.interchange` does for factors.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, nn

from hpclr.lowrank.adapters.layers import adapt, adapted_modules, sizes_stored
from hpclr.lowrank.adapters.whole import FORMS, is_of_adapter
from hpclr.lowrank.interchange import cast_state_dict
from hpclr.lowrank.kinds import TransposedWeight

LORA = "lora"  # PEFT's, of which hpclr knows the arithmetic alone: W' = W + scale · B A


@dataclass(frozen=True)
class AdaptedWeight:
    """A weight with an adapter, and where both are.

    Attributes:
        form: of the adapter, a key of `FORMS`, or "lora".
        weight: the base weight's name in the state dict.
        parts: the adapter's parameters, by their names in the form → their names in the state dict.
        transposed: whether the weight is the transpose of its m×n matrix (Hugging Face's Conv1D).
        scale: of LoRA, the factor α/r on its update.
        renamed: names in the state dict → those in that of the model without adapters, where they differ.
    """

    form: str
    weight: str
    parts: dict[str, str]
    transposed: bool = False
    scale: float = 1.0
    renamed: dict[str, str] | None = None


def adapted_weights(model: nn.Module) -> dict[str, AdaptedWeight]:
    """Every weight with an adapter by the name of its layer."""
    form_names = {form: name for name, form in FORMS.items()}
    return {
        path: AdaptedWeight(
            form=form_names[layer.form],
            weight=_joined(path, "weight"),
            parts={name: _joined(path, name) for name in layer.names},
            transposed=layer.kind.plain is TransposedWeight,
        )
        for path, layer in adapted_modules(model)
    }


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def check_adapters(state: Mapping[str, Tensor], adapters: Mapping[str, AdaptedWeight]) -> None:
    """Checks that a state dict holds the adapters that a description names, and that they fit their weights.

    Raises:
        ValueError: naming the layer, and what does not fit.
    """
    uses = Counter(key for entry in adapters.values() for key in (entry.weight, *entry.parts.values()))
    for name, entry in adapters.items():
        if fault := _not_there(state, entry) or _contradiction(state, entry) or _unfit(state, entry):
            raise ValueError(f"layer '{name}': {fault}")
        if twice := [key for key in (entry.weight, *entry.parts.values()) if uses[key] > 1]:
            raise ValueError(f"layer '{name}': {twice[0]} has an adapter, or is part of one, twice")
    _check_new_names(state, adapters)


def _not_there(state: Mapping[str, Tensor], entry: AdaptedWeight) -> str | None:
    missing = [key for key in (entry.weight, *entry.parts.values()) if key not in state]
    if missing:
        return f"expected {', '.join(missing)}, which are not there"
    if entry.form not in (*FORMS, LORA):
        return f"expected an adapter of {', '.join((*FORMS, LORA))}, found {entry.form!r}"
    found = {key: state[key].dtype for key in (entry.weight, *entry.parts.values())}
    other = [f"{key} of {kind}" for key, kind in found.items() if not kind.is_floating_point]
    return f"expected real numbers, found {', '.join(other)}" if other else None


def _contradiction(state: Mapping[str, Tensor], entry: AdaptedWeight) -> str | None:
    """What a description says that cannot be of its own form, or of this weight."""
    dimensions = state[entry.weight].ndim
    if dimensions < 2:
        return f"expected a matrix or a convolution, found {entry.weight} of one dimension"
    if entry.transposed and dimensions != 2:
        return f"expected a matrix, as it is to be transposed, found {entry.weight} of {dimensions} dimensions"
    if not isfinite(entry.scale) or (entry.form != LORA and entry.scale != 1):
        return f"expected {'a finite scale' if entry.form == LORA else 'no scale'}, found {entry.scale!r}"
    if entry.form != LORA and entry.renamed:
        return f"expected no other names of its parameters, found {', '.join(entry.renamed.values())}"
    return None


def _unfit(state: Mapping[str, Tensor], entry: AdaptedWeight) -> str | None:
    m, n = _matrix(state[entry.weight], entry).shape
    shapes = {part: tuple(state[key].shape) for part, key in entry.parts.items()}
    fits = _lora_fits(shapes, m, n) if entry.form == LORA else sizes_stored(FORMS[entry.form], shapes, m, n)
    return None if fits else f"an adapter ({entry.form}) of {shapes} does not fit a weight of {m}×{n}"


def _check_new_names(state: Mapping[str, Tensor], adapters: Mapping[str, AdaptedWeight]) -> None:
    """The names without adapters must be of entries that are there, each of one alone."""
    inside = set(adapter_names(adapters))
    names = _new_names(adapters)
    if unknown := [old for old in names if old not in state or old in inside]:
        raise ValueError(f"expected other names of weights that are there, found one of {unknown[0]}")
    counts = Counter(names.get(key, key) for key in state if key not in inside)
    if twice := [new for new in names.values() if counts[new] > 1]:
        raise ValueError(f"without adapters two entries would have the name {twice[0]}")


def _new_names(adapters: Mapping[str, AdaptedWeight]) -> dict[str, str]:
    return {old: new for entry in adapters.values() for old, new in (entry.renamed or {}).items()}


def adapter_names(adapters: Mapping[str, AdaptedWeight]) -> list[str]:
    """The names in the state dict of all parameters of the adapters."""
    return [key for entry in adapters.values() for key in entry.parts.values()]


def looks_adapted(names: Collection[str]) -> list[str]:
    """Those entries of a state dict that are, by their names, parameters of adapters, of LoRA's too."""
    return [name for name in names if is_of_adapter(name) or ".lora_A." in name or ".lora_B." in name]


def rank_stored(entry: AdaptedWeight, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The rank of an adapter from the shapes of a state dict's entries; None if they cannot be of this form."""
    try:
        own = {part: tuple(shapes[key]) for part, key in entry.parts.items()}
        return own["lora_A"][0] if entry.form == LORA else FORMS[entry.form].sizes(own).rank
    except (KeyError, IndexError):
        return None


def _lora_fits(shapes: Mapping[str, tuple[int, ...]], m: int, n: int) -> bool:
    if set(shapes) != {"lora_A", "lora_B"}:
        return False
    a, b = (torch.empty(shapes[name], device="meta") for name in ("lora_A", "lora_B"))
    if a.ndim < 2 or b.ndim < 2:
        return False
    (rank, columns), (rows, other) = a.flatten(1).shape, b.flatten(1).shape
    return (rows, columns) == (m, n) and rank == other


def merged_state_dict(state: Mapping[str, Tensor], adapters: Mapping[str, AdaptedWeight]) -> dict[str, Tensor]:
    """The state dict of the model without adapters that computes the same; in float64, rounded once.

    Raises:
        ValueError: if state and description do not fit, the adapters cannot be merged (Mo-SARA), or a merged weight is
            too large for its type.
    """
    check_adapters(state, adapters)
    by_weight = {entry.weight: entry for entry in adapters.values()}
    inside = set(adapter_names(adapters))
    names = _new_names(adapters)
    return {
        names.get(key, key): _merged(state, by_weight[key]) if key in by_weight else value
        for key, value in state.items()
        if key not in inside
    }


@torch.no_grad()
def _merged(state: Mapping[str, Tensor], entry: AdaptedWeight) -> Tensor:
    weight = state[entry.weight]
    matrix = _matrix(weight, entry).double()
    parts = {name: state[key].double() for name, key in entry.parts.items()}
    if entry.form == LORA:
        result = matrix + entry.scale * parts["lora_B"].flatten(1) @ parts["lora_A"].flatten(1)
    else:
        stand_in = nn.Linear(1, 1, bias=False)  # of its class only the arithmetic is wanted
        stand_in.weight = nn.Parameter(matrix)
        result = adapt(stand_in, FORMS[entry.form], parts).corrected()
    result = (result.mT if entry.transposed else result).reshape(weight.shape)
    return cast_state_dict({entry.weight: result}, weight.dtype)[entry.weight].contiguous()


def _matrix(weight: Tensor, entry: AdaptedWeight) -> Tensor:
    """The weight (m×n)."""
    return weight.mT if entry.transposed else weight.flatten(1)
