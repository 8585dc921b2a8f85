"""Trainers load a model's weights before its method is there; factors then wait until the layers have their ranks."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from hpclr.lowrank import load_state_dict
from hpclr.lowrank.adapters import adapted_weights, is_of_adapter, shape_model_like_adapters
from hpclr.lowrank.convert import shape_model_like
from hpclr.lowrank.interchange import factored_weights, looks_factored


class DeferredWeights:
    """Keeps a state dict that holds factors or adapters which the model that it is loaded into has not, for later.

    Optimiser and method are made for the dense model, as they were when training began; only then may it take its
    form. A model that is used before that, as in an evaluation, takes it at once. Other state dicts are loaded as ever.

    Args:
        model: what the trainer loads into.

    Attributes:
        model: the same.
        used: whether the model was used, and took its form for that.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.used = False
        self._kept: dict[str, Any] = {}
        self._hooks = (
            model.register_load_state_dict_pre_hook(self._defer),
            model.register_forward_pre_hook(self._use),
        )

    def _defer(self, module: nn.Module, state: dict[str, Any], *rest: Any) -> None:
        own = module.state_dict()
        new = state.keys() - own.keys()
        if looks_factored(new) is None and not any(map(is_of_adapter, new)):
            return
        self._kept.update(state)  # of a model in several files each comes by itself
        state.clear()
        state.update(own)

    def _use(self, module: nn.Module, arguments: Any) -> None:
        if self._kept:
            shape_model_like_adapters(self.model, self._kept)
            load_state_dict(self.model, self._kept, strict=False)
            self._kept, self.used = {}, True

    @property
    def waiting(self) -> bool:
        """Whether something was kept."""
        return bool(self._kept)

    def load(self) -> None:
        """Gives the model what was kept, if anything was; its layers must have their ranks by now.

        Raises:
            ValueError: if a layer is to be factored or adapted, and what that takes was not among what was loaded.
        """
        self.remove()
        if self._kept:
            load_state_dict(self.model, self._kept, strict=False)
        check_complete(self.model, self._kept)
        self._kept = {}

    def remove(self) -> None:
        """From now on everything is loaded as ever."""
        for hook in self._hooks:
            hook.remove()


def shaped_as_loaded(model: nn.Module) -> RemovableHandle:
    """Until the handle is removed, a model takes the form of whatever state dict is loaded into it."""

    def shape(module: nn.Module, state: dict[str, Any], *rest: Any) -> None:
        shape_model_like(module, state)
        shape_model_like_adapters(module, state)

    handle: RemovableHandle = model.register_load_state_dict_pre_hook(shape)
    return handle


def check_complete(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raises ValueError if a model has factors or adapters that a state dict lacks."""
    needed = {name: set(layer.factors) for name, layer in factored_weights(model).items()}
    needed |= {name: set(entry.parts.values()) for name, entry in adapted_weights(model).items()}
    missing = [name for name, keys in needed.items() if not state.keys() >= keys]
    if missing:
        raise ValueError(
            f"the saved method has {len(missing)} layers in factors or with adapters ({', '.join(missing[:3])}), for "
            "which the saved weights have none: weights and state of the method are of different checkpoints, or the "
            "callback was not there when the weights were loaded. Give it to the trainer when that is made, and resume "
            "from a checkpoint that is whole."
        )
