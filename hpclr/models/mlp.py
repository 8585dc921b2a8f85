"""A multilayer perceptron on flattened samples."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from hpclr.models.common import check_dropout, check_whole

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


class MLP(nn.Module):
    """Linear layers with an activation and dropout between them, initialised as torch does.

    Args:
        sample_shape: shape of one sample, whatever its dimensions.
        outputs: number of classes; or several sizes, those of an output, such as rows and columns of a forecast.
        hidden: widths of the hidden layers, first to last; none makes a linear classifier.
        activation: relu, gelu or tanh.
        dropout: probability of dropping a hidden unit.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        *outputs: int,
        hidden: Sequence[int] = (256, 256),
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check(sample_shape, outputs, hidden, activation, dropout)
        widths = [math.prod(sample_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation](), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], math.prod(outputs))
        self.outputs, self.activation = outputs, activation

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, classes), or values (batch, *outputs), for samples (batch, *sample_shape)."""
        values: Tensor = self.head(self.layers(x)).unflatten(1, self.outputs)
        return values


def _check(
    sample_shape: tuple[int, ...], outputs: tuple[int, ...], hidden: object, activation: str, dropout: float
) -> None:
    """Raise ValueError for an argument out of its range."""
    if not sample_shape or min(sample_shape) < 1:
        raise ValueError(f"mlp: samples must have at least one value, found shape {tuple(sample_shape)}.")
    if not isinstance(hidden, (list, tuple)):
        raise ValueError(f"mlp: hidden must be a list of widths such as [256, 256], found {hidden!r}.")
    sizes = {"classes": outputs[0]} if len(outputs) == 1 else {f"outputs[{i}]": size for i, size in enumerate(outputs)}
    check_whole("mlp", **sizes, **{f"hidden[{i}]": width for i, width in enumerate(hidden)})
    if activation not in ACTIVATIONS:
        raise ValueError(f"mlp: activation must be one of {', '.join(ACTIVATIONS)}, found {activation!r}.")
    check_dropout("mlp", dropout)
