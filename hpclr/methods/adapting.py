"""What the methods have in common that fine-tune a pretrained model through adapters, its own weights frozen."""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from hashlib import sha256
from itertools import chain
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpclr.lowrank import WeightSite
from hpclr.lowrank.adapters import AdaptedModule, adapt, adaptable, adapted_modules, merge_adapters, unmerge_adapters
from hpclr.lowrank.adapters.layers import Sizes
from hpclr.lowrank.factors import SVD
from hpclr.lowrank.layers import lowrank_modules
from hpclr.lowrank.moments import check_optimizer
from hpclr.methods.base import ChangeHook, Method, no_penalty
from hpclr.methods.checks import check_layers, check_model, check_saved, check_saved_by, placement_of
from hpclr.methods.factoring import refuse_failed, share_factors
from hpclr.methods.placement import Here, Outcome, Placement


class Adapter(Method):
    """Layers that keep their weight, frozen, and train an adapter; a method says which and at which rank.

    Args:
        model: any module, or a `hpclr.parallel.Replica` of one; its layers are adapted in place, now.
        optimizer: holds the model's parameters: adapters take the place of their weight in its group, and what is
            frozen leaves the groups; None: it is made afterwards, from the parameters that require gradients.
        settings: the method's own, which must be the same when a state is loaded.
        train: patterns (`*`, `?`) of the names of parameters that go on training beside adapters and head.
        seed: of what is drawn at random, for each layer by its name, the same on all processes.
        placement: which process decomposes which layer; None: as the replica says, else this one all of them.
        of_layers: which layers, as `hpclr.lowrank.adapters.adaptable` takes it.

    Attributes:
        name: the method's name in run files and in saved states.
        title: the same, for messages.
        form: what its adapters compute.
        report: layer name → why it has no adapter.
        trained: names of the base model's own parameters that go on training.
    """

    adapts = True
    name: ClassVar[str]
    title: ClassVar[str]
    form: ClassVar[type[AdaptedModule]]

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        *,
        settings: Mapping[str, Any],
        train: Sequence[str],
        seed: int,
        placement: Placement | None,
        **of_layers: Any,
    ) -> None:
        self._model, self._settings = check_model(model), dict(settings)
        _refuse_other_forms(self._model)
        chosen = adaptable(self._model, **of_layers)
        small = {name: why for name, site in chosen.sites.items() if (why := self._too_small(site))}
        self.report = chosen.left_alone | small
        sites = {name: site for name, site in chosen.sites.items() if name not in small}
        check_layers(sites, self.report, self.title)
        self.trained = trained_names(self._model, train, chosen.head, sites)
        if optimizer is not None:
            check_held(optimizer, self._model, sites, self.trained)
        self._placement = placement or placement_of(model) or Here()
        self._adapt(sites, seed)
        added = {layer.weight: [layer.parameter(name) for name in layer.trained] for layer in self._layers.values()}
        freeze_rest(self._model, [*map(self._model.get_parameter, self.trained), *chain(*added.values())])
        if optimizer is not None:
            take_places(optimizer, added)
        if placement_of(model) is not None:
            cast(Any, model).renew()  # other parameters require gradients now
        self._placement.confirm(self.ranks, self._model.parameters())

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
    def _adapt(self, sites: Mapping[str, WeightSite], seed: int) -> None:
        """Each weight decomposed by one process, the outcomes on all; none is adapted if any cannot be decomposed."""
        self._layers: dict[str, AdaptedModule] = {}
        for name, outcome in refuse_failed(dict(share_factors(self._placement, sites, self._basis))).items():
            start = self._start(sites[name].core(), outcome, generator_for(seed, name))
            self._layers[name] = adapt(sites[name].module, self.form, start)

    @property
    def ranks(self) -> dict[str, int]:
        """Layer name → rank of its adapter."""
        return {name: layer.rank for name, layer in self._layers.items()}

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
            "settings": dict(self._settings),
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
        saved = {"settings": dict(state["settings"]), "trained": list(state["trained"])}
        for key, mine in (("settings", self._settings), ("trained", list(self.trained))):
            if saved[key] != mine:
                raise ValueError(
                    f"the saved state is of other settings: it was saved with {key} {saved[key]}, not {mine}"
                )
        check_saved(state["ranks"], {name: min(layer.matrix_shape) for name, layer in self._layers.items()})
        for name, layer in self._layers.items():
            layer.resize(Sizes(int(state["ranks"][name]), int(self._settings.get("experts", 0))))


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


def take_places(optimizer: Optimizer, added: Mapping[nn.Parameter, Sequence[nn.Parameter]]) -> None:
    """Adapters take the places of their weights, what is frozen leaves; groups stay, as schedulers know them."""
    for group in optimizer.param_groups:
        held = group["params"]
        group["params"] = [new for p in held for new in added.get(p, [p] if p.requires_grad else [])]
        for parameter in held:
            if not parameter.requires_grad:
                optimizer.state.pop(parameter, None)
