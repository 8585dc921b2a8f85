"""An exponential moving average of the weights that follows the changes of basis."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpclr.lowrank.layers import replace_data
from hpclr.lowrank.moments import Change


class EMA:
    """Averages of all trained parameters.

    A method that changes bases must be told of it: `oialr.on_change(ema.follow)`. The averages of a weight
    are carried as its momentum is, exactly within the frozen basis; what they held outside it is dropped. Where a
    weight becomes a product of trained factors, averages of these begin anew.

    Args:
        model: the model to follow.
        decay: d in (0, 1): average ← d·average + (1 − d)·weight at each `update()`.

    Raises:
        ValueError: for a decay outside (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"the decay of an average must lie between 0 and 1, found {decay}")
        self.model, self.decay = model, decay
        self._averages = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the weights; call it after each optimiser step.

        Raises:
            ValueError: if a parameter has changed its basis and `follow` was not told.
        """
        for parameter, average in self._averages.items():
            if average.shape != parameter.shape:  # not to be left to torch, which would broadcast rank 1
                raise ValueError(
                    f"the average of '{self._names()[parameter]}' has shape {tuple(average.shape)}, the parameter now "
                    f"{tuple(parameter.shape)}: tell the average of changes of basis, with method.on_change(ema.follow)"
                )
            average.lerp_(parameter, 1 - self.decay)

    def follow(self, change: Change) -> None:
        """Takes an average through a change of its parameter; that of a new factor begins with what it holds."""
        parameter = change.parameter
        if change.begins and parameter.requires_grad and parameter in self._names():
            self._averages[parameter] = parameter.detach().clone()
        elif change.begins:
            self._averages.pop(parameter, None)
        elif parameter in self._averages:
            self._averages[parameter] = change.linear(self._averages[parameter])

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The model with averaged weights, for evaluation; its own come back at the end."""
        own = {parameter: parameter.data for parameter in self._averages}
        gradients = {parameter: parameter.grad for parameter in self._averages}
        self._swap(self._averages)
        try:
            yield self.model
        finally:
            self._swap(own)
            for parameter, gradient in gradients.items():
                parameter.grad = gradient

    def copy_to_model(self) -> None:
        """Gives the model the averaged weights for good."""
        self._swap({parameter: average.clone() for parameter, average in self._averages.items()})

    def _swap(self, contents: dict[nn.Parameter, Tensor]) -> None:
        for parameter, data in contents.items():
            replace_data(parameter, data)

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name."""
        names = self._names()
        return {
            "decay": self.decay,
            "averages": {names[p]: average.clone() for p, average in self._averages.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes averages saved by `state_dict`; the model must already have the parameters and shapes it had then.

        Raises:
            ValueError: if names or shapes differ, naming the first.
        """
        names, saved = self._names(), state["averages"]
        own = {name: parameter for parameter, name in names.items() if parameter.requires_grad or name in saved}
        for name in sorted(own.keys() | saved.keys()):
            found, expected = (tuple(t[name].shape) if name in t else "nothing" for t in (saved, own))
            if found != expected:
                raise ValueError(f"the saved averages do not fit: for '{name}' they hold {found}, the model {expected}")
        self._averages = {parameter: saved[name].to(parameter).clone() for name, parameter in own.items()}
        self.decay = float(state["decay"])

    def _names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self.model.named_parameters()}
