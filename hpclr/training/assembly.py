"""From a run file to the objects that train; whatever is wrong with it is found here, before anything is written."""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpclr import models
from hpclr.config import RunFile
from hpclr.config.schema import Dense as DenseSection
from hpclr.config.schema import Oialr, Section, SvdTraining, Target
from hpclr.data import Augment, Dataset, Loader, open_dataset
from hpclr.data.loader import choose_order
from hpclr.errors import UsageError
from hpclr.lowrank import EMA
from hpclr.methods import OIALR, Dense, Method, SVDTraining
from hpclr.parallel.group import Group
from hpclr.parallel.replica import Replica
from hpclr.training.environment import random_states, record, seed_everything, seed_of, set_random_states
from hpclr.training.job import Job, alone, on_this_node
from hpclr.training.optimizers import build_optimizer
from hpclr.training.precision import Precision
from hpclr.training.schedules import LearningRate, learning_rate
from hpclr.training.tasks import Classification
from hpclr.training.weights import load_initial_weights


@dataclass
class Assembly:
    """Everything that a run trains with."""

    run: RunFile
    job: Job
    dataset: Dataset
    loader: Loader
    valid: Loader | None
    test: Loader
    model: nn.Module
    replica: Replica
    optimizer: Optimizer
    method: Method
    task: Classification
    precision: Precision
    ema: EMA | None
    learning_rate: LearningRate
    total_steps: int
    environment: dict[str, object]

    @property
    def device(self) -> torch.device:
        """Where this process trains."""
        return self.job.device

    def example(self) -> Tensor:
        """An input batch as the model gets it, for counting operations."""
        return self.test.batch(0, 0).x.to(self.device)


@dataclass
class _Materials:
    """What each process makes by itself."""

    dataset: Dataset
    loader: Loader
    valid: Loader | None
    test: Loader
    model: nn.Module
    precision: Precision
    optimizer: Optimizer
    total_steps: int


def assemble(run: RunFile, job: Job | None = None, *, continuing: bool = False) -> Assembly:
    """Builds model, data, optimiser and method of a run.

    Args:
        run: the run file.
        job: the processes that train it, all of which call this; None: this one alone.
        continuing: the weights will come from a checkpoint, so `model.weights` is not needed.

    Raises:
        UsageError: for everything in the run file or the data that cannot work; on all processes.
    """
    job = job or alone(run)
    made = job.group.together(lambda: _materials(run, job, continuing))
    job.require_same({"the data's digest": made.dataset.digest})
    loader, model, optimizer, total = made.loader, made.model, made.optimizer, made.total_steps
    replica = _replica(run, model, job)
    method = _usage("method", build_method, run, replica, optimizer, total)
    ema = EMA(model, run.train.ema) if run.train.ema is not None else None
    if ema is not None:
        method.on_change(ema.follow)
    rate = learning_rate(run.schedule, run.optimizer.lr, total)
    task = Classification(run.train.label_smoothing)
    return Assembly(
        run=run,
        job=job,
        dataset=made.dataset,
        loader=loader,
        valid=made.valid,
        test=made.test,
        model=model,
        replica=replica,
        optimizer=optimizer,
        method=method,
        task=task,
        precision=made.precision,
        ema=ema,
        learning_rate=rate,
        total_steps=total,
        environment=record(job.device, job.threads, job.hosts, job.layout.launcher) | {"total_steps": total},
    )


def _materials(run: RunFile, job: Job, continuing: bool) -> _Materials:
    dataset = open_dataset(on_this_node(run, data_files(run)))
    _check_task(dataset)
    precision = Precision(run.train.precision, job.device)
    loader, valid, test = _loaders(run, dataset, precision.dtype, job.group)
    _check_validation(run, valid)
    total = run.train.steps or (run.train.epochs or 0) * len(loader)
    model = build_model(run, dataset, weights=not continuing)
    model = _with_batch_statistics(run, model, job.device).to(job.device, precision.dtype)
    x = loader.batch(0, 0).x.to(job.device)
    check_outputs(model, x[:2], len(dataset.classes), precision)
    _check_extra_state(model)
    _check_smallest_piece(model, x[: _smallest_piece(run, loader, total, job.group.size)], run, precision)
    if job.group.rank > 0:  # all have the same weights; what they draw while training is their own
        seed_everything(seed_of(run.train.seed, job.group.rank))
    optimizer = build_optimizer(run.optimizer, model.parameters())
    return _Materials(dataset, loader, valid, test, model, precision, optimizer, total)


def data_files(run: RunFile) -> list[Path]:
    """The files of a run's data, one or several."""
    path = run.data.path
    return [Path(path)] if isinstance(path, str) else [Path(one) for one in path]


def _with_batch_statistics(run: RunFile, model: nn.Module, device: torch.device) -> nn.Module:
    """Batch norms that take their statistics from all processes, if the run file asks for them."""
    if not run.parallel.sync_batchnorm:
        return model
    if device.type != "cuda":
        raise UsageError(
            "parallel.sync_batchnorm: true needs CUDA devices, this run is on the CPU, where torch has no such layer; "
            "take it out, or choose a model without batch normalisation"
        )
    synchronised: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return synchronised


def _replica(run: RunFile, model: nn.Module, job: Job) -> Replica:
    section, options = run.method, {}
    if isinstance(section, Oialr):
        options = {"svd": section.svd, "heat_rank": section.heat_rank}
    return Replica(
        model,
        broadcast_buffers=False,  # not in every step: before they are read, that is, scored or saved
        unused_parameters=run.parallel.unused_parameters,
        doing=job.doing,
        **options,  # type: ignore[arg-type]
    )


def _usage(section: str, build: Callable[..., Any], *arguments: Any) -> Any:
    """The rooms below speak of their arguments; here it is known which section of the run file those are."""
    try:
        return build(*arguments)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{section}: {error}") from error


def _check_task(dataset: Dataset) -> None:
    if dataset.task != "classification":
        raise UsageError(
            f"{dataset.path}: its task is {dataset.task}; this version trains classification only. "
            "`hpclr data inspect FILE` shows what a file holds."
        )


def _loaders(run: RunFile, dataset: Dataset, dtype: torch.dtype, group: Group) -> tuple[Loader, Loader | None, Loader]:
    data, seed = run.data, run.train.seed
    augment = Augment(flip=data.flip, crop=data.crop) if data.flip or data.crop else None
    loader = Loader(
        dataset,
        "train",
        data.batch_size,
        seed,
        shuffle=choose_order(dataset, data.shuffle, data.window),
        augment=augment,
        mixup=data.mixup,
        in_memory=data.in_memory,
        dtype=dtype,
        part=(group.rank, group.size),
    )
    valid = held_out(run, dataset, "valid", dtype) if "valid" in dataset.sizes else None
    return loader, valid, held_out(run, dataset, "test", dtype)


def held_out(run: RunFile, dataset: Dataset, split: str, dtype: torch.dtype) -> Loader:
    """The batches on which a run scores a split, in the order of the file."""
    size = min(max(run.data.batch_size, 256), dataset.sizes[split])
    return Loader(dataset, split, size, run.train.seed, shuffle=False, in_memory=run.data.in_memory, dtype=dtype)


def _check_validation(run: RunFile, valid: Loader | None) -> None:
    if valid is None and run.validation.patience is not None:
        raise UsageError(
            f"validation.patience asks for early stopping, but {run.data.path} has no validation split; prepare the "
            "data with --valid-fraction, or take validation.patience out"
        )


class Samples(Protocol):
    """What a model is built for: a dataset, or what a checkpoint says of one."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes."""


def build_model(run: RunFile, samples: Samples, *, weights: bool = True) -> nn.Module:
    """The model of a run file with its initial weights, which depend on the seed alone, or are those it names.

    A `target:` is imported and called: only for run files of the user's own, or with their word for it.

    Args:
        run: the run file.
        samples: what it is to classify.
        weights: whether to read `model.weights`; not where all weights are about to be replaced.

    Raises:
        UsageError: if there is no such model, or the weights cannot be read or do not fit.
    """
    seed_everything(run.train.seed)
    section = run.model
    model = import_target(section) if isinstance(section, Target) else _built_in(section, samples)
    if weights and section.weights is not None:
        load_initial_weights(model, section.weights, section.weights_except)
    return model


def _built_in(section: Section, samples: Samples) -> nn.Module:
    options = msgspec.structs.asdict(section)
    name = options.pop("name")
    del options["weights"], options["weights_except"]
    model: nn.Module = _usage(
        "model", lambda: models.build(name, sample_shape=samples.sample_shape, classes=len(samples.classes), **options)
    )
    return model


def import_target(section: Target) -> nn.Module:
    """Imports and calls the factory of a `target:`.

    Raises:
        UsageError: if it cannot be imported, cannot be called so, or does not return a module.
    """
    module_name, _, attribute = section.target.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the console script lacks what `python -m` has: the current directory
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise UsageError(f"model.target: cannot import '{section.target}': {_described(error)}") from error
    try:
        model = found(**section.args)
    except Exception as error:
        raise UsageError(
            f"model.target: {section.target} cannot be called with {section.args}: {_described(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"model.target: {section.target} must return a torch.nn.Module, found {type(model).__name__}")
    return model


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error} (hpclr --debug … shows where)"


@torch.no_grad()
def check_outputs(model: nn.Module, x: Tensor, classes: int, precision: Precision) -> None:
    """Runs a model on a few samples (N, …), which also gives lazy layers their shapes.

    Raises:
        UsageError: if it does not fit the data.
    """
    model.eval()
    try:
        with precision.context():
            outputs = model(x)
    except Exception as error:
        raise UsageError(
            f"model: it does not take samples of shape {tuple(x.shape[1:])}: {_described(error)}"
        ) from error
    finally:
        model.train()
    found = tuple(outputs.shape[1:]) if isinstance(outputs, Tensor) else type(outputs).__name__
    if found != (classes,):
        raise UsageError(
            f"model: for each sample it must give one number for each of the {classes} classes of the data, "
            f"that is, shape {(classes,)}; found {found}"
        )


def _check_extra_state(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise UsageError(
                f"model: {type(module).__name__} ('{name or 'the model itself'}') keeps state of its own kind "
                "(get_extra_state), which a checkpoint does not hold; keep it in buffers (register_buffer)"
            )


def _smallest_piece(run: RunFile, loader: Loader, total: int, processes: int) -> int:
    """The fewest samples that the model will see at once in training, on any process."""
    size, last = run.data.batch_size, loader.size % run.data.batch_size
    batches = {size, last} if last and total >= len(loader) else {size}
    most = run.train.micro_batch or size
    parts = {max(1, part) for batch in batches for part in (batch // processes, -(-batch // processes))}
    return min(part % most or most for part in parts)


@torch.no_grad()
def _check_smallest_piece(model: nn.Module, x: Tensor, run: RunFile, precision: Precision) -> None:
    """A model that cannot train on so few samples, such as one under BatchNorm, is found now, and left as it was."""
    random, buffers = random_states(), _copies_of_buffers(model)
    try:
        with precision.context():
            model(x)
    except Exception as error:
        raise UsageError(
            f"model: in training it does not take {len(x)} of the samples at once, which is the smallest part of a "
            f"batch here (data.batch_size {run.data.batch_size} over all processes, train.micro_batch "
            f"{run.train.micro_batch}, and what is left at the end of an epoch): {_described(error)}. If it needs "
            "more, choose other sizes."
        ) from error
    finally:
        set_random_states(random)
        for module, name, buffer, content in buffers:
            module._buffers[name] = buffer if torch.equal(buffer, content) else buffer.copy_(content)


def _copies_of_buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    return [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]


def build_method(run: RunFile, model: nn.Module, optimizer: Optimizer, total: int) -> Method:
    """The method of a run file, bound to a model and an optimiser.

    Raises:
        ValueError: for settings that fit neither the model nor the length of the run.
    """
    section = run.method
    match section:
        case DenseSection():
            return Dense(model)
        case Oialr():
            oialr = OIALR(model, optimizer, total_steps=total, **_options(section, "svd", "heat_rank"))
            _check_moment("delay", section.delay, oialr.delay, total)
            return oialr
        case SvdTraining():
            svd = SVDTraining(model, optimizer, total_steps=total, **_options(section))
            _check_moment("prune_at", section.prune_at, svd.prune_at, total)
            return svd


def _options(section: Section, *of_others: str) -> dict[str, Any]:
    """A method's arguments, without its name and those that are the replica's."""
    options = {key: msgspec.to_builtins(value) for key, value in msgspec.structs.asdict(section).items()}
    return {key: value for key, value in options.items() if key not in ("name", *of_others)}


def _check_moment(key: str, written: float, step: int, total: int) -> None:
    if step >= total:
        raise ValueError(
            f"{key} is {written} but the run has {total} steps, so nothing would ever become low-rank; "
            f"make it less than {total}, or a fraction of the run below 1"
        )


def steps_between_validations(run: RunFile, batches_per_epoch: int) -> int:
    """The validation interval of a run in steps."""
    if run.validation.every_steps is not None:
        return run.validation.every_steps
    return max(1, round((run.validation.every_epochs or 1.0) * batches_per_epoch))
