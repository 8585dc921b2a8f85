"""What is to be trained: the run file's task, the shapes of its samples, its length, and its model without data."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from hpclr.config import RunFile
from hpclr.config.schema import Target
from hpclr.data import Batch, Dataset, open_dataset
from hpclr.data.batches import Form
from hpclr.errors import UsageError, usage_errors
from hpclr.models import Samples
from hpclr.training.assembly import data_files, held_out
from hpclr.training.environment import random_states, set_random_states
from hpclr.training.lengths import check_length
from hpclr.training.model import build_model
from hpclr.training.tasks import Task, task_of

_TASK_OF_MODEL = {"patchtst": "forecasting", "gpt2": "language"}


@dataclass(frozen=True)
class Said:
    """What the user says of data that is not here.

    Attributes:
        samples: of the training split; windows of series and text.
        shape: of a sample; (columns,) of a time series, () of text.
        classes: how many; tokens of text.
    """

    samples: int
    shape: tuple[int, ...] = ()
    classes: int = 0


@dataclass(frozen=True)
class Subject:
    """What is to be trained, and how long.

    Attributes:
        run: the run file.
        task: its loss.
        samples: what the model is for.
        x_form, y_form: of a sample and of what is wanted of it.
        size: samples of the training split.
        steps: of the run.
        dataset: the data, where it is here.
    """

    run: RunFile
    task: Task
    samples: Samples
    x_form: Form
    y_form: Form
    size: int
    steps: int
    dataset: Dataset | None

    def batch(self, size: int, device: str = "cpu") -> Batch:
        """So many samples without contents."""
        x, y = (torch.empty(size, *form.shape, dtype=form.dtype, device=device) for form in (self.x_form, self.y_form))
        return Batch(x, y, torch.empty(size, dtype=torch.int64, device=device))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The task's, of this model."""
        return self.task.loss(model(batch.x), batch)

    @property
    def seen(self) -> int:
        """Samples that the run trains on, over all epochs; the last batch of each may be smaller than the others."""
        batch = self.run.data.batch_size
        epochs, rest = divmod(self.steps, ceil(self.size / batch))
        return epochs * self.size + rest * batch

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.float64 if self.run.train.precision == "float64" else torch.float32


@dataclass(frozen=True)
class _Facts:
    """What a dataset would say."""

    task: str
    sample_shape: tuple[int, ...]
    classes: range


def subject_of(run: RunFile, said: Said | None = None) -> Subject:
    """Looks at the data, or takes the user's word for it.

    Raises:
        UsageError: if the data is missing or does not fit the model, or the method does not fit the run's length.
    """
    if run.optimizer.name.lower().startswith("galore"):
        raise UsageError(
            "optimizer.name: what GaLore holds follows from its projections, of which hpclr plan knows nothing; plan "
            "with optimizer.name=adamw, which holds more and takes less time"
        )
    facts, x_form, y_form, size, dataset = _described(run, said) if said else _looked_at(run)
    task = task_of(run, facts)
    steps = run.train.steps or (run.train.epochs or 0) * ceil(size / run.data.batch_size)
    with usage_errors("method"):
        check_length(run.method, steps)
    return Subject(run, task, task.samples(run.data, facts), x_form, y_form, size, steps, dataset)


def _looked_at(run: RunFile) -> tuple[Any, Form, Form, int, Dataset]:
    files = data_files(run)
    missing = [str(path) for path in files if not Path(path).exists()]
    if missing:
        raise UsageError(
            f"data.path: {missing[0]} is not here. hpclr plan asks it for the shape of the samples and their number: "
            "prepare it with hpclr data prepare, or say what it will hold, such as --samples 50000 --shape 3x32x32 "
            "--classes 10"
        )
    dataset = open_dataset(files)
    on_disk = msgspec.structs.replace(run, data=msgspec.structs.replace(run.data, in_memory=False))
    loader = held_out(on_disk, dataset, "train", torch.float64 if run.train.precision == "float64" else torch.float32)
    return dataset, loader.x_form, loader.y_form, loader.size, dataset


def _described(run: RunFile, said: Said) -> tuple[Any, Form, Form, int, None]:
    kind = torch.float64 if run.train.precision == "float64" else torch.float32
    task = _TASK_OF_MODEL.get(getattr(run.model, "name", ""), "forecasting" if run.data.horizon else "classification")
    if isinstance(run.model, Target) and run.data.context and not run.data.horizon:
        task = "language"
    _check_said(task, said)
    if task == "classification":
        forms = Form(said.shape, kind), Form((), torch.int64)
    elif task == "language":
        forms = (Form((run.data.context or 0,), torch.int64),) * 2
    else:
        forms = Form((run.data.context or 0, *said.shape), kind), Form((run.data.horizon or 0, *said.shape), kind)
    shape = () if task == "language" else said.shape
    return _Facts(task, shape, range(said.classes)), *forms, said.samples, None


def _check_said(task: str, said: Said) -> None:
    lacking = [] if said.shape or task == "language" else ["--shape"]
    lacking += [] if said.classes or task == "forecasting" else ["--classes"]
    if lacking:
        raise UsageError(
            f"--samples says how many there are; what they are like is not known yet: add {' and '.join(lacking)}. "
            "For pictures --shape 3x32x32 --classes 10, for tables --shape 64 --classes 10, for time series --shape "
            "and the number of columns, for text --classes and the size of the vocabulary"
        )


def blank_model(subject: Subject) -> nn.Module:
    """The run's model, of which the contents do not matter.

    hpclr's own models take no time and no memory: they are made without contents, and then given memory that nothing
    is written to. Others are made as they are.

    Raises:
        UsageError: if there is no such model, it does not fit the data, or no machine could hold it.
    """
    random = random_states()
    try:
        if isinstance(subject.run.model, Target):
            made = build_model(subject.run, subject.samples, weights=False)
        else:
            with torch.device("meta"):
                made = build_model(subject.run, subject.samples, weights=False)
        return copied(made.to(subject.dtype), partial(torch.empty_like, device="cpu"))
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise UsageError(f"model: it is too large to be counted on this machine: {why}") from error
    finally:
        set_random_states(random)


def copied(model: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """The same model with other tensors in place of its own, of the same shapes; what is tied stays tied."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        made = make(tensor.detach())
        memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    return copy.deepcopy(model, memo)
