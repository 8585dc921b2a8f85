"""What a model is trained for: its loss and its metrics."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpclr.data import Batch, Loader
from hpclr.parallel.group import Group
from hpclr.training.precision import Precision


class Score(NamedTuple):
    """How a model does on a split."""

    loss: float  # mean cross-entropy in nats
    accuracy: float  # share of samples whose largest output is the label
    samples: int


class Classification:
    """Cross-entropy over classes, with label smoothing and mixup.

    Args:
        label_smoothing: share of each label spread over all classes, in training only.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean loss of a batch; outputs (N, classes)."""
        loss = F.cross_entropy(outputs, batch.y, label_smoothing=self.label_smoothing)
        if batch.y_mixed is None:
            return loss
        mixed = F.cross_entropy(outputs, batch.y_mixed, label_smoothing=self.label_smoothing)
        both: Tensor = batch.lam * loss + (1 - batch.lam) * mixed
        return both

    @torch.no_grad()
    def score(
        self,
        model: nn.Module,
        loader: Loader,
        precision: Precision,
        group: Group | None = None,
        progress: Callable[[], None] = lambda: None,
    ) -> Score:
        """Evaluates a whole split in evaluation mode; the model's mode comes back at the end.

        Args:
            model: the same on all processes.
            loader: gives whole batches.
            precision: the arithmetic.
            group: processes that share out the batches in turns; None: this one takes all.
            progress: called after each batch.
        """
        group = group or Group()
        was_training = model.training
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=precision.device)  # loss, correct, samples
        for index in range(group.rank, len(loader), group.size):
            batch = loader.batch(0, index).to(precision.device)
            with precision.context():
                outputs = model(batch.x)
            sums[0] += F.cross_entropy(outputs.double(), batch.y, reduction="sum")
            sums[1] += (outputs.argmax(1) == batch.y).sum()
            sums[2] += len(batch.y)
            progress()
        model.train(was_training)
        loss, correct, samples = group.sum(sums).tolist()
        return Score(loss / samples, correct / samples, int(samples))
