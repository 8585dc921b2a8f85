"""In which arithmetic the model runs: full precision, or autocast over full-precision weights."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Casts, scales and steps as the run's precision needs.

    Args:
        name: float32, float64, bf16 or fp16. The last two are autocast; fp16 scales the loss too.
        device: where the model is.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self.dtype = torch.float64 if name == "float64" else torch.float32
        self._autocast = AUTOCAST.get(name)
        self._scaler = GradScaler(device.type, enabled=name == "fp16")

    def context(self) -> AbstractContextManager[Any]:
        """The context in which the model's forward pass and the loss are computed."""
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._autocast)

    def backward(self, loss: Tensor) -> None:
        """The backward pass, with the loss scaled where that is needed."""
        self._scaler.scale(loss).backward()

    def clip(self, optimizer: Optimizer, model: nn.Module, norm: float) -> None:
        """Scales the whole gradient down to this norm if it is larger."""
        self._scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], norm)

    def step(self, optimizer: Optimizer) -> None:
        """An optimiser step, skipped where scaled gradients are not finite."""
        self._scaler.step(optimizer)
        self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The state of the loss scale; empty where there is none."""
        return dict(self._scaler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the loss scale back."""
        if state:
            self._scaler.load_state_dict(state)
