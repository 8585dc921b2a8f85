"""What the built-in models share: what they are for, checks of their options, the initialisation of conv nets."""

import math
from typing import NamedTuple

from torch import nn


class Samples(NamedTuple):
    """What a model is built for.

    Attributes:
        task: "classification", "forecasting" or "language".
        inputs: shape of one sample: (channels, height, width) or (features,); (rows, columns) of a time series;
            (tokens,) of text.
        outputs: shape of what is wanted of it: (classes,); (rows, columns); (tokens, vocabulary).
    """

    task: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def check_whole(model: str, **values: int) -> None:
    """Refuse options that are not whole numbers of at least 1."""
    for name, value in values.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{model}: {name} must be a whole number of at least 1, found {value!r}.")


def check_positive(model: str, **values: float) -> None:
    """Refuse options that are not finite numbers above 0."""
    for name, value in values.items():
        if not _is_number(value) or not 0 < value < math.inf:
            raise ValueError(f"{model}: {name} must be a number above 0, found {value!r}.")


def check_dropout(model: str, dropout: float) -> None:
    """Refuse a dropout that is not a probability below 1."""
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"{model}: dropout must be a number of at least 0 and below 1, found {dropout!r}.")


def image_shape(model: str, sample_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return (channels, height, width) of the samples, or refuse samples that are no images."""
    if len(sample_shape) != 3 or min(sample_shape) < 1:
        raise ValueError(
            f"{model}: samples must be images of shape (channels, height, width), "
            f"found samples of shape {tuple(sample_shape)}; the model 'mlp' takes any shape."
        )
    channels, height, width = sample_shape
    return channels, height, width


def init_conv_net(net: nn.Module) -> None:
    """Draw convolutions from He's normal law for ReLU (fan-out); other layers keep torch's own.

    Source: He et al., "Delving Deep into Rectifiers", arXiv 1502.01852.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _is_number(value: object) -> bool:
    """Tell numbers from everything else, booleans included."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
