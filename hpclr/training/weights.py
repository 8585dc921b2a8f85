"""`model.weights`: a file of plain weights as a run's starting point."""

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hpclr.checkpoint import load_file
from hpclr.checkpoint.digest import sidecar_of
from hpclr.errors import UsageError
from hpclr.lowrank.adapters import looks_adapted
from hpclr.lowrank.interchange import dense_state_dict
from hpclr.training.stored_weights import Layers, parse_layers, stored_weights

_HDF5, _ZIP, _PICKLE = b"\x89HDF\r\n\x1a\n", b"PK\x03\x04", b"\x80"
_WRAPPERS = ("state_dict", "model")


@torch.no_grad()
def load_initial_weights(model: nn.Module, file: str, keep: Sequence[str] = ()) -> None:
    """Gives a model that was just built the weights in a file.

    Args:
        model: dense, initialised; parameters that are lazy still take the file's shapes.
        file: safetensors, a state dict of torch.save, or an HDF5 file of hpclr.
        keep: patterns of state-dict names; what they match stays as it is, and may be missing from the file.

    Raises:
        UsageError: if the file cannot be read safely or does not fit the model exactly.
    """
    where = f"model.weights: {file}"
    found, own = read_weights(Path(file), where), model.state_dict(keep_vars=True)
    if looks_adapted(found):
        raise UsageError(_adapter_alone(where))
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in (*own, *found)):
            raise UsageError(
                f"model.weights_except: '{pattern}' matches no name in the model or in {file}; "
                f"the model has {_some(list(own))}"
            )
    found, wanted = (
        {name: value for name, value in state.items() if not any(fnmatchcase(name, pattern) for pattern in keep)}
        for state in (found, own)
    )
    _check_names(found, wanted, where)
    _check_tied(found, wanted, where)
    _check_finite(found, wanted, where)
    model.load_state_dict(found, strict=False)  # names and shapes are known to be right


class Stored(NamedTuple):
    """A state dict, and which of its entries are factors of what."""

    state: dict[str, Tensor]
    layers: Layers


def read_weights(path: Path, where: str) -> dict[str, Tensor]:
    """The dense state dict in a file of any of the three formats; factored weights are multiplied out.

    Raises:
        UsageError: if it is none of them, damaged, or holds anything but tensors.
    """
    stored = read_stored(path, where)
    try:
        return dense_state_dict(stored.state, stored.layers)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error


def read_stored(path: Path, where: str) -> Stored:
    """The state dict in a file of any of the three formats as it is; its tensors are read when they are looked at.

    Raises:
        UsageError: if it is none of them, damaged, or holds anything but tensors.
    """
    try:
        if not path.is_file():
            raise UsageError(f"{where}: there is no such file" + (", it is a directory" if path.is_dir() else ""))
        with path.open("rb") as file:
            start = file.read(9)
        if start.startswith(_HDF5):
            return _read_hdf5(path, where)
        if start[8:] == b"{":  # after the length of the header, whose bytes may be any
            return _read_safetensors(path, where)
        if start.startswith((_ZIP, _PICKLE)):
            return _read_torch(path, where, mapped=start.startswith(_ZIP))
    except OSError as error:
        raise UsageError(f"{where}: it cannot be read: {error.strerror or error}") from error
    raise UsageError(
        f"{where}: expected a safetensors file, a state dict of torch.save or an HDF5 file of hpclr, "
        f"found a file that starts with {start!r}"
    )


def _read_hdf5(path: Path, where: str) -> Stored:
    tree = load_file(path, verify=sidecar_of(path).exists()).tree
    if "adapter" in tree and "model" not in tree:
        raise UsageError(_adapter_alone(where))
    stored = stored_weights(tree, path)
    return Stored(stored.state, stored.layers)


def _adapter_alone(where: str) -> str:
    return (
        f"{where}: it has an adapter, which is trained beside weights, not in their place. Give the merged weights "
        "(`hpclr export RUN merged.safetensors`), or those under the adapter, and load that onto the model with "
        "hpclr.load_adapter"
    )


def _read_safetensors(path: Path, where: str) -> Stored:
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            described = (file.metadata() or {}).get("layers", "{}")
    except SafetensorError as error:
        raise UsageError(f"{where}: it is damaged or no safetensors file: {error}") from error
    try:
        layers = json.loads(described)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: its metadata 'layers' is not JSON: {error}") from error
    return Stored(state, parse_layers(layers, state, where))


def _read_torch(path: Path, where: str, *, mapped: bool) -> Stored:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UsageError(f"{where}: {_why_not_loaded(error)}") from error
    except (RuntimeError, EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise UsageError(f"{where}: it is damaged or no file of torch.save: {_first_line(error)}") from error
    described: Any = {}
    if isinstance(content, Mapping) and any(isinstance(content.get(key), Mapping) for key in _WRAPPERS):
        described = content.get("layers", {})
        content = next(content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping))
    state = _only_tensors(content, where)
    return Stored(state, parse_layers(described, state, where))


def _why_not_loaded(error: Exception) -> str:
    """torch's reason without its advice, which is to load the file unsafely."""
    named = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"WeightsUnpickler error:\s+(.+)", str(error))
    return (
        f"it is damaged or holds more than tensors and plain values ({named[1] if named else 'torch refuses it'}), "
        "which may run code when it is read. Where it comes from, save the weights alone: "
        "torch.save(model.state_dict(), …)"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"


def _only_tensors(content: Any, where: str) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise UsageError(f"{where}: expected a state dict (names → tensors), found a {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UsageError(
                f"{where}: expected a state dict (names → tensors), alone or under one of "
                f"{', '.join(map(repr, _WRAPPERS))}; found {name!r}: {type(value).__name__}"
            )
    return dict(content)


def _check_names(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    given = {id(wanted[name]) for name in found if name in wanted}  # a tied parameter may be there under one name only
    missing = [name for name, value in wanted.items() if name not in found and id(value) not in given]
    unexpected = [name for name in found if name not in wanted]
    differing = [
        f"{name} ({_described(value)} in the file, {_described(wanted[name])} in the model)"
        for name, value in found.items()
        if name in wanted and not is_lazy(wanted[name]) and _described(value) != _described(wanted[name])
    ]
    faults = {"missing from it": missing, "not in the model": unexpected, "of another shape": differing}
    if any(faults.values()):
        said = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in faults.items() if names)
        raise UsageError(
            f"{where} does not fit the model: {said}. model.weights_except takes patterns of names to leave out, "
            "such as those of another head."
        )


def _described(tensor: Tensor) -> str:
    """Shape, and what kind of numbers: their width may differ, as the model's is taken."""
    kind = "complex" if tensor.is_complex() else "" if tensor.is_floating_point() else "integer"
    plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    return " ".join(filter(None, [str(tuple(tensor.shape)), kind, "" if plain else "sparse, quantised or empty"]))


def _check_tied(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    first: dict[int, str] = {}
    for name in found:
        other = first.setdefault(id(wanted[name]), name)
        if other != name and not torch.equal(found[other], found[name]):
            raise UsageError(
                f"{where}: '{other}' and '{name}' are one and the same in the model, but differ in the file"
            )


def _check_finite(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    """Refuses NaN and infinity, also by rounding to the model's type; a mask of its own may be infinite."""
    for name, value in found.items():
        own = wanted[name]
        bad = ~torch.isfinite(value.to(own.dtype))
        if bad.any() and (is_lazy(own) or (bad & torch.isfinite(own)).any()):
            raise UsageError(
                f"{where}: {int(bad.sum())} of the {value.numel()} numbers of '{name}' are not finite as "
                f"{str(own.dtype).removeprefix('torch.')}; use a file whose weights are"
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
