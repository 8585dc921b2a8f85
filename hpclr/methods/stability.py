"""Following the orthogonal basis of every layer: how much of it is kept from check to check."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hpclr.lowrank.factors import alignment, numerical_rank

TIMES_IN_A_ROW = 2


class StabilityTracker:
    """Remembers polar factors and compares the next ones with them.

    The factor of a dense layer is m×n and lives in host memory. That of a factored layer is measured inside its frozen
    basis: U Q Vᵀ with Q the k×k polar factor of Σ. A re-factorisation makes Q diagonal, and k numbers tell it.

    Args:
        threshold: the stability from which a basis counts as settled, if it is reached twice in a row.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.last: dict[str, float] = {}
        self._in_a_row: dict[str, int] = {}
        self.memory: dict[str, Tensor] = {}  # polar factors; in many processes, of the layers examined here

    def begin(self, names: Iterable[str], *, whole: bool) -> None:
        """At the start of training.

        Args:
            names: the layers.
            whole: whether the first comparison comes a whole interval later; one over less says too little to count.
        """
        self._in_a_row = dict.fromkeys(names, 0 if whole else -1)

    def remember(self, name: str, polar: Tensor) -> None:
        """Keeps the polar factor of a layer for the next comparison."""
        self.memory[name] = _kept(polar)

    def measure(self, name: str, now: Tensor) -> float | None:
        """The stability of a layer's basis since it was last remembered; None for the first time.

        Args:
            name: the layer.
            now: its polar factor, which is remembered in the place of the last one.
        """
        before = self.memory.get(name)
        self.memory[name] = _kept(now)
        if before is None:
            return None
        before = before.to(now.device).to(now.dtype)  # widened where it is used: half as many bytes travel
        return alignment(torch.diag(before) if before.ndim == 1 else before, now)

    def record(self, name: str, stability: float, still: bool | None = None) -> None:
        """Takes note of a measured value; `still` as in `settles`."""
        self.last[name] = stability
        self._in_a_row[name] = self._in_a_row.get(name, 0) + 1 if self._is_still(stability, still) else 0

    def settles(self, name: str, stability: float | None, still: bool | None = None) -> bool:
        """Whether a layer with this newest value has settled.

        Args:
            name: the layer.
            stability: None if it could not be measured.
            still: whether the value means that the basis has kept still; None: if it reaches the threshold.
        """
        return self._is_still(stability, still) and self._in_a_row.get(name, 0) + 1 >= TIMES_IN_A_ROW

    def _is_still(self, stability: float | None, still: bool | None) -> bool:
        return stability is not None and (stability >= self.threshold if still is None else still)

    def rebase(self, name: str, s: Tensor) -> None:
        """The layer's Σ is diag(s) now, and its Q the identity, but for directions without weight."""
        self.memory[name] = (torch.arange(s.numel()) < numerical_rank(s, (s.numel(), s.numel()))).to(s.dtype)

    def state_dict(self, memory: Mapping[str, Tensor]) -> dict[str, Any]:
        """Values, and the remembered factors of all processes together, by layer name."""
        return {"last": dict(self.last), "in_a_row": dict(self._in_a_row), "polar": dict(memory)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.last, self._in_a_row, self.memory = (dict(state[key]) for key in ("last", "in_a_row", "polar"))


def _kept(polar: Tensor) -> Tensor:
    """A polar factor in host memory, in half precision unless it is float64: that moves a stability by 10⁻⁷ at most.

    It lies there row by row, as after a load: the order of summation follows the memory.
    """
    short = polar if polar.dtype == torch.float64 else polar.half()
    return torch.empty(short.shape, dtype=short.dtype, pin_memory=short.is_cuda).copy_(short)
