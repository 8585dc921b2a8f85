"""Adapters in files of their own: what fine-tuning has learned, without the pretrained weights.

Such a file holds the parameters of the adapters with their frozen bases, what else was trained, such as a head, and the
running statistics of normalisation layers, which follow the data in training, by their names in the model's state dict;
and beside them fingerprints of the weights under the adapters. It is safetensors, or HDF5 with a group `adapter`.
"""

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from hpclr.checkpoint import Json, load_file, write_tree
from hpclr.checkpoint.digest import check_digest, sha256_of, sidecar_of, write_sidecar
from hpclr.errors import UsageError
from hpclr.lowrank.adapters import adapted_modules, adapter_state_dict, is_of_adapter, load_adapter_state_dict
from hpclr.lowrank.adapters.whole import adapter_differences, first_three, unsound
from hpclr.lowrank.factors import LowRankWarning
from hpclr.methods.adapting import freeze_rest
from hpclr.methods.checks import check_model, placement_of
from hpclr.training.fingerprints import compare, fingerprints
from hpclr.training.run_directory import reading
from hpclr.training.written_files import written_whole
from hpclr.version import __version__

_GROUP = "adapter"
_BASE = "base"  # among the facts: fingerprints
_RUNNING = ("running_mean", "running_var", "num_batches_tracked")
SUFFIXES = (".safetensors", ".h5")


def save_adapter(model: nn.Module, path: Path | str) -> None:
    """Writes a model's adapters, and what else of it trains, to a file, whole or not at all.

    Args:
        model: with adapters, merged or not; of one in a wrapper, such as a `hpclr.parallel.Replica`, the names inside
            it are written.
        path: ends in .safetensors or .h5; a file that is there is replaced.

    Raises:
        UsageError: if the model has no adapters, or the file cannot be written.
    """
    model = _inside(model)
    if not any(adapted_modules(model)):
        raise UsageError(f"{path}: the model has no adapters that could be saved")
    state = model.state_dict()
    own = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    bases = [f"{layer}.weight" if layer else "weight" for layer, _ in adapted_modules(model)]
    write_adapter(Path(path), own | adapter_state_dict(model) | running_statistics(state), about_base(state, bases))


def _inside(model: nn.Module) -> nn.Module:
    """The model without wrappers, which add to the names of its parameters."""
    outer: Any = model
    return check_model(outer.module if isinstance(outer, (DataParallel, DistributedDataParallel)) else outer)


def running_statistics(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a state dict those entries that normalisation layers keep of the data they were trained on."""
    return {name: value for name, value in state.items() if name.rpartition(".")[2] in _RUNNING}


def about_base(state: Mapping[str, Tensor], weights: Collection[str]) -> dict[str, str]:
    """What `write_adapter` is to say of the weights under the adapters."""
    return {_BASE: fingerprints({name: state[name] for name in weights})}


def write_adapter(path: Path, entries: Mapping[str, Tensor], facts: Mapping[str, str], step: int = 0) -> None:
    """Writes entries of a state dict, after so many steps of training, as a file of an adapter.

    Raises:
        UsageError, RetryableError: if it cannot be written.
    """
    check_suffix(path)
    content = {  # copies: of a layer that is used twice safetensors would refuse the memory that is shared
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in entries.items()
    }
    about = {"hpclr": __version__, **facts}
    with written_whole(path) as temporary:
        if path.suffix == ".h5":
            write_sidecar(temporary, write_tree(temporary, {_GROUP: content, "export": Json(about)}, {"step": step}))
        else:
            save_file(content, temporary, {"format": "pt", **about})
            write_sidecar(temporary, sha256_of(temporary))


def load_adapter(model: nn.Module, path: Path | str, *, any_base: bool = False) -> None:
    """Gives a model the adapters in a file, and what else was trained with them; all else is frozen.

    Args:
        model: as it was pretrained, or with adapters of the same form; or a `hpclr.parallel.Replica` of one.
        path: as `save_adapter` or `hpclr export --adapter` writes it.
        any_base: load it also onto other weights than those under which it was trained.

    Raises:
        UsageError: if it is no such file, is damaged, or does not fit the model, naming the first three differences;
            the model is not changed then.
        TypeError: for a model wrapped in DistributedDataParallel, which cannot follow.

    Warns:
        LowRankWarning: if the weights under the adapters are the same but for rounding to another type, or others and
            `any_base` allows that, or the file does not say what they were.
    """
    stored, replica, model = _read(Path(path)), model, check_model(model)
    state = model.state_dict(keep_vars=True)
    others, remark = _compared_base(stored.facts, state, any_base, Path(path))
    own = {name: value for name, value in stored.entries.items() if not is_of_adapter(name)}
    adapters = {name: value for name, value in stored.entries.items() if is_of_adapter(name)}
    under = {name.rpartition(".")[0] for name in adapters}
    of_own = (_difference(name, value, state.get(name), under) for name, value in own.items())
    wrong = [*adapter_differences(model, adapters), *filter(None, of_own), *others]
    if wrong:
        raise UsageError(f"{path}: it does not fit the model: {first_three(wrong)}")
    if remark:
        warnings.warn(f"{path}: {remark}", LowRankWarning, stacklevel=2)
    load_adapter_state_dict(model, adapters)
    with torch.no_grad():
        for name, value in own.items():
            state[name].copy_(value)
    learned = [layer.parameter(name) for _, layer in adapted_modules(model) for name in layer.trained]
    freeze_rest(model, [*learned, *(value for name in own if isinstance(value := state[name], nn.Parameter))])
    if placement_of(replica) is not None:
        cast(Any, replica).renew()  # other parameters require gradients now


def _compared_base(
    facts: Mapping[str, str], state: Mapping[str, Tensor], any_base: bool, path: Path
) -> tuple[list[str], str | None]:
    """What of the weights under the adapters is different, and what is only to be remarked."""
    if _BASE not in facts:
        return [], "it does not say under which weights it was trained: whether they are these was not checked"
    try:
        found = compare(facts[_BASE], state)
    except ValueError as error:
        raise UsageError(f"{path}: what it says of its base weights is malformed: {error}") from error
    if found.others:
        said = (
            f"{len(found.others)} of its weights under adapters (such as '{found.others[0]}') have other numbers than "
            "those under which the adapters were trained"
        )
        return ([], said) if any_base else ([f"{said} (any_base=True loads them all the same)"], None)
    if found.rounded:
        return [], (
            f"{len(found.rounded)} of the weights under adapters (such as '{found.rounded[0]}') are those under which "
            "they were trained, but of another type: what the model computes differs by rounding"
        )
    return [], None


def _difference(name: str, value: Tensor, own: Tensor | None, under: Collection[str]) -> str | None:
    path, _, last = name.rpartition(".")
    if last == "weight" and path in under:
        return f"'{name}' is a weight under an adapter, which stays as it was pretrained"
    if own is None:
        return f"the model has no '{name}'"
    if own.shape != value.shape:
        return f"'{name}' has shape {tuple(own.shape)} in the model, {tuple(value.shape)} in the file"
    return unsound(name, value, own)


class _Stored(NamedTuple):
    entries: dict[str, Tensor]
    facts: Mapping[str, str]


def _read(path: Path) -> _Stored:
    check_suffix(path)
    with reading(path):
        if not path.is_file():
            raise UsageError(f"{path}: there is no such file")
        found = _read_hdf5(path) if path.suffix == ".h5" else _read_safetensors(path)
    if any(name.endswith("lora_A.default.weight") for name in found.entries):
        raise UsageError(f"{path}: its adapters are LoRA's, which PEFT reads; see its `set_peft_model_state_dict`")
    if not any(map(is_of_adapter, found.entries)):
        raise UsageError(f"{path}: expected a file of an adapter, as `hpclr export --adapter` writes it; it is another")
    return found


def _read_hdf5(path: Path) -> _Stored:
    tree = load_file(path, verify=sidecar_of(path).exists()).tree
    group: Any = tree.get(_GROUP)
    about = tree.get("export")
    facts = about.value if isinstance(about, Json) and isinstance(about.value, Mapping) else {}
    entries = {k: v for k, v in group.items() if isinstance(v, Tensor)} if isinstance(group, Mapping) else {}
    return _Stored(entries, {key: value for key, value in facts.items() if isinstance(value, str)})


def _read_safetensors(path: Path) -> _Stored:
    if sidecar_of(path).exists():
        check_digest(path)
    try:
        with safe_open(path, "pt") as file:
            entries = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return _Stored(entries, file.metadata() or {})
    except SafetensorError as error:
        raise UsageError(f"{path}: it is damaged or no safetensors file: {error}") from error


def check_suffix(path: Path) -> None:
    """Raises UsageError for a name that tells no format in which adapters are kept."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: an adapter is kept as {' or '.join(SUFFIXES)}; found '{path.suffix}'")
