"""The face that every method shows to a training loop."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hpclr.lowrank import Change

ChangeHook = Callable[[Change], None]


class Method(ABC):
    """A way of training low-rank networks: when and how the weights change form.

    Attributes:
        checks: how many checks this object has made; a loop sees by it that there is something to record.
        adapts: whether it adds parameters to the model from the first step on.
        dense_form: makes a copy of the model dense, in place, to count what it would cost so; None where
            `hpclr.lowrank` knows how.
    """

    checks = 0
    adapts: ClassVar[bool] = False
    dense_form: Callable[[nn.Module], nn.Module] | None = None

    @abstractmethod
    def step(self) -> None:
        """Does what the optimiser steps taken so far make due; call it once after each of them."""

    def probing(self, *, counts: bool = True) -> AbstractContextManager[None]:
        """To be put around the forward and backward passes of a step, by loops that want all that methods measure.

        A method without anything to measure in them does nothing.

        Args:
            counts: False for passes of a stand-in, which a process makes that has no samples.
        """
        return nullcontext()

    @abstractmethod
    def penalty(self) -> Tensor:
        """A term to add to the loss; zero where the method has none."""

    @property
    @abstractmethod
    def ranks(self) -> dict[str, int]:
        """Layer name → rank."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue exactly: plain values and tensors."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a state back; first of all states (before the model's and the optimiser's)."""

    @abstractmethod
    def on_change(self, hook: ChangeHook) -> None:
        """Has `hook` called with every later change of a parameter; for averages and whoever else follows them."""


class Dense(Method):
    """Ordinary training, the baseline: nothing changes form."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def step(self) -> None:
        """Nothing is ever due."""

    def penalty(self) -> Tensor:
        """Zero."""
        return no_penalty(self._model)

    @property
    def ranks(self) -> dict[str, int]:
        """No layer is low-rank."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """There is nothing to remember."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is nothing to take back."""

    def on_change(self, hook: ChangeHook) -> None:
        """Nothing ever changes."""


def no_penalty(model: nn.Module) -> Tensor:
    """A zero on the model's device."""
    return torch.zeros((), device=next(model.parameters()).device)
