"""What is refused before training starts, with the value found and the values allowed."""

from math import inf

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def check_settings(
    every: float,
    layer_fraction: float,
    max_cut: float,
    min_rank: float,
    max_aspect: float,
    freeze: str,
    stability_threshold: float,
    convert: str,
    sigma_lr: float,
) -> None:
    """Raises ValueError for the first of OIALR's settings that is out of range."""
    _require(every > 0, "every", every, "a number above 0")
    _require(0 < layer_fraction <= 1, "layer_fraction", layer_fraction, "a number in (0, 1]")
    _require(0 <= max_cut <= 1, "max_cut", max_cut, "a number in [0, 1]")
    _require(0 <= min_rank <= 1, "min_rank", min_rank, "a number in [0, 1]")
    _require(max_aspect > 1, "max_aspect", max_aspect, "a number above 1")
    _require(freeze in ("schedule", "stable"), "freeze", freeze, "'schedule' or 'stable'")
    _require(0 < stability_threshold <= 1, "stability_threshold", stability_threshold, "a number in (0, 1]")
    _require(convert in ("at_delay", "when_it_pays"), "convert", convert, "'at_delay' or 'when_it_pays'")
    _require(0 < sigma_lr < inf, "sigma_lr", sigma_lr, "a finite number above 0")


def _require(holds: bool, name: str, found: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, found {found!r}")


def check_model(model: nn.Module) -> nn.Module:
    """The module whose layers are to be converted: inside a compiled one, the original.

    Raises:
        TypeError: if it is not a module, or is wrapped so that its parameters cannot change shape.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, found {type(model).__name__}")
    original: nn.Module = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if isinstance(original, (DataParallel, DistributedDataParallel)):
        raise TypeError(
            f"the model is wrapped in {type(original).__name__}, which fixes the shapes of its parameters; low-rank "
            "training changes them. This version trains in one process: pass the module inside, unwrapped."
        )
    return original
