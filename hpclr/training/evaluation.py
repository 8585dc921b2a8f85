"""`hpclr evaluate`: a checkpoint's score on a split."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hpclr.checkpoint import CheckpointStore, Loaded, load_file
from hpclr.checkpoint.digest import read_sidecar, sidecar_of
from hpclr.checkpoint.sandbox import examine
from hpclr.config import RunFile, parse_run_file
from hpclr.config.describe import show
from hpclr.config.schema import Cuttlefish, FixedRank, Lora, Nested, Target, Truncate
from hpclr.data import BatchLoader, Dataset, open_dataset
from hpclr.errors import UsageError
from hpclr.lowrank import EMA, load_state_dict
from hpclr.lowrank.adapters import shape_model_like_adapters
from hpclr.lowrank.two_factors import freeze_middles
from hpclr.training.assembly import data_files, held_out
from hpclr.training.environment import choose_device, use_threads
from hpclr.training.lora import add_lora
from hpclr.training.model import build_model, check_outputs
from hpclr.training.precision import Precision
from hpclr.training.run_directory import reading
from hpclr.training.scores import Score
from hpclr.training.state import from_tree, tensors
from hpclr.training.tasks import Task, task_of


def find_checkpoint(path: Path, *, best: bool = False) -> Path:
    """The checkpoint file that a path means: itself, or the newest or best one of a run directory.

    Raises:
        UsageError: if there is none, or it cannot be looked at.
    """
    with reading(path):
        return _found(path, best)


def _found(path: Path, best: bool) -> Path:
    if path.is_file():
        return path
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not directory.is_dir():
        raise UsageError(f"{path}: no such checkpoint file or run directory")
    store = CheckpointStore(directory)
    steps = store.steps()
    found = store.best() if best else (store.path(max(steps)) if steps else None)
    if found is None:
        raise UsageError(f"{directory} holds no {'best ' if best else ''}checkpoint")
    return found


def load_checkpoint(checkpoint: Path, *, best: bool = False, untrusted: bool = False) -> Loaded:
    """The checkpoint that a path means.

    Args:
        checkpoint: a file or a run directory.
        best: of a run directory, the best checkpoint on validation instead of the newest.
        untrusted: have it examined by a process of its own before this one reads it; it then needs no sidecar.

    Raises:
        UsageError: if there is none, or it is damaged.
    """
    path = find_checkpoint(checkpoint, best=best)
    return load_file(path, digests=digests_of(path, untrusted=untrusted))


def digests_of(path: Path, *, untrusted: bool = False) -> list[str]:
    """The SHA-256 digests that a checkpoint file may have: as its sidecar says, or, untrusted, as examined.

    Raises:
        UsageError: if it has no sidecar, or, untrusted, is not good.
    """
    with reading(path):
        if untrusted:
            return [examine(path, without_digest=not sidecar_of(path).exists()).sha256]
        return read_sidecar(path)


def load_run(checkpoint: Path, *, best: bool = False, untrusted: bool = False) -> tuple[Loaded, RunFile]:
    """A checkpoint of `hpclr train`, as `load_checkpoint`, and the run file that it was made with.

    Raises:
        UsageError: if there is none, it is damaged, or something else has written it.
    """
    loaded = load_checkpoint(checkpoint, best=best, untrusted=untrusted)
    missing = sorted({"model", "method", "ema", "position", "run", "data", "environment"} - loaded.tree.keys())
    if missing:
        raise UsageError(f"{loaded.path} is no checkpoint of `hpclr train`: it holds no {', '.join(missing)}")
    with malformed_named(loaded.path):
        return loaded, parse_run_file(from_tree(loaded.tree["run"])["yaml"], f"{loaded.path} (its run file)")


@contextmanager
def malformed_named(path: Path) -> Iterator[None]:
    """Parts of a checkpoint that are there but not what `hpclr train` writes.

    Raises:
        UsageError: if the block stumbles over one.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"{path} is no checkpoint as `hpclr train` writes it; a part of it is malformed "
            f"({type(error).__name__}: {error}). Use another checkpoint."
        ) from error


def evaluate_checkpoint(
    checkpoint: Path,
    *,
    split: str = "test",
    data: Path | None = None,
    best: bool = False,
    trust: bool = False,
    untrusted: bool = False,
) -> tuple[Score, Path]:
    """Rebuilds a checkpoint's model with the ranks in the file and scores it.

    Args:
        checkpoint: a file or a run directory.
        split: train, valid or test.
        data: another data file than the run's.
        best: of a run directory, the best checkpoint on validation instead of the newest.
        trust: whether a model that the checkpoint names as `target:` may be imported.
        untrusted: as `load_checkpoint`.

    Raises:
        UsageError: for a file that cannot be used, a split that is not there, or a `target:` without trust.
    """
    loaded, run = load_run(checkpoint, best=best, untrusted=untrusted)
    subject = subject_of(loaded, run, split=split, data=data, trust=trust)
    with malformed_named(loaded.path):
        _load_weights(subject.model, run, loaded)
    return subject.score(subject.model), loaded.path


class Subject(NamedTuple):
    """What a checkpoint's model is scored on, and the model, its weights still to come."""

    dataset: Dataset
    loader: BatchLoader
    task: Task
    precision: Precision
    model: nn.Module

    def score(self, model: nn.Module) -> Score:
        """How a model does."""
        return self.task.score(model, self.loader, self.precision)


def subject_of(loaded: Loaded, run: RunFile, *, split: str, data: Path | None, trust: bool) -> Subject:
    """Opens the data of a checkpoint, or other data that fits it, and builds its model; as `evaluate_checkpoint`."""
    require_trust(run, loaded.path, trust)
    use_threads("auto")  # not as many as a file from elsewhere may name
    dataset = open_dataset([data] if data else data_files(run))
    if split not in dataset.sizes:
        raise UsageError(f"{dataset.path} has no split '{split}'; it has {', '.join(dataset.sizes)}")
    _check_fit(dataset, loaded)
    _standardize_as_in_training(dataset, loaded)
    device = choose_device("cpu" if run.train.device == "cpu" else "auto")  # what ran on CUDA is scored anywhere
    precision = Precision(run.train.precision, device)
    task = task_of(run, dataset)
    samples, loader = task.samples(run.data, dataset), held_out(run, dataset, split, precision.dtype)
    model = build_model(run, samples, weights=False).to(device, precision.dtype)
    if any(map(is_lazy, model.parameters())):
        check_outputs(model, loader.batch(0, 0).x[:2].to(device), samples, precision)
    return Subject(dataset, loader, task, precision, model)


def require_trust(run: RunFile, path: Path, trust: bool) -> None:
    """Refuses to run code that a checkpoint names, unless the user knows where it comes from.

    Raises:
        UsageError: for a `target:` model without trust.
    """
    if isinstance(run.model, Target) and not trust:
        raise UsageError(
            f"{path} names the model '{run.model.target}', which would be imported and run; "
            "pass --trust if you know where this checkpoint comes from"
        )


class SavedFacts(NamedTuple):
    """What a checkpoint says of the data that its model is for."""

    task: str
    sample_shape: tuple[int, ...]
    classes: tuple[str, ...]


def saved_facts(loaded: Loaded) -> SavedFacts:
    """What a checkpoint says of its data; the first ones were all of classifiers and did not say so."""
    data = from_tree(loaded.tree["data"])
    return SavedFacts(data.get("task", "classification"), tuple(data["sample_shape"]), tuple(data["classes"]))


def _check_fit(dataset: Dataset, loaded: Loaded) -> None:
    with malformed_named(loaded.path):
        saved = saved_facts(loaded)
    for what, expected in saved._asdict().items():
        found = getattr(dataset, what)
        if type(expected)(found) != expected:
            raise UsageError(
                f"{dataset.path} does not fit {loaded.path}: the model was trained on data with {what} "
                f"{show(expected)}, this has {show(found)}; name a file of the same kind with --data"
            )


def _standardize_as_in_training(dataset: Dataset, loaded: Loaded) -> None:
    """Samples come in the units that the model knows, also those of another file; the first checkpoints have none."""
    with malformed_named(loaded.path):
        data = from_tree(loaded.tree["data"])
        if "mean" in data:
            mean, std = (np.array(data[key], np.float64).reshape(dataset.mean.shape) for key in ("mean", "std"))
            if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
                raise ValueError("mean and std of the data must be finite, and std above 0")
            dataset.mean, dataset.std = mean, std


def _load_weights(model: nn.Module, run: RunFile, loaded: Loaded) -> None:
    """Gives it the weights that the run itself would be judged by: averaged ones where it keeps them."""
    tree, state = loaded.tree, tensors(loaded.tree["model"])
    try:
        if isinstance(run.method, Lora):
            add_lora(model, run.method)
        shape_model_like_adapters(model, state)
        load_state_dict(model, state)
    except (ValueError, RuntimeError) as error:  # code behind a `target:` may have changed
        raise UsageError(f"the weights in {loaded.path} do not fit the model that it names: {error}") from error
    if run.train.ema is not None:
        if isinstance(run.method, (Truncate, FixedRank, Cuttlefish, Nested)):
            freeze_middles(model)  # which have no averages
        ema = EMA(model, run.train.ema)
        ema.load_state_dict(from_tree(tree["ema"]))
        with torch.no_grad():
            ema.copy_to_model()
