"""From a run file to the objects that train; whatever is wrong with it is found here, before anything is written."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpclr.config import RunFile
from hpclr.data import Augment, BatchLoader, Dataset, Loader, WindowLoader, count_windows, open_dataset
from hpclr.data.loader import choose_order
from hpclr.errors import UsageError, usage_errors
from hpclr.lowrank import EMA
from hpclr.methods import Method
from hpclr.output import say
from hpclr.parallel.group import Group
from hpclr.parallel.replica import Replica
from hpclr.parallel.sharded import Sharded
from hpclr.training.environment import record, seed_everything, seed_of
from hpclr.training.informed import start_together
from hpclr.training.job import Job, alone, on_this_node
from hpclr.training.method import build_method, build_replica
from hpclr.training.model import (
    build_model,
    check_extra_state,
    check_outputs,
    check_smallest_piece,
    smallest_piece,
    with_batch_statistics,
)
from hpclr.training.optimizers import optimizer_of
from hpclr.training.precision import Precision
from hpclr.training.schedules import LearningRate, learning_rate
from hpclr.training.tasks import Task, task_of


@dataclass
class Assembly:
    """Everything that a run trains with."""

    run: RunFile
    job: Job
    dataset: Dataset
    loader: BatchLoader
    valid: BatchLoader | None
    test: BatchLoader
    model: nn.Module
    replica: Replica | Sharded
    optimizer: Optimizer
    method: Method
    task: Task
    precision: Precision
    ema: EMA | None
    learning_rate: LearningRate
    total_steps: int
    environment: dict[str, object]

    @property
    def device(self) -> torch.device:
        """Where this process trains."""
        return self.job.device

    @property
    def sharded(self) -> Sharded | None:
        """The model as it is shared out over the processes; None where each holds it whole."""
        return self.replica if isinstance(self.replica, Sharded) and self.job.group.size > 1 else None

    @property
    def countable(self) -> nn.Module:
        """The model, or one without data of the same form, on which operations can be counted."""
        return self.model if self.sharded is None else self.sharded.outline()

    def example(self) -> Tensor:
        """An input batch as the model gets it, for counting operations."""
        return self.test.batch(0, 0).x.to(self.device)


@dataclass
class _Materials:
    """What each process makes by itself."""

    dataset: Dataset
    task: Task
    loader: BatchLoader
    valid: BatchLoader | None
    test: BatchLoader
    model: nn.Module
    precision: Precision
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
    loader, model, total = made.loader, made.model, made.total_steps
    if run.model.init is not None and not continuing:
        told = start_together(run, model, _made_plain(loader), job.group)
        if job.group.is_first:
            say(f"model.init: svd: {told}")
    replica = build_replica(run, model, job)
    optimizer = job.group.together(lambda: optimizer_of(run, model))
    with usage_errors("method"):
        method = build_method(run, replica, optimizer, total)
    ema = EMA(model, run.train.ema) if run.train.ema is not None else None
    if ema is not None:
        method.on_change(ema.follow)
    rate = learning_rate(run.schedule, run.optimizer.lr, total)
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
        task=made.task,
        precision=made.precision,
        ema=ema,
        learning_rate=rate,
        total_steps=total,
        environment=record(job.device, job.threads, job.hosts, job.layout.launcher) | {"total_steps": total},
    )


def _materials(run: RunFile, job: Job, continuing: bool) -> _Materials:
    dataset = open_dataset(on_this_node(run, data_files(run)))
    task = task_of(run, dataset)
    precision = Precision(run.train.precision, job.device)
    loader, valid, test = _loaders(run, dataset, precision.dtype, job.group)
    _check_validation(run, valid)
    total = run.train.steps or (run.train.epochs or 0) * len(loader)
    samples = task.samples(run.data, dataset)
    model = build_model(run, samples, weights=not continuing)
    # what is to be shared out may not fit on the device
    place = torch.device("cpu") if run.parallel.shard and job.group.size > 1 else job.device
    model = with_batch_statistics(run, model, job.device).to(place, precision.dtype)
    x = loader.batch(0, 0).x.to(place)
    check_outputs(model, x[:2], samples, precision)
    check_extra_state(model)
    check_smallest_piece(model, x[: smallest_piece(run, loader, total, job.group.size)], run, precision)
    if job.group.rank > 0:  # all have the same weights; what they draw while training is their own
        seed_everything(seed_of(run.train.seed, job.group.rank))
    return _Materials(dataset, task, loader, valid, test, model, precision, total)


def data_files(run: RunFile) -> list[Path]:
    """The files of a run's data, one or several."""
    path = run.data.path
    return [Path(path)] if isinstance(path, str) else [Path(one) for one in path]


def _loaders(
    run: RunFile, dataset: Dataset, dtype: torch.dtype, group: Group
) -> tuple[BatchLoader, BatchLoader | None, BatchLoader]:
    data = run.data
    loader = _loader(
        run,
        dataset,
        "train",
        data.batch_size,
        shuffle=choose_order(dataset, data.shuffle, data.window),
        augment=Augment(flip=data.flip, crop=data.crop) if data.flip or data.crop else None,
        mixup=data.mixup,
        dtype=dtype,
        part=(group.rank, group.size),
    )
    valid = held_out(run, dataset, "valid", dtype) if "valid" in dataset.sizes else None
    return loader, valid, held_out(run, dataset, "test", dtype)


def plain_batches(run: RunFile, dataset: Dataset, dtype: torch.dtype) -> BatchLoader:
    """The training split in the order of the run, as it is stored: whole batches, without augmentation or mixup."""
    order = choose_order(dataset, run.data.shuffle, run.data.window)
    return _loader(run, dataset, "train", run.data.batch_size, shuffle=order, dtype=dtype)


def _made_plain(loader: BatchLoader) -> BatchLoader:
    """The same as `plain_batches`, of the split that a run's own loader may have in memory."""
    plain = copy.copy(loader)
    plain.part, plain.mixup = (0, 1), 0.0
    if isinstance(plain, Loader):
        plain.augment = None
    return plain


def _loader(run: RunFile, dataset: Dataset, split: str, size: int, **options: Any) -> BatchLoader:
    """Labelled samples, or windows."""
    seed, options = run.train.seed, options | {"in_memory": run.data.in_memory}
    if dataset.task == "classification":
        return Loader(dataset, split, size, seed, **options)
    return WindowLoader(dataset, split, size, seed, **_window(run), **options)


def _window(run: RunFile) -> dict[str, Any]:
    return {key: getattr(run.data, key) for key in ("context", "horizon", "stride")}


def held_out(run: RunFile, dataset: Dataset, split: str, dtype: torch.dtype) -> BatchLoader:
    """The batches on which a run scores a split, in the order of the file; windows no more at once than in training."""
    if dataset.task == "classification":
        size = min(max(run.data.batch_size, 256), dataset.sizes[split])
    else:
        windows = count_windows(dataset, split, **_window(run))
        size = min(run.train.micro_batch or run.data.batch_size, windows)
    return _loader(run, dataset, split, size, shuffle=False, dtype=dtype)


def drawn(run: RunFile, dataset: Dataset, count: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Inputs of so many training samples, the first ones of the run's first epoch, without augmentation.

    Raises:
        UsageError: if there are not as many.
    """
    size, order = held_out(run, dataset, "train", dtype).batch_size, choose_order(dataset, "auto", run.data.window)
    loader = _loader(run, dataset, "train", size, shuffle=order, dtype=dtype)
    if count > loader.size:
        raise UsageError(f"{dataset.path}: {count:,} training samples are asked for, it has {loader.size:,}")
    for first in range(0, count, size):
        yield loader.batch(0, first // size).x[: count - first]


def _check_validation(run: RunFile, valid: BatchLoader | None) -> None:
    if valid is None and run.validation.patience is not None:
        raise UsageError(
            f"validation.patience asks for early stopping, but {run.data.path} has no validation split; prepare the "
            "data with --valid-fraction, or take validation.patience out"
        )


def steps_between_validations(run: RunFile, batches_per_epoch: int) -> int:
    """The validation interval of a run in steps."""
    if run.validation.every_steps is not None:
        return run.validation.every_steps
    return max(1, round((run.validation.every_epochs or 1.0) * batches_per_epoch))
