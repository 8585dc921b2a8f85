"""LoRA (Hu et al., arXiv 2106.09685) as PEFT has it, to compare with; the only module that imports peft.

    W' = W + (α/r) B A          A (r×n), B (m×r) trained, W frozen; B = 0 at the start

PEFT puts a layer of its own around each layer: what was `layer.weight` is `layer.base_layer.weight` from then on.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpclr.config.schema import Lora
from hpclr.errors import UsageError
from hpclr.lowrank import WeightSite
from hpclr.lowrank.adapters import AdaptedWeight
from hpclr.lowrank.adapters.interchange import LORA
from hpclr.lowrank.kinds import TransposedWeight, kind_of
from hpclr.methods.adapting import adaptable_by, check_held, check_same, freeze_rest, take_places, trained_names
from hpclr.methods.base import ChangeHook, Method, no_penalty
from hpclr.methods.checks import check_layers, check_model, check_saved, check_saved_by, placement_of
from hpclr.methods.placement import Here

_BASE, _ADAPTER = "base_layer", "default"
_PARTS = {"lora_A": f"lora_A.{_ADAPTER}.weight", "lora_B": f"lora_B.{_ADAPTER}.weight"}


class LoRA(Method):
    """The same face as hpclr's own adapters; see `hpclr.SARA`.

    Args:
        model: a model, or a `hpclr.parallel.Replica` of one.
        optimizer: holds the model's parameters.
        section: of the run file.
        seed: of A.

    Raises:
        UsageError: without PEFT.
        ValueError: if there is no layer for it, or PEFT would compute something else with one, or the optimiser does
            not hold what trains.
    """

    adapts = True

    def __init__(self, model: nn.Module, optimizer: Optimizer, section: Lora, seed: int) -> None:
        self._model, self._section, self.dense_form = check_model(model), section, without_lora
        chosen = adaptable_by(section, self._model)
        check_layers(chosen.sites, chosen.left_alone, "LoRA")
        _check_for_peft(self._model, chosen.sites)
        self._weights = {name: site.parameter for name, site in chosen.sites.items()}
        self.trained = trained_names(self._model, section.train, chosen.head, chosen.sites)
        check_held(optimizer, self._model, chosen.sites, self.trained)
        own = [self._model.get_parameter(name) for name in self.trained]
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # the same on all processes
            _inject(self._model, section, chosen.sites)
        added = {layer.base_layer.weight: _added(layer) for _, layer in _lora_layers(self._model)}
        freeze_rest(self._model, [*own, *(parameter for some in added.values() for parameter in some.values())])
        take_places(optimizer, added)
        placement = placement_of(model)
        if placement is not None:
            model.renew()  # type: ignore[operator]
        (placement or Here()).confirm(self.ranks, self._model.parameters())

    def step(self) -> None:
        """Nothing is ever due."""

    def penalty(self) -> Tensor:
        """Zero."""
        return no_penalty(self._model)

    @property
    def ranks(self) -> dict[str, int]:
        """Layer name → rank, the same for all."""
        return dict.fromkeys(self._weights, self._section.rank)

    def state_dict(self) -> dict[str, Any]:
        """Whose state it is, its settings, the ranks, and what else trains; the rest is in the model's state."""
        settings = {key: getattr(self._section, key) for key in ("alpha", "dropout")}
        return {"method": "lora", "settings": settings, "ranks": self.ranks, "trained": list(self.trained)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Checks that a state is of the same layers; load it before the model's.

        Raises:
            ValueError: if it is not, or of other settings; names what differs.
        """
        check_saved_by("lora", state, self.state_dict())
        check_same(state, self.state_dict(), ("settings", "trained"))
        check_saved(state["ranks"], self.ranks)
        check_saved(self.ranks, state["ranks"])  # each no larger than the other

    def on_change(self, hook: ChangeHook) -> None:
        """Nothing ever changes its form after the start."""

    def adapted_weights(self) -> dict[str, AdaptedWeight]:
        """Where in the model's state dict the adapters are; see `hpclr.lowrank.adapters.interchange`."""
        return dict(_described(name, layer) for name, layer in _lora_layers(self._model))


def _check_for_peft(model: nn.Module, sites: Mapping[str, WeightSite]) -> None:
    """Raises ValueError for a layer with which PEFT, unasked, would compute something else than W'."""
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for name, site in sites.items():
        if fault := _not_for_peft(site, uses[id(site.module)]):
            raise ValueError(f"layer '{name}' cannot be given LoRA: {fault}; leave it out, with exclude")


def _not_for_peft(site: WeightSite, uses: int) -> str | None:
    padding = getattr(site.module, "padding_mode", "zeros")
    if padding != "zeros":
        return f"the update of PEFT pads with zeros, the layer itself by padding_mode '{padding}'"
    if any(step != 1 for step in getattr(site.module, "dilation", ())):
        return f"the update of PEFT has no dilation, the layer itself {site.module.dilation}"
    if uses > 1:
        return f"the model has it in {uses} places, and PEFT would replace it in one of them"
    return None if site.path else "PEFT replaces a layer inside a model, and here it is the whole model"


def add_lora(model: nn.Module, section: Lora) -> None:
    """Gives a fresh model the layers that a checkpoint of such a run is for, contents to come.

    Raises:
        UsageError: without PEFT.
    """
    _inject(model, section, adaptable_by(section, model).sites)


def without_lora(model: nn.Module) -> nn.Module:
    """Takes PEFT's layers away, in place, with all that they have learned; the weights train again."""
    for name, layer in list(_lora_layers(model)):
        layer.base_layer.weight.requires_grad_(True)
        model.set_submodule(name, layer.base_layer)
    return model


def _inject(model: nn.Module, section: Lora, sites: Mapping[str, WeightSite]) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise UsageError("method: lora needs PEFT: pip install 'hpclr[peft]'") from error
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=section.dropout,
        target_modules="|".join(re.escape(site.path) for site in sites.values()),
    )
    inject_adapter_in_model(config, model, adapter_name=_ADAPTER)


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    modules = model.named_modules()
    return ((name, module) for name, module in modules if hasattr(module, _BASE) and hasattr(module, "lora_A"))


def _added(layer: Any) -> dict[str, nn.Parameter]:
    return {name: layer.get_parameter(name) for name in _PARTS.values()}


def _described(name: str, layer: Any) -> tuple[str, AdaptedWeight]:
    kind = kind_of(type(layer.base_layer))
    base = f"{name}.{_BASE}"
    return name, AdaptedWeight(
        form=LORA,
        weight=f"{base}.weight",
        parts={part: f"{name}.{key}" for part, key in _PARTS.items()},
        transposed=kind is not None and kind.plain is TransposedWeight,
        scale=float(layer.scaling[_ADAPTER]),
        renamed={f"{base}.{own}": f"{name}.{own}" for own, _ in layer.base_layer.named_parameters()},
    )
