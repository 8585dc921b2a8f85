"""What follows a parameter through a change of basis: gradients, optimiser state, averages of weights.

When W = U Σ Vᵀ takes the place of W, or Σ is re-factorised as U' Σ' V'ᵀ, the gradient with regard to the new
core is Lᵀ G R, with L = U and R = V (or U' and V'). State that is linear in gradients or weights follows exactly
by the same rule. State made of squared gradients has no exact image; the entry-wise squares of L and R carry it:
(L∘L)ᵀ v (R∘R) is what independent entries would give, a weighted mean of v, and never negative. Where entries are not
independent, Adam's next step m/√v could come out longer than the last one; v is then scaled up until it does not.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpclr.lowrank.factors import LowRankWarning, working_dtype


def _as_it_is(matrix: Tensor) -> Tensor:
    return matrix


@dataclass(frozen=True)
class Change(ABC):
    """One change of what a parameter means; handed to whoever follows the parameters.

    Attributes:
        name: the layer.
        parameter: the Parameter whose contents and shape have changed (its identity has not).
        begins: whether what it holds now is new, not in any way what it held before.
    """

    name: str
    parameter: nn.Parameter
    begins: ClassVar[bool] = False

    def linear(self, state: Tensor) -> Tensor:
        """What becomes of state linear in the gradient or the weight; it is shaped like the old parameter."""
        return self._applied(state, 1)

    def squared(self, state: Tensor) -> Tensor:
        """What becomes of state made of squared gradients."""
        return self._applied(state, 2)

    def magnitude(self, state: Tensor) -> Tensor:
        """For non-negative state of the gradient's own unit: its square follows the squares."""
        return self.squared(state.square()).sqrt()

    @abstractmethod
    def _applied(self, state: Tensor, power: int) -> Tensor:
        """The linear map by which gradients follow, or with all its coefficients squared."""


@dataclass(frozen=True)
class BasisChange(Change):
    """Another basis: the new gradient is Lᵀ G R.

    Attributes:
        left: L, old rows × new rank, orthonormal columns.
        right: R, old columns × new rank, orthonormal columns.
        to_matrix: the m×n view of anything shaped like the old parameter.
    """

    left: Tensor
    right: Tensor
    to_matrix: Callable[[Tensor], Tensor] = _as_it_is

    def _applied(self, state: Tensor, power: int) -> Tensor:
        dtype = working_dtype(state.dtype)
        left, right = (t.pow(power).to(state.device, dtype) for t in (self.left, self.right))
        return (left.mT @ self.to_matrix(state).to(dtype) @ right).to(state.dtype)


Rule = Callable[[Change, Tensor], Tensor]

# The names under which optimisers keep state shaped like the parameter, and how each follows.
STATE_RULES: Mapping[str, Rule] = {
    "momentum_buffer": Change.linear,  # SGD, RMSprop, Muon
    "exp_avg": Change.linear,  # Adam and relatives, Lion
    "grad_avg": Change.linear,  # RMSprop, centred
    "prev": Change.linear,  # Rprop: the last gradient
    "ax": Change.linear,  # ASGD: the averaged weight
    "exp_avg_sq": Change.squared,  # Adam and relatives
    "max_exp_avg_sq": Change.squared,  # AMSGrad
    "square_avg": Change.squared,  # RMSprop, Adadelta
    "acc_delta": Change.squared,  # Adadelta: squared updates
    "sum": Change.squared,  # Adagrad
    "exp_inf": Change.magnitude,  # Adamax
    "step_size": Change.magnitude,  # Rprop
}


def carry(optimizer: Optimizer, change: Change, old_shape: torch.Size, old_grad: Tensor | None) -> None:
    """Takes a parameter's gradient and optimiser state through a change of basis.

    Args:
        optimizer: holds state for `change.parameter`, or none yet.
        change: what has happened to the parameter.
        old_shape: the parameter's shape before.
        old_grad: its gradient before, if it had one; the new gradient is set from it.
    """
    if old_grad is not None:
        change.parameter.grad = change.linear(old_grad).to(change.parameter.dtype)
    state = optimizer.state.get(change.parameter)
    if not state:
        return
    unknown = [key for key, value in state.items() if _unknown(key, value, old_shape)]
    if unknown:
        reset(optimizer, change, unknown)
        return
    eps = optimizer.defaults.get("eps")
    eps = eps if isinstance(eps, float) else 0.0
    length = _adam_step(state, eps)
    carried = {key: STATE_RULES[key](change, value) for key, value in state.items() if _is_like(value, old_shape)}
    if "grad_avg" in carried:
        carried["square_avg"] = _centred_square(change, state["square_avg"], state["grad_avg"])
    state.update(carried)
    _bound_adam_step(state, eps, length)


def _is_like(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape == shape


def _centred_square(change: Change, square: Tensor, mean: Tensor) -> Tensor:
    """RMSprop takes the root of square − mean², so it is the variance that goes by the squares."""
    variance = (square - mean.square()).clamp_min(0)
    return change.squared(variance) + change.linear(mean).square()


def _adam_step(state: Mapping[str, Any], eps: float) -> float:
    """‖m/(√v + ε)‖_F, the length of Adam's step in units of its learning rate; 0 for other optimisers."""
    m, v = state.get("exp_avg"), state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if m is None or v is None:
        return 0.0
    dtype = working_dtype(m.dtype)
    return float((m.to(dtype) / (v.to(dtype).sqrt() + max(eps, torch.finfo(dtype).tiny))).norm())


def _bound_adam_step(state: dict[str, Any], eps: float, length: float) -> None:
    """Scales the second moments up where the step they give would be longer than this."""
    excess = _adam_step(state, eps) / length if length > 0 else 1.0
    if excess > 1:
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            if key in state:
                state[key] = state[key] * excess**2


def _unknown(key: str, value: Any, old_shape: torch.Size) -> bool:
    """State that no rule covers: neither a number nor shaped like the parameter under a known name."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return False
    return key not in STATE_RULES or not _is_like(value, old_shape)


def reset(optimizer: Optimizer, change: Change, unknown: list[str]) -> None:
    """The whole state of the parameter: optimisers initialise state that is absent, not state that is partial."""
    optimizer.state.pop(change.parameter)
    keys = ", ".join(f"'{key}'" for key in unknown)
    warnings.warn(
        f"{type(optimizer).__name__} keeps state {keys} for layer '{change.name}', of a kind that hpclr cannot carry "
        "through a change of form or basis; that layer's optimiser state starts anew. "
        "hpclr.lowrank.moments.STATE_RULES takes a rule for it.",
        LowRankWarning,
        stacklevel=3,
    )


def check_optimizer(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuses, before training, an optimiser that cannot follow a change of basis.

    Args:
        optimizer: what the user passed.
        parameters: layer name → the parameter it must hold.

    Raises:
        TypeError: not a torch optimiser, or one without per-parameter dense state (LBFGS, SparseAdam).
        ValueError: it does not hold all of the parameters.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"expected a torch.optim.Optimizer, found {type(optimizer).__name__}; "
            "if it wraps one, pass the optimiser inside"
        )
    if isinstance(optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam)):
        raise TypeError(
            f"{type(optimizer).__name__} cannot follow a change of basis: its state is not dense and per parameter. "
            "Use SGD, Adam, AdamW, RMSprop, Adagrad or another optimiser with per-parameter state."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in held]
    if missing:
        shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise ValueError(
            f"the optimiser does not hold the weights of {len(missing)} of the {len(parameters)} layers to be "
            f"converted ({shown}); make it from this model's parameters, or leave those layers out with exclude="
        )
