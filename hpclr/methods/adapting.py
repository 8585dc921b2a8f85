"""What the methods have in common that fine-tune a pretrained model through adapters, its own weights frozen."""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field, fields
from fnmatch import fnmatchcase
from hashlib import sha256
from itertools import chain
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpclr.lowrank import WeightSite
from hpclr.lowrank.adapters import (
    Adaptable,
    AdaptedModule,
    adapt,
    adaptable,
    adapted_modules,
    merge_adapters,
    unmerge_adapters,
)
from hpclr.lowrank.adapters.layers import Sizes
from hpclr.lowrank.factors import SVD
from hpclr.lowrank.layers import lowrank_modules
from hpclr.lowrank.moments import check_optimizer
from hpclr.methods.base import ChangeHook, Method, no_penalty
from hpclr.methods.checks import (
    check_layer_settings,
    check_layers,
    check_model,
    check_saved,
    check_saved_by,
    placement_of,
)
from hpclr.methods.factoring import refuse_failed, share_factors
from hpclr.methods.placement import Here, Outcome, Placement
from hpclr.methods.steps import WithoutDecay


@dataclass(eq=False, repr=False)
class Adapter(Method):
    """Layers that keep their weight, frozen, and train an adapter; a method says which and at which rank.

    A method's own settings are the fields that it adds to these; they must be the same when a state is loaded.

    Args:
        model: any module, or a `hpclr.parallel.Replica` of one; its layers are adapted in place, now, and everything
            else but the head is frozen.
        optimizer: holds the model's parameters: adapters take the place of their weight in its group, what is frozen
            leaves the groups, and `without_decay` gets no weight decay; None: it is made afterwards, from the
            parameters that require gradients.
        max_aspect: weights with max(m, n)/min(m, n) of this or more get no adapter.
        keep_first: the first layer of an eligible type gets no adapter.
        keep_last: the last one, the head, gets no adapter and is trained whole, with its bias, as one that is new to
            the model must be; unless its weight is tied to another layer's.
        include: patterns (`*`, `?`) of the names of layers to adapt; None means all.
        exclude: patterns of the names of layers to adapt not.
        train: patterns of the names of parameters (not layers) that go on training beside adapters and head, such as
            `*.bias`; all else is frozen, whether it was before or not.
        seed: of what is drawn at random, for each layer by its name, the same on all processes.
        placement: which process decomposes which layer; None: as the replica says, else this one all of them.

    Attributes:
        name: the method's name in run files and in saved states.
        title: the same, for messages.
        form: what its adapters compute.
        report: layer name → why it has no adapter.
        trained: names of the base model's own parameters that go on training.

    Raises:
        ValueError: for a setting out of range, a pattern that matches nothing, a model without eligible layers or with
            adapters or factors already, weights that are not finite, an optimiser that does not hold what is trained.
        TypeError: for a model wrapped in DistributedDataParallel, or something that is no optimiser of torch's.
    """

    adapts = True
    name: ClassVar[str]
    title: ClassVar[str]
    form: ClassVar[type[AdaptedModule]]

    model: InitVar[nn.Module]
    optimizer: InitVar[Optimizer | None] = None
    _: KW_ONLY
    max_aspect: float = 10.0
    keep_first: bool = False
    keep_last: bool = True
    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    train: Sequence[str] = ()
    seed: int = 0
    placement: InitVar[Placement | None] = None
    report: dict[str, str] = field(init=False)
    trained: tuple[str, ...] = field(init=False)

    def __post_init__(self, model: nn.Module, optimizer: Optimizer | None, placement: Placement | None) -> None:
        """Adapts the model."""
        check_layer_settings(0, self.max_aspect)
        self._check_settings()
        self._model = check_model(model)
        _refuse_other_forms(self._model)
        chosen = adaptable_by(self, self._model)
        small = {name: why for name, site in chosen.sites.items() if (why := self._too_small(site))}
        sites = {name: site for name, site in chosen.sites.items() if name not in small}
        check_layers(sites, small | chosen.left_alone, self.title)
        self.trained = trained_names(self._model, self.train, chosen.head, sites)
        self.report = said_of_trained(chosen.left_alone | small, self.trained)
        if optimizer is not None:
            check_held(optimizer, self._model, sites, self.trained)
        self._placement = placement or placement_of(model) or Here()
        self._adapt(sites)
        self._train_only_adapters(optimizer)
        if placement_of(model) is not None:
            cast(Any, model).renew()  # other parameters require gradients now
        self._placement.confirm(self.ranks, self._model.parameters())

    def _train_only_adapters(self, optimizer: Optimizer | None) -> None:
        added = {
            layer.parameter("weight"): {name: layer.parameter(name) for name in layer.trained}
            for layer in self._layers.values()
        }
        adapters = chain.from_iterable(parameters.values() for parameters in added.values())
        freeze_rest(self._model, [*map(self._model.get_parameter, self.trained), *adapters])
        if optimizer is not None:
            take_places(optimizer, added)
            WithoutDecay(optimizer, lambda: self.without_decay)

    @abstractmethod
    def _check_settings(self) -> None:
        """Raises ValueError or TypeError for the first of the method's own settings that is out of range."""

    @abstractmethod
    def _basis(self, site: WeightSite) -> SVD | int:
        """The leading part of a weight's decomposition, or only its rank, if the form asks for no more."""

    @abstractmethod
    def _start(self, weight: Tensor, found: Outcome, generator: torch.Generator) -> dict[str, Tensor]:
        """The adapter's parameters at the start, for a weight (m×n) and what `_basis` found."""

    def _too_small(self, site: WeightSite) -> str | None:
        """Why a layer cannot have an adapter of the rank that was asked for; None if it can."""
        return None

    @torch.no_grad()
    def _adapt(self, sites: Mapping[str, WeightSite]) -> None:
        """Each weight decomposed by one process, the outcomes on all; none is adapted if any cannot be decomposed."""
        starts = {}
        for name, outcome in refuse_failed(dict(share_factors(self._placement, sites, self._basis))).items():
            starts[name] = self._start(sites[name].core(), outcome, generator_for(self.seed, name))
            _check_finite(name, starts[name], sites[name].parameter.dtype)
        self._layers = {name: adapt(sites[name].module, self.form, start) for name, start in starts.items()}

    @property
    def ranks(self) -> dict[str, int]:
        """Layer name → rank of its adapter."""
        return {name: layer.rank for name, layer in self._layers.items()}

    @property
    def without_decay(self) -> list[nn.Parameter]:
        """Parameters of the adapters, one number for each direction or output, that weight decay should leave alone.

        They are scales, which it would draw to 0. A given optimiser spares them; one that is made afterwards should.
        """
        return [layer.parameter(name) for layer in self._layers.values() for name in layer.scales]

    @property
    def _settings(self) -> dict[str, Any]:
        common = {one.name for one in fields(Adapter)}
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in common}

    def step(self) -> None:
        """Nothing is ever due."""

    def penalty(self) -> Tensor:
        """Adapters add nothing to the loss."""
        return no_penalty(self._model)

    def on_change(self, hook: ChangeHook) -> None:
        """Nothing ever changes its form after the start."""

    def merge(self) -> None:
        """Has the layers compute with W' alone; see `hpclr.lowrank.adapters.merge_adapters`.

        Raises:
            ValueError: if the adapters cannot be merged.
        """
        merge_adapters(self._model)

    def unmerge(self) -> None:
        """Gives the weights what they held before `merge`, to the bit."""
        unmerge_adapters(self._model)

    def state_dict(self) -> dict[str, Any]:
        """Whose state it is, its settings, the ranks, and what else trains; the adapters are in the model's state."""
        return {
            "method": self.name,
            "settings": self._settings,
            "ranks": self.ranks,
            "trained": list(self.trained),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a state back and gives the adapters the ranks they had.

        Load this first, then the model's state dict, then the optimiser's.

        Raises:
            ValueError: if the state belongs to another method, other settings or another model; names what differs.
        """
        check_saved_by(self.name, state, self.state_dict())
        check_same(state, self.state_dict(), ("settings", "trained"))
        check_saved(state["ranks"], {name: min(layer.matrix_shape) for name, layer in self._layers.items()})
        for name, layer in self._layers.items():
            layer.resize(Sizes(int(state["ranks"][name]), int(self._settings.get("experts", 0))))


def adaptable_by(settings: Any, model: nn.Module) -> Adaptable:
    """Which layers to adapt, by the settings that all methods with adapters and their sections of run files have."""
    keys = ("max_aspect", "keep_first", "keep_last", "include", "exclude")
    return adaptable(model, **{key: getattr(settings, key) for key in keys})


def _check_finite(layer: str, start: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    for name, value in start.items():
        if not value.to(dtype).isfinite().all():
            raise ValueError(
                f"layer '{layer}': '{name}' of its adapter would start with numbers that {dtype} cannot hold; a wider "
                "type of the weights, or smaller settings such as alpha, would do"
            )


def check_same(state: Mapping[str, Any], own: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Raises ValueError if a saved state differs from one's own in one of these entries; says in which."""
    for key in keys:
        if state.get(key) != own[key]:
            raise ValueError(
                f"the saved state is of other settings: it was saved with {key} {state.get(key)}, not {own[key]}"
            )


def generator_for(seed: int, layer: str) -> torch.Generator:
    """A generator on the CPU that is the same wherever and in whichever order layers are adapted."""
    digest = sha256(f"{seed} {layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def check_whole_number(name: str, found: Any) -> int:
    """A number of ranks or experts; raises ValueError if it is none."""
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ValueError(f"{name} must be a whole number of 1 or more, found {found!r}")
    return found


def _refuse_other_forms(model: nn.Module) -> None:
    for what, found in (("has an adapter", adapted_modules(model)), ("is held as factors", lowrank_modules(model))):
        for name, _ in found:
            raise ValueError(
                f"layer '{name}' {what} already; give the method the model as it was pretrained (take adapters away "
                "with hpclr.lowrank.adapters.remove_adapters(model), make factors dense with hpclr.densify(model))"
            )


def trained_names(
    model: nn.Module, patterns: Sequence[str], head: WeightSite | None, sites: Mapping[str, WeightSite]
) -> tuple[str, ...]:
    """The names of the base model's parameters that go on training: those asked for, and those of the head."""
    if isinstance(patterns, str):
        raise TypeError(f"train takes a list of patterns of parameter names; for a single one write [{patterns!r}]")
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
            raise ValueError(f"the pattern '{pattern}' (train) matches no parameter of the model; it has {shown}")
    own = () if head is None else [head.key(name) for name, _ in head.module.named_parameters()]
    chosen = tuple(name for name in names if name in own or any(fnmatchcase(name, p) for p in patterns))
    weights = {site.key(site.slot.weight) for site in sites.values()}
    for name in chosen:
        if name in weights:
            raise ValueError(
                f"'{name}' is to train, and is the weight under an adapter, which stays as it is; leave its layer out "
                "with exclude=, or make the patterns in train narrower"
            )
    return chosen


def said_of_trained(report: Mapping[str, str], trained: Sequence[str]) -> dict[str, str]:
    """Why layers have no adapter, and what trains of them all the same, as of a head."""
    own: dict[str, list[str]] = {}
    for name in trained:
        path, _, last = name.rpartition(".")
        own.setdefault(path, []).append(last)
    return {
        layer: f"{why}; its {' and '.join(own[layer])} train{'s' * (len(own[layer]) == 1)}" if layer in own else why
        for layer, why in report.items()
    }


def check_held(optimizer: Optimizer, model: nn.Module, sites: Mapping[str, WeightSite], trained: Sequence[str]) -> None:
    """Raises ValueError if an optimiser does not hold the weights under adapters and what else is to train."""
    check_optimizer(optimizer, {name: site.parameter for name, site in sites.items()})
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name in trained if id(model.get_parameter(name)) not in held]
    if missing:
        shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise ValueError(
            f"the optimiser does not hold {len(missing)} of the parameters that are to train ({shown}); make it from "
            "all of the model's parameters, or give optimizer=None and make it afterwards from those that require "
            "gradients"
        )


def freeze_rest(model: nn.Module, trained: Collection[nn.Parameter]) -> None:
    """Only these train."""
    kept = {id(parameter) for parameter in trained}
    for parameter in model.parameters():
        if id(parameter) in kept:
            parameter.requires_grad_(True)
        else:
            parameter.requires_grad_(False).grad = None


def take_places(optimizer: Optimizer, added: Mapping[nn.Parameter, Mapping[str, nn.Parameter]]) -> None:
    """Adapters take the places of their weights, what is frozen leaves; groups stay, as schedulers know them.

    Args:
        optimizer: holds the weights.
        added: weight → its adapter's trained parameters, by their names in the layer.
    """
    for group in optimizer.param_groups:
        held, names = group["params"], group.get("param_names")
        placed = [list(_placed(p, added)) for p in held]
        group["params"] = [parameter for some in placed for _, parameter in some]
        if names is not None:  # torch's, of optimisers made of named parameters
            group["param_names"] = [
                _sibling(old, own) for old, some in zip(names, placed, strict=True) for own, _ in some
            ]
        for parameter in held:
            if not parameter.requires_grad:
                optimizer.state.pop(parameter, None)


def _placed(
    parameter: nn.Parameter, added: Mapping[nn.Parameter, Mapping[str, nn.Parameter]]
) -> Iterable[tuple[str | None, nn.Parameter]]:
    """What stands in the place of a parameter, with its name in the layer if it is new."""
    if parameter in added:
        return added[parameter].items()
    return [(None, parameter)] if parameter.requires_grad else []


def _sibling(old: str, own: str | None) -> str:
    """The name of another parameter of the same layer; None: the old one."""
    if own is None:
        return old
    path = old.rpartition(".")[0]
    return f"{path}.{own}" if path else own
