"""What is refused before training starts, with the value found and the values allowed."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import inf
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from hpclr.lowrank import GavishDonoho, MarchenkoPastur, RankRule, WeightSite
from hpclr.lowrank.layers import is_sharded
from hpclr.methods.placement import Placement
from hpclr.methods.schedule import is_number


def check_settings(
    every: float | None,
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
    _number("every", every, lambda x: x > 0, "a number above 0")
    _number("layer_fraction", layer_fraction, lambda x: 0 < x <= 1, "a number in (0, 1]")
    _number("max_cut", max_cut, lambda x: 0 <= x <= 1, "a number in [0, 1]")
    check_layer_settings(min_rank, max_aspect)
    _one_of("freeze", freeze, ("schedule", "stable"))
    _number("stability_threshold", stability_threshold, lambda x: 0 < x <= 1, "a number in (0, 1]")
    _one_of("convert", convert, ("at_delay", "when_it_pays"))
    _number("sigma_lr", sigma_lr, lambda x: 0 < x < inf, "a finite number above 0")


def check_order(order: str, rule: RankRule, placement: Placement | None = None) -> None:
    """Raises ValueError or TypeError if directions are to be judged by outputs where that cannot be."""
    _one_of("order", order, ("size", "output"))
    if order == "output" and isinstance(rule, MarchenkoPastur | GavishDonoho):
        raise ValueError(
            "order='output' judges directions by what they do to outputs, but the cutoff is a rule for noise in "
            "weights; give another one, such as {'rule': 'energy', 'share': 0.9998}, or leave the order at 'size'"
        )
    if order == "output" and placement is not None and placement.sharded:
        raise TypeError(
            "order='output', which auto=True sets too, needs what whole layers take in, of which a sharded model has "
            "only a part in each process; leave it at 'size', or use hpclr.parallel.Replica where the whole model fits "
            "on one device"
        )


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
    _one_of("decomposition", decomposition, ("channel", "spatial"))
    _one_of("regularizer", regularizer, ("hoyer", "hoyer_square", "l1", "none"))
    _one_of("init", init, ("svd", "random"))
    _finite("orthogonality", orthogonality)
    _finite("sparsity", sparsity)
    _number("energy", energy, lambda x: 0 <= x < 1, "a number of 0 or more and below 1")
    check_layer_settings(min_rank, max_aspect)


def check_layer_settings(min_rank: float, max_aspect: float) -> None:
    """Raises ValueError for the first of the settings of ranks and shapes that is out of range."""
    _number("min_rank", min_rank, lambda x: 0 <= x <= 1, "a number in [0, 1]")
    _check_max_aspect(max_aspect)


def check_fixed_rank_settings(rank: float, init: str, frobenius_decay: float | None, max_aspect: float) -> None:
    """Raises ValueError for the first of fixed rank's settings that is out of range."""
    check_share(rank)
    _one_of("init", init, ("spectral", "random"))
    _check_frobenius_decay(frobenius_decay)
    _check_max_aspect(max_aspect)


def check_cuttlefish_settings(
    every: float, window: int, flatness: float, frobenius_decay: float | None, min_rank: float, max_aspect: float
) -> None:
    """Raises ValueError for the first of Cuttlefish's settings that is out of range."""
    _number("every", every, lambda x: x > 0, "a number above 0")
    _number("window", window, lambda x: x >= 1 and x % 1 == 0, "a whole number of measurements, 1 or more")
    _finite("flatness", flatness)
    _check_frobenius_decay(frobenius_decay)
    check_layer_settings(min_rank, max_aspect)


def check_nested_settings(
    fractions: Sequence[float],
    weights: Sequence[float] | None,
    nesting: str,
    draw: str,
    order: str,
    frobenius_decay: float | None,
    max_aspect: float,
) -> None:
    """Raises ValueError for the first of the settings of nesting that is out of range."""
    if len(set(fractions)) != len(fractions) or not fractions:
        raise ValueError(f"fractions must be one or more different shares, found {fractions!r}")
    for fraction in fractions:
        _number("fractions", fraction, lambda x: 0 < x <= 1, "shares of the smaller side in (0, 1]")
    for weight in weights or ():
        _number("weights", weight, lambda x: 0 < x < inf, "finite numbers above 0")
    if weights is not None and len(weights) != len(fractions):
        raise ValueError(
            f"weights must be as many as fractions, one for each: found {len(weights)} and {len(fractions)}"
        )
    _one_of("nesting", nesting, ("joint", "sequential"))
    _one_of("draw", draw, ("model", "layer"))
    _one_of("order", order, ("output", "size"))
    _check_frobenius_decay(frobenius_decay)
    _check_max_aspect(max_aspect)


def check_measurements(window: int, every: int, delay: int) -> None:
    """Raises ValueError if Cuttlefish, which measures every so many steps, could not find a layer flat by `delay`."""
    if window * every > delay:
        raise ValueError(
            f"window·every is {window}·{every} = {window * every} steps, but delay {delay}: only {delay // every} of "
            f"the {window} measurements that it takes to find a layer flat fit before it, so that all would wait for "
            f"the delay; lower window or every, or raise delay to {window * every} steps or more"
        )


def check_share(rank: Any, otherwise: str = "") -> float:
    """A rank that is a share of min(m, n); raises ValueError if it is not, and says what `otherwise` it might be."""
    _number("rank", rank, lambda x: 0 < x <= 1, f"a share of the smaller side in (0, 1]{otherwise}")
    return float(rank)


def _check_frobenius_decay(decay: float | None) -> None:
    if decay is not None:
        _number("frobenius_decay", decay, lambda x: 0 <= x < inf, "a finite number of 0 or more, or None")


def _check_max_aspect(max_aspect: float) -> None:
    _number("max_aspect", max_aspect, lambda x: x > 1, "a number above 1")


def _finite(name: str, found: object) -> None:
    _number(name, found, lambda x: 0 <= x < inf, "a finite number of 0 or more")


def _number(name: str, found: Any, holds: Callable[[float], bool], allowed: str) -> None:
    if not is_number(found) or not holds(found):
        raise ValueError(f"{name} must be {allowed}, found {found!r}")


def _one_of(name: str, found: object, allowed: Sequence[str]) -> None:
    if found not in allowed:
        *others, last = map(repr, allowed)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, found {found!r}")


def placement_of(model: nn.Module) -> Placement | None:
    """What a replica says of who examines which layer; None for any other model."""
    found = getattr(model, "placement", None)
    return found if isinstance(found, Placement) else None


def check_model(model: nn.Module, *, sharded: bool = False) -> nn.Module:
    """The module whose layers are to be converted: inside a replica or a compiled one, the original.

    Args:
        model: what the user passed.
        sharded: whether the method can train a model of which each process holds a part.

    Raises:
        TypeError: if it is not a module, or is wrapped so that its parameters cannot change shape, or sharded in a way
            that the method cannot follow.
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
    _check_shards(original, placement_of(model), sharded)
    return original


def _check_shards(model: nn.Module, placement: Placement | None, supported: bool) -> None:
    held = any(is_sharded(parameter) for parameter in model.parameters())
    if held and (placement is None or not placement.sharded):
        raise TypeError(
            "the model's parameters are sharded, as by fully_shard, which fixes their shapes; low-rank training "
            "changes them. Use `sharded = hpclr.parallel.Sharded(model)` on the model as it was before, and give that "
            "to OIALR."
        )
    if held and not supported:
        raise TypeError(
            "of all methods only OIALR can train a model that is sharded over the processes; use OIALR, or "
            "hpclr.parallel.Replica in place of Sharded where the whole model fits on one device"
        )


def check_whole(placement: Placement) -> None:
    """Raises TypeError where nobody can follow the changes of a layer, as each process holds a part of it."""
    if placement.sharded:
        raise TypeError(
            "averages and others that follow the changes of basis cannot do so on a sharded model, of which each "
            "process holds a part; do without, or use hpclr.parallel.Replica where the whole model fits on one device"
        )


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


def check_saved_by(method: str, state: Mapping[str, Any], keys: Collection[str]) -> None:
    """Raises ValueError if a saved state is another method's; one that does not say whose it is must have the keys."""
    found = state.get("method", method if state.keys() >= set(keys) - {"method"} else None)
    if found != method:
        whose = f"is of {found}, not" if found else "is not"
        raise ValueError(
            f"the saved state {whose} of {method}; load it into the method that it was saved by, with the same settings"
        )
