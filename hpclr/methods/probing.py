"""What the passes of one optimiser step leave for the check that follows it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from math import isfinite

import torch
from torch import Tensor

from hpclr.lowrank.factors import working_dtype
from hpclr.lowrank.probing import dense_gradients, outside
from hpclr.lowrank.sites import WeightSite
from hpclr.methods.placement import Placement


class Probe:
    """Gathers, in the passes of the step before a check, what training alone does not form, and a check wants to know.

    Each process gathers from its own passes. What a check is given is the mean over the processes, formed one layer at
    a time, so that no process ever holds more than its own. Of a sharded model nothing is gathered.

    Args:
        sites: layer name → weight; what is held as factors with frozen bases is followed.
        placement: the processes.

    Attributes:
        gradients: layer name → G = ∂L/∂W (m×n), the sum over this process's passes; scaled as the loss is.
    """

    def __init__(self, sites: Mapping[str, WeightSite], placement: Placement) -> None:
        self._sites, self._placement = sites, placement
        self._step: int | None = None
        self.gradients: dict[str, Tensor] = {}

    @contextmanager
    def gathering(self, step: int) -> Iterator[None]:
        """Around the passes of a step, all of them or some; their gradients add up.

        Args:
            step: the number of the step; what was gathered for another one goes.
        """
        if self._step != step:
            self.drop()
            self._step = step
        follows = not self._placement.sharded and bool(self._names())
        with dense_gradients(self._sites, self.gradients) if follows else nullcontext():
            yield

    def outside(self, step: int) -> dict[str, float]:
        """How much of the gradient the frozen bases leave out; collective, and what was gathered goes.

        Args:
            step: the one that has just been taken.

        Returns:
            Layer name → ‖G − U Uᵀ G V Vᵀ‖ / ‖G‖, from 0 to 1; layers are absent that are dense, of which some process
            has not gathered, or whose gradient is zero or not finite.
        """
        found = {name: _share(gradient, self._sites[name]) for name, gradient in self._means(step)}
        return {name: share for name, share in found.items() if isfinite(share)}

    def _means(self, step: int) -> Iterator[tuple[str, Tensor]]:
        """G over all processes, layer by layer; a layer that has none here, as no sample came to it, has zeros."""
        names = self._names()
        if names and not self._placement.sharded:
            here = torch.tensor([self._step == step, *(name in self.gradients for name in names)], dtype=torch.float64)
            gathered, *seen = self._placement.mean(here).tolist()
            for name in [name for name, share in zip(names, seen, strict=True) if share > 0 and gathered == 1]:
                yield name, self._placement.mean(self._gradient(name))
        self.drop()

    def _names(self) -> list[str]:
        return [name for name, site in self._sites.items() if site.is_lowrank]

    def _gradient(self, name: str) -> Tensor:
        site = self._sites[name]
        sigma = site.parameter.detach()
        dtype = working_dtype(sigma.dtype)
        found = self.gradients.pop(name, None)
        return sigma.new_zeros(site.shape, dtype=dtype) if found is None else found.to(dtype)

    def drop(self) -> None:
        """Lets go of what was gathered."""
        self._step = None
        self.gradients.clear()


def _share(gradient: Tensor, site: WeightSite) -> float:
    return float(outside(gradient, site.factors).norm() / gradient.norm())
