"""SARA: a correction whose rank comes from the spectrum of each weight (Gu et al., arXiv 2408.03290).

    y = x Wᵀ + ((x Bᵀ) ⊙ Λ) Aᵀ + b          W' = W + A diag(Λ) B

    A (m×k), Λ (k), B (k×n) trained, W frozen; k = the least number of singular values of W whose sum reaches a share
    of the sum of all (`hpclr.lowrank.SumProportion`): k (m + n + 1) trained parameters.

At the start B = 0, exactly one factor, so that the layer computes what it did and B has a gradient; A is drawn evenly
between ±1/√k and Λ = 1.
"""

from collections.abc import Mapping
from math import sqrt

import torch
from torch import Generator, Tensor

from hpclr.lowrank.adapters.layers import AdaptedModule, Shapes, Sizes


class SARALayer(AdaptedModule):
    """A layer with W + A diag(Λ) B."""

    label = "SARA"
    trained = ("sara_a", "sara_lambda", "sara_b")
    scales = ("sara_lambda",)
    frozen = ()

    sara_a: Tensor
    sara_lambda: Tensor
    sara_b: Tensor

    @classmethod
    def shapes(cls, m: int, n: int, sizes: Sizes) -> Shapes:
        """A (m×k), Λ (k), B (k×n)."""
        return {"sara_a": (m, sizes.rank), "sara_lambda": (sizes.rank,), "sara_b": (sizes.rank, n)}

    @classmethod
    def sizes(cls, shapes: Mapping[str, tuple[int, ...]]) -> Sizes:
        """k, from Λ."""
        return Sizes(shapes["sara_lambda"][0])

    def adapted(self, x: Tensor) -> Tensor:
        """y = x Wᵀ + ((x Bᵀ) ⊙ Λ) Aᵀ + b."""
        h = self.narrow(x, self.sara_b)
        return self.base(x, self.bias) + self.wide(h * self.along(self.sara_lambda, h), self.sara_a)

    def corrected(self) -> Tensor:
        """W + A diag(Λ) B."""
        a, s, b = self.in_full(*self.trained)
        return self.base_matrix() + (a * s) @ b


def start(weight: Tensor, rank: int, generator: Generator) -> dict[str, Tensor]:
    """The parameters at the start, for a weight (m×n); the numbers drawn do not depend on its type or device."""
    m, n = weight.shape
    a = (2 * torch.rand(m, rank, generator=generator) - 1) / sqrt(rank)
    return {"sara_a": a, "sara_lambda": torch.ones(rank), "sara_b": torch.zeros(rank, n)}
