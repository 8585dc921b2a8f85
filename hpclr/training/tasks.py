"""What a model is trained for: its loss and its metrics."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpclr.data import Batch, Loader
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
    def score(self, model: nn.Module, loader: Loader, precision: Precision) -> Score:
        """Evaluates a whole split in evaluation mode; the model's mode comes back at the end."""
        was_training = model.training
        model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=precision.device)
        correct = torch.zeros((), dtype=torch.int64, device=precision.device)
        samples = 0
        for index in range(len(loader)):
            batch = loader.batch(0, index).to(precision.device)
            with precision.context():
                outputs = model(batch.x)
            loss += F.cross_entropy(outputs.double(), batch.y, reduction="sum")
            correct += (outputs.argmax(1) == batch.y).sum()
            samples += len(batch.y)
        model.train(was_training)
        return Score(float(loss) / samples, int(correct) / samples, samples)
