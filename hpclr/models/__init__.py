"""The built-in models: plain PyTorch, initialised from torch's current random state alone.

`build` makes one for the samples and classes of a dataset; everything else is an option of the
model, listed in its class. Any other model is as good for hpclr: these know nothing of low rank.
"""

import difflib
import inspect
from collections.abc import Callable
from functools import partial

from torch import nn

from hpclr.models.mlp import MLP
from hpclr.models.resnet import DEPTHS, ResNet
from hpclr.models.vgg import VGG16
from hpclr.models.vit import VisionTransformer

__all__ = ["MLP", "VGG16", "ResNet", "VisionTransformer", "build", "names"]

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "vit": VisionTransformer,
    "vgg16": VGG16,
    **{f"resnet{depth}": partial(ResNet, depth) for depth in DEPTHS},
}


def names() -> list[str]:
    """Return the names that `build` knows."""
    return list(_MODELS)


def build(name: str, *, sample_shape: tuple[int, ...], classes: int, **options: object) -> nn.Module:
    """Build a model by its name.

    Args:
        name: one of `names()`.
        sample_shape: shape of one sample: (channels, height, width), or any shape for `mlp`.
        classes: how many classes; the model returns logits of shape (batch, classes).
        options: keyword arguments of the model's class.

    Raises:
        ValueError: unknown name or option, or a value that does not fit the samples.
    """
    if name not in _MODELS:
        raise ValueError(f"Unknown model '{name}'{_nearest(name, names())}; there are {', '.join(names())}.")
    known = _options(_MODELS[name])
    for option in options:
        if option not in known:
            raise ValueError(
                f"Model '{name}' has no option '{option}'{_nearest(option, known)}; its options are {', '.join(known)}."
            )
    return _MODELS[name](sample_shape, classes, **options)


def _options(factory: Callable[..., nn.Module]) -> list[str]:
    """Return the names of the keyword-only arguments."""
    parameters = inspect.signature(factory).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _nearest(word: str, known: list[str]) -> str:
    """Return ` (did you mean '…'?)` for a misspelt word, or nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
