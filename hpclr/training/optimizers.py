"""Any optimiser of torch.optim by its name, or GaLore, with its options checked before training."""

import difflib
import inspect
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from hpclr.config import RunFile
from hpclr.config.schema import Optimizer as OptimizerSection
from hpclr.errors import UsageError

# Classes that a step on one batch's gradients does not suit, and why.
UNSUITABLE = {
    "lbfgs": "it evaluates the loss several times a step",
    "sparseadam": "it takes sparse gradients only",
}
NAMED_OPTIONS = ("weight_decay", "momentum", "nesterov", "betas", "eps")


def optimizer_of(run: RunFile, model: nn.Module) -> Optimizer:
    """The optimiser of a run: one of torch.optim, or GaLore, which is a package of its own.

    Raises:
        UsageError: as `build_optimizer`; for GaLore also where it is not installed, or cannot follow the method.
    """
    section = run.optimizer
    if not section.name.lower().startswith("galore"):
        return build_optimizer(section, model.parameters())
    if section.name.lower() != "galore_adamw":
        raise UsageError(f"optimizer.name: of GaLore's optimisers there is galore_adamw here, found '{section.name}'")
    if run.method.name != "dense":
        raise UsageError(
            "optimizer.name: galore_adamw keeps its moments in a space of its own for each weight, where they cannot "
            f"follow when method '{run.method.name}' changes the weight's form; use it with method: {{name: dense}}, "
            "or adamw with this method"
        )
    try:
        from hpclr.training.galore import build_galore
    except ImportError as error:
        raise UsageError(
            f"optimizer.name: galore_adamw needs the package galore-torch, which cannot be imported here ({error}): "
            "pip install 'hpclr[galore]'"
        ) from error
    return build_galore(section, model)


def build_optimizer(section: OptimizerSection, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimiser that the run file asks for.

    Raises:
        UsageError: for an unknown or unsuitable name, an option that the class does not take, or a value it refuses.
    """
    cls = _class_named(section.name)
    options = _options(section)
    _check_options(cls, options)
    trained = [p for p in parameters if p.requires_grad]
    _check_flags(options, on_cpu=not any(p.is_cuda for p in trained))
    try:
        optimizer: Optimizer = cast(Any, cls)(trained, lr=section.lr, **options)
        return optimizer
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"optimizer: torch.optim.{cls.__name__} refuses its options: {error}") from error


def _class_named(name: str) -> type[Optimizer]:
    classes = {
        cls.__name__.lower(): cls
        for cls in vars(torch.optim).values()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    }
    found = classes.get(name.lower())
    if found is None:
        close = difflib.get_close_matches(name.lower(), classes, n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise UsageError(f"optimizer.name: torch.optim has no '{name}'{hint} It has {', '.join(sorted(classes))}.")
    if name.lower() in UNSUITABLE:
        raise UsageError(
            f"optimizer.name: {found.__name__} cannot train here: {UNSUITABLE[name.lower()]}. Use sgd, adam, adamw, "
            "rmsprop, adagrad or another optimiser with state of its own for each parameter."
        )
    return found


def _options(section: OptimizerSection) -> dict[str, Any]:
    for key in section.args.keys() & {"lr", *NAMED_OPTIONS}:
        raise UsageError(
            f"optimizer.args: {key} is a key of the section itself; write it as optimizer.{key}, not in args"
        )
    named = {key: getattr(section, key) for key in NAMED_OPTIONS}
    return {key: value for key, value in named.items() if value is not None} | section.args


def _check_options(cls: type[Optimizer], options: dict[str, Any]) -> None:
    known = [name for name in inspect.signature(cls).parameters if name not in ("params", "lr")]
    for option in options:
        if option not in known:
            raise UsageError(
                f"optimizer.{option}: torch.optim.{cls.__name__} has no such option; it has {', '.join(known)}"
            )


def _check_flags(options: dict[str, Any], *, on_cpu: bool) -> None:
    """Flags that torch takes, to fail in the first step."""
    if options.get("differentiable"):
        raise UsageError(
            "optimizer.args: differentiable cannot work here: it changes weights in place while their gradients are "
            "recorded; take it out"
        )
    if options.get("capturable") and on_cpu:
        raise UsageError("optimizer.args: capturable is for CUDA graphs, but this run is on the CPU; take it out")
