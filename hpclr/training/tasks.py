"""What a model is trained for: its loss, its metrics, the shapes of what it takes and gives."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpclr.config import RunFile
from hpclr.config.schema import Data
from hpclr.data import Batch, BatchLoader
from hpclr.models import Samples
from hpclr.parallel.group import Group
from hpclr.training.demands import check_demands
from hpclr.training.precision import Precision
from hpclr.training.scores import Score


class Facts(Protocol):
    """What a dataset is, or what a checkpoint says of one."""

    @property
    def task(self) -> str:
        """What it is for."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample; (columns,) of a time series, () of text."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes, of the columns, of the tokens."""


class Task(ABC):
    """A loss to train with, and metrics to judge by.

    Attributes:
        name: as datasets call it.
        outputs: what a model gives for a sample, in words, with a place for each of its sizes.
    """

    name: ClassVar[str]
    outputs: ClassVar[str]

    def __init__(self, label_smoothing: float = 0.0) -> None:
        """Takes the share of each label that is spread over all, in training only."""
        self.label_smoothing = label_smoothing

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean loss of a batch, in float32 at least."""

    @abstractmethod
    def errors(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Two numbers for everything predicted, of whose means scores are made; the mean of the first is the loss."""

    @abstractmethod
    def metrics_of(self, first: Tensor, second: Tensor) -> dict[str, float]:
        """The metrics, of the means of the two."""

    @abstractmethod
    def samples(self, data: Data, facts: Facts) -> Samples:
        """What a model is built for."""

    @torch.no_grad()
    def score(
        self,
        model: nn.Module,
        loader: BatchLoader,
        precision: Precision,
        group: Group | None = None,
        progress: Callable[[], None] = lambda: None,
        *,
        in_step: bool = False,
    ) -> Score:
        """Evaluates a whole split in evaluation mode; the model's mode comes back at the end.

        Args:
            model: the same on all processes.
            loader: gives whole batches.
            precision: the arithmetic.
            group: processes that share out the batches in turns; None: this one takes all.
            progress: called after each batch.
            in_step: whether all processes must call the model equally often; those without a batch left do so in vain.
        """
        group = group or Group()
        was_training = model.training
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=precision.device)  # both errors, predictions, samples
        last, in_vain = len(loader) - 1, -len(loader) % group.size if in_step else 0
        for index in range(group.rank, len(loader) + in_vain, group.size):
            batch = loader.batch(0, min(index, last)).to(precision.device)
            with precision.context():
                outputs = model(batch.x)
            if index > last:
                break
            first, second = self.errors(outputs, batch)
            sums[0] += first.sum(dtype=torch.float64)
            sums[1] += second.sum(dtype=torch.float64)
            sums[2] += first.numel()
            sums[3] += len(batch.y)
            progress()
        model.train(was_training)
        first, second, predictions, samples = group.sum(sums)
        loss = first / predictions
        return Score(loss.item(), self.metrics_of(loss, second / predictions), int(samples))


class Classification(Task):
    """Cross-entropy over classes, with label smoothing and mixup; outputs are (N, classes)."""

    name = "classification"
    outputs = "one number for each of the {} classes of the data"

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy; of mixed samples, of both labels by their shares."""
        loss = F.cross_entropy(outputs, batch.y, label_smoothing=self.label_smoothing)
        if batch.y_mixed is None:
            return loss
        mixed = F.cross_entropy(outputs, batch.y_mixed, label_smoothing=self.label_smoothing)
        both: Tensor = batch.lam * loss + (1 - batch.lam) * mixed
        return both

    def errors(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and whether the largest output is the label's, of each sample."""
        return F.cross_entropy(outputs.double(), batch.y, reduction="none"), outputs.argmax(1) == batch.y

    def metrics_of(self, first: Tensor, second: Tensor) -> dict[str, float]:
        """The share of samples whose largest output is the label's."""
        return {"accuracy": second.item()}

    def samples(self, data: Data, facts: Facts) -> Samples:
        """As stored, to classes."""
        return Samples(self.name, tuple(facts.sample_shape), (len(facts.classes),))


class Forecasting(Task):
    """Squared error of the rows that follow a window, over all columns, standardised; outputs (N, horizon, columns)."""

    name = "forecasting"
    outputs = "one number for each of the {} rows to predict (data.horizon) and the {} columns"

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean squared error over windows, rows and columns."""
        return F.mse_loss(_wide(outputs), batch.y)

    def errors(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Squared and absolute error of each value."""
        difference = outputs.double() - batch.y
        return difference.square(), difference.abs()

    def metrics_of(self, first: Tensor, second: Tensor) -> dict[str, float]:
        """Mean squared and mean absolute error."""
        return {"mse": first.item(), "mae": second.item()}

    def samples(self, data: Data, facts: Facts) -> Samples:
        """Windows to the rows that follow."""
        context, horizon = data.context or 0, data.horizon or 0
        return Samples(self.name, (context, *facts.sample_shape), (horizon, *facts.sample_shape))


class NextToken(Task):
    """Cross-entropy of the token after each one of a window, in nats; outputs are (N, context, vocabulary)."""

    name = "language"
    outputs = "one number for each of the {} tokens that it sees (data.context) and the {} of the vocabulary"

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy over windows and places."""
        wide = _wide(outputs).flatten(0, 1)
        return F.cross_entropy(wide, batch.y.flatten(), label_smoothing=self.label_smoothing)

    def errors(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and whether the largest output is the token's, of each token."""
        rows, tokens = _wide(outputs).flatten(0, 1), batch.y.flatten()
        return F.cross_entropy(rows, tokens, reduction="none"), rows.argmax(1) == tokens

    def metrics_of(self, first: Tensor, second: Tensor) -> dict[str, float]:
        """e to the power of the loss, and the share of tokens that have the largest output."""
        return {"perplexity": first.exp().item(), "accuracy": second.item()}

    def samples(self, data: Data, facts: Facts) -> Samples:
        """Tokens to numbers for each of the vocabulary."""
        context = data.context or 0
        return Samples(self.name, (context,), (context, len(facts.classes)))


TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Forecasting, NextToken)}


def task_of(run: RunFile, facts: Facts) -> Task:
    """The task that a dataset is for, with what the run file says of it.

    Raises:
        UsageError: if the run file lacks what it needs, or has keys for other tasks.
    """
    check_demands(run, facts.task)
    return TASKS[facts.task](run.train.label_smoothing)


def _wide(outputs: Tensor) -> Tensor:
    """In float32 at least, whatever the model computes in."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))
