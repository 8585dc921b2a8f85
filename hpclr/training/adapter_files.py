"""Adapters in files of their own: what fine-tuning has learned, without the pretrained weights.

Such a file holds the parameters of the adapters with their frozen bases, and what else was trained, such as a head, by
their names in the model's state dict. It is safetensors, or HDF5 with a group `adapter`.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hpclr.checkpoint import Json, load_file, write_tree
from hpclr.checkpoint.digest import sidecar_of, write_sidecar
from hpclr.errors import UsageError
from hpclr.lowrank.adapters import adapted_modules, adapter_state_dict, is_of_adapter, load_adapter_state_dict
from hpclr.methods.adapting import freeze_rest
from hpclr.training.run_directory import reading
from hpclr.training.written_files import written_whole
from hpclr.version import __version__

_GROUP = "adapter"
SUFFIXES = (".safetensors", ".h5")


def save_adapter(model: nn.Module, path: Path | str) -> None:
    """Writes a model's adapters, and what else of it trains, to a file, whole or not at all.

    Args:
        model: with adapters, merged or not.
        path: ends in .safetensors or .h5; a file that is there is replaced.

    Raises:
        UsageError: if the model has no adapters, or the file cannot be written.
    """
    if not any(adapted_modules(model)):
        raise UsageError(f"{path}: the model has no adapters that could be saved")
    own = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    write_adapter(Path(path), own | adapter_state_dict(model), {})


def write_adapter(path: Path, entries: Mapping[str, Tensor], facts: Mapping[str, str], step: int = 0) -> None:
    """Writes entries of a state dict, after so many steps of training, as a file of an adapter.

    Raises:
        UsageError, RetryableError: if it cannot be written.
    """
    check_suffix(path)
    content = {name: value.detach().cpu().contiguous() for name, value in entries.items()}
    about = {"hpclr": __version__, **facts}
    with written_whole(path) as temporary:
        if path.suffix == ".h5":
            write_sidecar(temporary, write_tree(temporary, {_GROUP: content, "export": Json(about)}, {"step": step}))
        else:
            save_file(content, temporary, {"format": "pt", **about})


def load_adapter(model: nn.Module, path: Path | str) -> None:
    """Gives a model the adapters in a file, and what else was trained with them; all else is frozen.

    Args:
        model: as it was pretrained, or with adapters of the same form.
        path: as `save_adapter` or `hpclr export --adapter` writes it.

    Raises:
        UsageError: if it is no such file, is damaged, or does not fit the model, naming the first three differences;
            the model is not changed then.
    """
    entries = _read(Path(path))
    adapters = {name: value for name, value in entries.items() if is_of_adapter(name)}
    own = {name: value for name, value in entries.items() if name not in adapters}
    parameters = dict(model.named_parameters())
    under = {name.rpartition(".")[0] for name in adapters}
    differences = [_difference(name, value, parameters.get(name), under) for name, value in own.items()]
    wrong = [difference for difference in differences if difference]
    try:
        if wrong:
            more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(f"it does not fit the model: {'; '.join(wrong[:3])}{more}")
        load_adapter_state_dict(model, adapters)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    with torch.no_grad():
        for name, value in own.items():
            parameters[name].copy_(value)
    learned = [layer.parameter(name) for _, layer in adapted_modules(model) for name in layer.trained]
    freeze_rest(model, [*learned, *(parameters[name] for name in own)])


def _difference(name: str, value: Tensor, parameter: nn.Parameter | None, under: Collection[str]) -> str | None:
    path, _, own = name.rpartition(".")
    if own == "weight" and path in under:
        return f"'{name}' is a weight under an adapter, which stays as it was pretrained"
    if parameter is None:
        return f"the model has no parameter '{name}'"
    if parameter.shape != value.shape:
        return f"'{name}' has shape {tuple(parameter.shape)} in the model, {tuple(value.shape)} in the file"
    return None


def _read(path: Path) -> dict[str, Tensor]:
    check_suffix(path)
    with reading(path):
        if not path.is_file():
            raise UsageError(f"{path}: there is no such file")
        found = _read_hdf5(path) if path.suffix == ".h5" else _read_safetensors(path)
    if not any(map(is_of_adapter, found or {})):
        raise UsageError(f"{path}: expected a file of an adapter, as `hpclr export --adapter` writes it; it is another")
    return found


def _read_hdf5(path: Path) -> dict[str, Tensor]:
    group: Any = load_file(path, verify=sidecar_of(path).exists()).tree.get(_GROUP)
    return {k: v for k, v in group.items() if isinstance(v, Tensor)} if isinstance(group, Mapping) else {}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise UsageError(f"{path}: it is damaged or no safetensors file: {error}") from error


def check_suffix(path: Path) -> None:
    """Raises UsageError for a name that tells no format in which adapters are kept."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: an adapter is kept as {' or '.join(SUFFIXES)}; found '{path.suffix}'")
