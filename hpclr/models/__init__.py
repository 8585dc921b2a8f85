"""The built-in models: plain PyTorch, initialised from torch's current random state alone.

`build` makes one for the samples of a dataset; everything else is an option of the model, listed in its
class. Any other model is as good for hpclr: these know nothing of low rank.
"""

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from hpclr.models.common import Samples
from hpclr.models.mlp import MLP
from hpclr.models.resnet import DEPTHS, ResNet
from hpclr.models.vgg import VGG16
from hpclr.models.vit import VisionTransformer
from hpclr.models.zoo import GPT2, PatchTST

__all__ = ["GPT2", "MLP", "VGG16", "PatchTST", "ResNet", "Samples", "VisionTransformer", "build", "names"]


class _Model(NamedTuple):
    """What makes a model, out of the shape of a sample, the sizes of an output and options; and what it is for."""

    factory: Callable[..., nn.Module]
    tasks: tuple[str, ...] = ("classification",)


_MODELS = {
    "mlp": _Model(MLP, ("classification", "forecasting")),
    "vit": _Model(VisionTransformer),
    "vgg16": _Model(VGG16),
    **{f"resnet{depth}": _Model(partial(ResNet, depth)) for depth in DEPTHS},
    "patchtst": _Model(PatchTST, ("forecasting",)),
    "gpt2": _Model(GPT2, ("language",)),
}


def names(task: str | None = None) -> list[str]:
    """Return the names that `build` knows, all or those of models for a task."""
    return [name for name, model in _MODELS.items() if task is None or task in model.tasks]


def build(name: str, samples: Samples, **options: object) -> nn.Module:
    """Build a model by its name.

    Args:
        name: one of `names()`.
        samples: what it is for; it maps (batch, *inputs) to (batch, *outputs).
        options: keyword arguments of the model's class.

    Raises:
        ValueError: unknown name or option, a model for other tasks, or a value that does not fit the samples.
    """
    if name not in _MODELS:
        raise ValueError(f"Unknown model '{name}'{_nearest(name, names())}; there are {', '.join(names())}.")
    factory, tasks = _MODELS[name]
    known = _options(factory)
    for option in options:
        if option not in known:
            raise ValueError(
                f"Model '{name}' has no option '{option}'{_nearest(option, known)}; its options are {', '.join(known)}."
            )
    if samples.task not in tasks:
        raise ValueError(
            f"{name} is a model for {' and '.join(tasks)}, the data is for {samples.task}; "
            f"models for that are {', '.join(names(samples.task))}."
        )
    return factory(samples.inputs, *samples.outputs, **options)


def _options(factory: Callable[..., nn.Module]) -> list[str]:
    """Return the names of the keyword-only arguments."""
    parameters = inspect.signature(factory).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _nearest(word: str, known: list[str]) -> str:
    """Return ` (did you mean '…'?)` for a misspelt word, or nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
