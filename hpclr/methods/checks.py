"""What is refused before training starts, with the value found and the values allowed."""

from collections.abc import Collection, Iterable, Mapping
from math import inf
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from hpclr.lowrank import WeightSite
from hpclr.methods.placement import Placement


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


def check_svd_settings(
    decomposition: str,
    regularizer: str,
    init: str,
    orthogonality: float,
    sparsity: float,
    energy: float,
    min_rank: float,
    max_aspect: float,
) -> None:
    """Raises ValueError for the first of SVD training's settings that is out of range."""
    _require(decomposition in ("channel", "spatial"), "decomposition", decomposition, "'channel' or 'spatial'")
    _require(
        regularizer in ("hoyer", "hoyer_square", "l1", "none"),
        "regularizer",
        regularizer,
        "'hoyer', 'hoyer_square', 'l1' or 'none'",
    )
    _require(init in ("svd", "random"), "init", init, "'svd' or 'random'")
    _require(0 <= orthogonality < inf, "orthogonality", orthogonality, "a finite number of 0 or more")
    _require(0 <= sparsity < inf, "sparsity", sparsity, "a finite number of 0 or more")
    _require(0 <= energy < 1, "energy", energy, "a number of 0 or more and below 1")
    _require(0 <= min_rank <= 1, "min_rank", min_rank, "a number in [0, 1]")
    _require(max_aspect > 1, "max_aspect", max_aspect, "a number above 1")


def check_layer_settings(min_rank: float, max_aspect: float) -> None:
    """Raises ValueError for the first of the settings of ranks and shapes that is out of range."""
    _require(0 <= min_rank <= 1, "min_rank", min_rank, "a number in [0, 1]")
    _require(max_aspect > 1, "max_aspect", max_aspect, "a number above 1")


def check_fixed_rank_settings(rank: float, init: str, frobenius_decay: float | None, max_aspect: float) -> None:
    """Raises ValueError for the first of fixed rank's settings that is out of range."""
    _require(0 < rank <= 1, "rank", rank, "a share of the smaller side in (0, 1]")
    _require(init in ("spectral", "random"), "init", init, "'spectral' or 'random'")
    _check_frobenius_decay(frobenius_decay)
    _require(max_aspect > 1, "max_aspect", max_aspect, "a number above 1")


def check_cuttlefish_settings(
    every: float, window: int, flatness: float, frobenius_decay: float | None, min_rank: float, max_aspect: float
) -> None:
    """Raises ValueError for the first of Cuttlefish's settings that is out of range."""
    _require(every > 0, "every", every, "a number above 0")
    _require(window >= 1 and window % 1 == 0, "window", window, "a whole number of measurements, 1 or more")
    _require(0 <= flatness < inf, "flatness", flatness, "a finite number of 0 or more")
    _check_frobenius_decay(frobenius_decay)
    check_layer_settings(min_rank, max_aspect)


def _check_frobenius_decay(decay: float | None) -> None:
    holds = decay is None or 0 <= decay < inf
    _require(holds, "frobenius_decay", decay, "a finite number of 0 or more, or None")


def _require(holds: bool, name: str, found: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, found {found!r}")


def placement_of(model: nn.Module) -> Placement | None:
    """What a replica says of who examines which layer; None for any other model."""
    found = getattr(model, "placement", None)
    return found if isinstance(found, Placement) else None


def check_model(model: nn.Module) -> nn.Module:
    """The module whose layers are to be converted: inside a replica or a compiled one, the original.

    Raises:
        TypeError: if it is not a module, or is wrapped so that its parameters cannot change shape.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, found {type(model).__name__}")
    inside: Any = model if placement_of(model) is None else model.module
    original: nn.Module = getattr(inside, "_orig_mod", inside)  # torch.compile's wrapper
    if isinstance(original, (DataParallel, DistributedDataParallel)):
        raise TypeError(
            f"the model is wrapped in {type(original).__name__}, which fixes the shapes of its parameters; low-rank "
            "training changes them. Use `replica = hpclr.parallel.Replica(model)` in its place, which renews it after "
            "each change, and give the replica to the method."
        )
    return original


def check_layers(found: Collection[str], left_alone: Mapping[str, str], method: str) -> None:
    """Raises ValueError if a model has no layer that can be converted; says of some why not."""
    if not found:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(left_alone.items())[:5])
        raise ValueError(f"the model has no layer that {method} can convert ({reasons or 'it has no parameters'})")


def check_dense(sites: Iterable[WeightSite]) -> None:
    """Raises ValueError if a weight that is to be factored is held as factors already."""
    for site in sites:
        if site.is_lowrank:
            raise ValueError(
                f"layer '{site.name}' is held as factors already; make the model dense first, with "
                "hpclr.densify(model), or leave the layer out with exclude="
            )


def check_saved(ranks: Mapping[str, int], largest: Mapping[str, int]) -> None:
    """Raises ValueError if saved ranks are not those of these layers, or larger than possible."""
    differing = sorted(n for n in ranks.keys() | largest.keys() if ranks.get(n, inf) > largest.get(n, 0))[:3]
    if differing:
        raise ValueError(f"the saved state is of another model or other settings: layers {', '.join(differing)} differ")
