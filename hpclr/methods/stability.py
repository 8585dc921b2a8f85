"""Following the orthogonal basis of every layer: how much of it is kept from check to check."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hpclr.lowrank.factors import SVD, alignment, polar
from hpclr.lowrank.sites import WeightSite

TIMES_IN_A_ROW = 2


class StabilityTracker:
    """Remembers polar factors and compares the next ones with them.

    The factor of a dense layer is m×n and lives in host memory. That of a factored layer is measured inside its frozen
    basis: U Q Vᵀ with Q the k×k polar factor of Σ. A re-factorisation makes Q the identity, which needs no memory.

    Args:
        threshold: the stability from which a basis counts as settled, if it is reached twice in a row.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.last: dict[str, float] = {}
        self._in_a_row: dict[str, int] = {}
        self._polar: dict[str, Tensor] = {}

    def remember(self, site: WeightSite, basis: SVD) -> None:
        """Keeps the polar factor of a layer for the next comparison."""
        self._polar[site.name] = polar(basis).to("cpu")

    def measure(self, site: WeightSite, basis: SVD) -> float:
        """The stability of a layer's basis since it was last remembered, which it is again."""
        now = polar(basis)
        before = self._polar.get(site.name)
        if before is None or before.shape != now.shape:
            before = torch.eye(now.shape[0], dtype=now.dtype)
        self._polar[site.name] = now.to("cpu")
        return alignment(before.to(now), now)

    def record(self, name: str, stability: float) -> None:
        """Takes note of a measured value."""
        self.last[name] = stability
        self._in_a_row[name] = self._in_a_row.get(name, 0) + 1 if stability >= self.threshold else 0

    def settles(self, name: str, stability: float) -> bool:
        """Whether a layer with this newest value has settled."""
        return stability >= self.threshold and self._in_a_row.get(name, 0) + 1 >= TIMES_IN_A_ROW

    def rebase(self, name: str) -> None:
        """The layer's factors have just been renewed from its decomposition: its Q is the identity now."""
        self._polar.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """Values and remembered factors by layer name."""
        return {"last": dict(self.last), "in_a_row": dict(self._in_a_row), "polar": dict(self._polar)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.last, self._in_a_row, self._polar = (dict(state[key]) for key in ("last", "in_a_row", "polar"))
