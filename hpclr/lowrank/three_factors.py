"""What follows a weight when three trained factors take its place, and when directions of these are removed.

With W = U diag(s) Vᵀ and G the gradient with regard to W, the chain rule gives

    ∂U = G V diag(s)        ∂s = diag(Uᵀ G V)        ∂Vᵀ = diag(s) Uᵀ G

State linear in gradients follows exactly, squared gradients by the squares of the coefficients, as in `moments.py`.
Removing directions takes columns of U, entries of s and rows of Vᵀ away, and with them those of all state, to the bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpclr.lowrank.factors import SVD, working_dtype
from hpclr.lowrank.moments import Change, carry, reset
from hpclr.lowrank.sites import WeightSite

_OF_THE_WEIGHT = {
    "ax",
    "acc_delta",
    "step_size",
}  # state of ASGD, Adadelta, Rprop in the unit of a weight or its updates


@dataclass(frozen=True)
class FactorOfWeight(Change):
    """One of three factors takes its part of a weight's gradient. It is new: averages of it begin with it.

    Attributes:
        equation: the chain rule, as `torch.einsum` takes it; the first operand is G.
        operands: the others.
        to_matrix: the m×n view of anything shaped like the weight.
    """

    equation: str
    operands: tuple[Tensor, ...]
    to_matrix: Callable[[Tensor], Tensor]
    begins: ClassVar[bool] = True

    def _applied(self, state: Tensor, power: int) -> Tensor:
        dtype = working_dtype(state.dtype)
        operands = [t.to(state.device, dtype).pow(power) for t in self.operands]
        return torch.einsum(self.equation, self.to_matrix(state).to(dtype), *operands).to(state.dtype).contiguous()


@dataclass(frozen=True)
class Kept(Change):
    """Some of a parameter's columns, rows or entries stay.

    Attributes:
        kept: their indices.
        dim: the dimension of the old parameter that they count along.
    """

    kept: Tensor
    dim: int

    def magnitude(self, state: Tensor) -> Tensor:
        """The same entries."""
        return self._applied(state, 1)

    def _applied(self, state: Tensor, power: int) -> Tensor:
        return state.index_select(self.dim, self.kept.to(state.device))


def split_weight(site: WeightSite, basis: SVD, optimizer: Optimizer, *, carry_to_middle: bool = True) -> list[Change]:
    """W becomes U diag(s) Vᵀ, all three trained: factors, gradients, and their places and state in the optimiser.

    U and Vᵀ join the parameter group of W, beside s, which is the Parameter that W was. State in a weight's own unit
    cannot be shared out between factors; where there is any, that of U and Vᵀ starts anew, as for every new parameter.
    Returns what has become of W.

    Args:
        site: a dense weight of a kind with trained factors.
        basis: U, s and Vᵀ of as many directions as are wanted.
        optimizer: holds the weight.
        carry_to_middle: give s its gradient and state; not wanted where the caller takes it out of the optimiser.
    """
    weight, shape, gradient = site.parameter, site.parameter.shape, site.parameter.grad
    state = _copied(optimizer.state.get(weight, {}))
    site.factorize(parts=basis)
    join(optimizer, site)
    u, s, vh = cast("tuple[nn.Parameter, ...]", site.factors)
    changes: list[Change] = [
        FactorOfWeight(site.name, parameter, equation, operands, site.to_matrix)
        for parameter, equation, operands in (
            (u, "mn,rn,r->mr", (basis.vh, basis.s)),
            (vh, "mn,mr,r->rn", (basis.u, basis.s)),
            (s, "mn,mr,rn->r", (basis.u, basis.vh)),
        )
    ]
    for change in changes if carry_to_middle else changes[:2]:
        if change.parameter is not s and state and not state.keys() & _OF_THE_WEIGHT:
            optimizer.state[change.parameter] = _copied(state)
        carry(optimizer, change, shape, gradient)
    return changes


def join(optimizer: Optimizer, site: WeightSite) -> None:
    """Gives U and Vᵀ their places beside s, in the order of the model's parameters, if they have none yet."""
    u, s, vh = site.factors
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trio = [parameter for parameter in (u, s, vh) if parameter is s or id(parameter) not in held]
    for group in optimizer.param_groups:
        group["params"][:] = [new for old in group["params"] for new in (trio if old is s else [old])]


def keep_directions(site: WeightSite, kept: Tensor, optimizer: Optimizer) -> list[Change]:
    """Removes all directions of a weight but those with these indices; returns what has become of U, s and Vᵀ."""
    parameters = cast("tuple[nn.Parameter, ...]", site.factors)
    changes: list[Change] = [
        Kept(site.name, parameter, kept, dim) for parameter, dim in zip(parameters, (1, 0, 0), strict=True)
    ]
    before = [(parameter.shape, parameter.grad) for parameter in parameters]
    site.convert(*(change.linear(change.parameter.detach()) for change in changes))
    for change, (shape, gradient) in zip(changes, before, strict=True):
        change.parameter.grad = None if gradient is None else change.linear(gradient)
        _keep_state(optimizer, change, shape)
    return changes


def _keep_state(optimizer: Optimizer, change: Change, shape: torch.Size) -> None:
    """What is shaped like the parameter loses the same entries; what is shaped otherwise starts anew."""
    state = optimizer.state.get(change.parameter, {})
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.ndim > 0}
    unknown = [key for key, value in tensors.items() if value.shape != shape]
    if unknown:
        reset(optimizer, change, unknown)
    else:
        state.update({key: change.linear(value) for key, value in tensors.items()})


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
