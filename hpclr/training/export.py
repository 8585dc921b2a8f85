"""`hpclr export`: the weights in a checkpoint as a file that other programs read.

Except for ONNX, which holds the computation too, everything follows from the checkpoint: no model is built
and nothing is imported.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from hpclr.checkpoint import Json, Loaded, Tree, load_file, write_tree
from hpclr.checkpoint.digest import check_found, sha256_of, write_sidecar
from hpclr.errors import UsageError
from hpclr.lowrank.adapters import adapter_names
from hpclr.lowrank.interchange import cast_state_dict, dense_state_dict
from hpclr.output import printable
from hpclr.training.adapter_files import about_base, check_suffix, running_statistics, write_adapter
from hpclr.training.evaluation import digests_of, find_checkpoint, malformed_named
from hpclr.training.run_directory import reading
from hpclr.training.state import from_tree
from hpclr.training.stored_weights import Layers, StoredWeights, once, place_of, stored_weights
from hpclr.training.written_files import written_whole
from hpclr.version import __version__

SUFFIXES = {".safetensors": "safetensors", ".pt": "torch", ".pth": "torch", ".onnx": "onnx", ".h5": "hdf5"}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}


class Exported(NamedTuple):
    """What was written, for a line to people."""

    path: Path
    step: int
    what: str
    bytes: int
    note: str

    def __str__(self) -> str:
        return f"{printable(str(self.path))}: {self.what} of step {self.step}, {self.bytes:,} bytes{self.note}"


@dataclass(frozen=True)
class _Weights:
    """What is to be written: a state dict in its final types, factored or not, and where it comes from."""

    state: dict[str, Tensor]
    layers: Layers
    dtype: torch.dtype | None
    facts: dict[str, str]
    step: int

    @property
    def layers_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps({name: asdict(layer) for name, layer in self.layers.items()}))
        return plain


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    format: str | None = None,
    factored: bool = False,
    dtype: str | None = None,
    average: bool = True,
    best: bool = False,
    trust: bool = False,
    untrusted: bool = False,
    force: bool = False,
    rank_fraction: float | None = None,
    calibrate: int | None = None,
    data: Path | None = None,
) -> Exported:
    """Writes the weights in a checkpoint to `out`, whole or not at all.

    Args:
        checkpoint: a file or a run directory.
        out: the file to write.
        format: safetensors, torch, onnx or hdf5; None: by the suffix of `out`.
        factored: leave factored weights as they are, instead of multiplying them out.
        dtype: of the floating tensors, one of `DTYPES`; None: as stored.
        average: take averaged weights where the run keeps them: those that it is judged by.
        best: of a run directory, the best checkpoint on validation instead of the newest.
        trust: whether a model that the checkpoint names as `target:` may be imported (ONNX, and to cut ranks).
        untrusted: as `load_checkpoint`.
        force: replace a file that is there.
        rank_fraction: cut layers to this share of full rank; None: leave the ranks as they are.
        calibrate: as `hpclr.training.elastic.evaluate_at_ranks`; with `rank_fraction`.
        data: another data file than the run's, to calibrate with.

    Raises:
        UsageError: if the checkpoint or `out` cannot be used, or a number is too large for `dtype`.
        RetryableError: if the disk is full or fails.
    """
    chosen = format or _format_of(out)
    source = find_checkpoint(checkpoint, best=best)
    with reading(out):
        _check_place(out, source, force)
    digest = _digest_of(source, untrusted)
    loaded = load_file(source, digests=[digest])
    stored = stored_weights(loaded.tree, source, average=average)
    if rank_fraction is not None:
        from hpclr.training.elastic import cut_weights

        stored = cut_weights(loaded, stored, rank_fraction, calibrate=calibrate, data=data, trust=trust)
    if factored and stored.merged:
        raise UsageError(
            f"{source}: its layers have adapters, no factors, and --factored does not go with these: --adapter writes "
            "the adapters alone, --dense merges them"
        )
    weights = _prepared(loaded, digest, stored, factored, DTYPES[dtype] if dtype else None)
    write = partial(_write_onnx, loaded=loaded, trust=trust) if chosen == "onnx" else _WRITERS[chosen]
    with written_whole(out) as temporary:
        note = write(temporary, weights)
    what = _described(stored, factored) + ("" if rank_fraction is None else f" at {rank_fraction:g} of full rank")
    return Exported(out, loaded.step, what, out.stat().st_size, note)


def export_adapter(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str | None = None,
    average: bool = True,
    best: bool = False,
    untrusted: bool = False,
    force: bool = False,
) -> Exported:
    """Writes the adapters in a checkpoint, and what else was trained, to `out`; arguments as for `export_checkpoint`.

    Raises:
        UsageError: if the checkpoint has no adapters, or it or `out` cannot be used.
        RetryableError: if the disk is full or fails.
    """
    source = find_checkpoint(checkpoint, best=best)
    check_suffix(out)
    with reading(out):
        _check_place(out, source, force)
    digest = _digest_of(source, untrusted)
    loaded = load_file(source, digests=[digest])
    stored = stored_weights(loaded.tree, source, average=average, merge=False)
    if not stored.adapters:
        raise UsageError(f"{source}: it has no adapters; method sara, mo_sara, edora or lora trains some")
    with malformed_named(source):
        names = [*from_tree(loaded.tree["method"])["state"]["trained"], *adapter_names(stored.adapters)]
        names += running_statistics(stored.state)
        entries = cast_state_dict({name: stored.state[name] for name in names}, DTYPES[dtype] if dtype else None)
    base = about_base(stored.state, [entry.weight for entry in stored.adapters.values()])
    write_adapter(out, entries, _facts(loaded, digest, stored) | base, loaded.step)
    what = f"adapters and what trained with them ({sum(value.numel() for value in entries.values()):,} numbers)"
    return Exported(out, loaded.step, what, out.stat().st_size, "")


def _format_of(out: Path) -> str:
    if out.suffix not in SUFFIXES:
        raise UsageError(
            f"{out}: its suffix does not tell the format: expected one of {', '.join(SUFFIXES)}, found "
            f"'{out.suffix}'; choose another name, or say --format"
        )
    return SUFFIXES[out.suffix]


def _digest_of(source: Path, untrusted: bool) -> str:
    """What the content must have; known before it is loaded, as training may delete the file after that."""
    recorded = digests_of(source, untrusted=untrusted)
    if len(recorded) == 1:
        return recorded[0]
    with reading(source):  # it is being replaced, and may be either
        found = sha256_of(source)
        check_found(source, found, recorded, source.stat().st_size)
    return found


def _check_place(out: Path, source: Path, force: bool) -> None:
    """Refuses what would fail or destroy something, before the work is done."""
    if not out.parent.is_dir():
        raise UsageError(f"{out}: it cannot be written, there is no directory {out.parent}; make it first")
    if out.exists() and not out.is_file():
        what = "a directory" if out.is_dir() else "a device, a FIFO or a socket"
        raise UsageError(f"{out}: expected the name of a file, it is {what}; choose another name")
    if out.exists() and out.samefile(source):
        raise UsageError(f"{out}: it is the checkpoint itself; choose another name")
    if source.parent.name == "checkpoints" and out.parent.samefile(source.parent):
        raise UsageError(f"{out}: in {out.parent} lie the checkpoints of a run, nothing else; write it elsewhere")
    if out.exists() and not force:
        raise UsageError(f"{out}: it is there already; pass --force to replace it")


def _prepared(
    loaded: Loaded, digest: str, stored: StoredWeights, factored: bool, dtype: torch.dtype | None
) -> _Weights:
    facts = _facts(loaded, digest, stored)
    try:
        if factored:
            return _Weights(cast_state_dict(stored.state, dtype), stored.layers, dtype, facts, loaded.step)
        return _Weights(dense_state_dict(stored.state, stored.layers, dtype), {}, dtype, facts, loaded.step)
    except ValueError as error:
        raise UsageError(f"{loaded.path}: {error}; choose another --dtype") from error


def _facts(loaded: Loaded, digest: str, stored: StoredWeights) -> dict[str, str]:
    """Where weights come from."""
    return {
        "hpclr": __version__,
        "step": str(loaded.step),
        "weights": "averaged" if stored.averaged else "own",
        "source": printable(loaded.path.name),  # where its bytes are no text, formats that hold text fail
        "source_sha256": digest,
    }


def _described(stored: StoredWeights, factored: bool) -> str:
    """What is written, and how many numbers the model has in either form: of what has two names once."""
    as_stored = sum(value.numel() for value in once(stored.state.values()))
    inside = {key for layer in stored.layers.values() for key in layer.factors}
    dense = sum(value.numel() for value in once(value for key, value in stored.state.items() if key not in inside))
    shapes = {place_of(stored.state[layer.factors[1]]): layer.shape for layer in stored.layers.values()}
    dense += sum(map(prod, shapes.values()))
    kind = "averaged weights" if stored.averaged else "weights"
    if factored:
        return f"factored {kind} ({as_stored:,} numbers, dense {dense:,})"
    if stored.merged:
        return f"merged {kind} ({dense:,} numbers)"
    return f"dense {kind} ({dense:,} numbers, factored {as_stored:,})"


# The formats. Each writes a new file and returns what is to be said of it.


def _write_safetensors(path: Path, weights: _Weights) -> str:
    metadata = {"format": "pt", **weights.facts, "layers": json.dumps(weights.layers_json)}
    try:
        save_file(_each_once(_apart(weights.state)), path, metadata)
    except KeyError as error:
        raise UsageError(
            f"safetensors has no type {error}, in which a tensor is stored; choose hdf5 or torch"
        ) from error
    return ""


def _write_torch(path: Path, weights: _Weights) -> str:
    """Dense, a plain state dict; factored, one beside the description that it needs."""
    state = _apart(weights.state)
    whole = {"state_dict": state, "layers": weights.layers_json, "hpclr": weights.facts}
    try:
        with path.open("wb") as file:
            torch.save(whole if weights.layers else state, file)
    except RuntimeError as error:  # torch's, over that of the file system
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    return ""


def _write_hdf5(path: Path, weights: _Weights) -> str:
    tree: Tree = {
        "model": {**weights.state},
        "layers": Json(weights.layers_json),
        "export": Json(weights.facts),
    }
    write_sidecar(path, write_tree(path, tree, {"step": weights.step}))
    return ""


_WRITERS: Mapping[str, Callable[[Path, _Weights], str]] = {
    "safetensors": _write_safetensors,
    "torch": _write_torch,
    "hdf5": _write_hdf5,
}


def _write_onnx(path: Path, weights: _Weights, loaded: Loaded, trust: bool) -> str:
    from hpclr.training.onnx_export import write_onnx

    layers, dtype = weights.layers_json, weights.dtype
    return write_onnx(path, loaded, weights.state, layers=layers, dtype=dtype, facts=weights.facts, trust=trust)


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that each have their memory alone: of a view, torch and safetensors see the whole behind it."""
    return {
        key: value.clone() if value.untyped_storage().nbytes() != value.nbytes else value
        for key, value in state.items()
    }


def _each_once(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Memory of its own for each name: safetensors knows no tensor of two names."""
    found: dict[int, str] = {}
    first = {key: found.setdefault(value.data_ptr(), key) for key, value in state.items() if value.numel()}
    return {key: value.clone() if first.get(key, key) != key else value for key, value in state.items()}
