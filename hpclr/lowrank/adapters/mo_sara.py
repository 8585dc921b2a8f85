"""Mo-SARA: several diagonals between frozen singular vectors, mixed by the input (Gu et al., arXiv 2408.03290).

    h = x V_k                                what the input has of the k leading right singular vectors of W
    g = softmax((h · w₁) w₂)                 the router: a weight for each of e experts, at each position of the input
    y = (1 + v) ⊙ (x Wᵀ + (h ⊙ (g Λ)) U_kᵀ) + b

    U_k (m×k) and V_k (n×k) frozen, as W; Λ (e×k), w₁ (k), w₂ (e), v (m) trained: e k + k + e + m parameters.

The experts differ by their diagonals alone, so that their mixture is one diagonal, g Λ: one product with W whatever e.
At the start Λ = 0 and v = 0, so that the layer computes what it did; w₁ and w₂ are drawn as torch draws the weights of
linear layers, evenly between ±1/√k and ±1. Λ has a gradient from the first step on, the router once Λ is not zero.

v scales what the weight gives and not the bias, as the magnitudes of EDoRA do. There is no single W' to merge into.
"""

from collections.abc import Mapping
from math import sqrt

import torch
from torch import Generator, Tensor

from hpclr.lowrank.adapters.layers import AdaptedModule, Shapes, Sizes
from hpclr.lowrank.factors import SVD


class MoSARALayer(AdaptedModule):
    """A layer with W + U_k diag(g(x) Λ) V_kᵀ and scaled outputs."""

    label = "MoSARA"
    trained = ("mo_sara_lambdas", "mo_sara_router_in", "mo_sara_router_out", "mo_sara_scale")
    scales = trained
    frozen = ("mo_sara_u", "mo_sara_vh")

    mo_sara_u: Tensor
    mo_sara_vh: Tensor
    mo_sara_lambdas: Tensor
    mo_sara_router_in: Tensor
    mo_sara_router_out: Tensor
    mo_sara_scale: Tensor

    @classmethod
    def shapes(cls, m: int, n: int, sizes: Sizes) -> Shapes:
        """U_k (m×k), V_kᵀ (k×n), Λ (e×k), w₁ (k), w₂ (e), v (m)."""
        k, e = sizes
        return {
            "mo_sara_u": (m, k),
            "mo_sara_vh": (k, n),
            "mo_sara_lambdas": (e, k),
            "mo_sara_router_in": (k,),
            "mo_sara_router_out": (e,),
            "mo_sara_scale": (m,),
        }

    @classmethod
    def sizes(cls, shapes: Mapping[str, tuple[int, ...]]) -> Sizes:
        """k and e, from Λ."""
        experts, rank = shapes["mo_sara_lambdas"][0], shapes["mo_sara_lambdas"][1]
        return Sizes(rank, experts)

    def adapted(self, x: Tensor) -> Tensor:
        """y = (1 + v) ⊙ (x Wᵀ + (h ⊙ (g Λ)) U_kᵀ) + b."""
        h = self.narrow(x, self.mo_sara_vh)
        mixed = self.wide(self._gates(h), self.mo_sara_lambdas.mT)
        z = self.base(x) + self.wide(h * mixed, self.mo_sara_u)
        y = z * self.along(1 + self.mo_sara_scale, z)
        return y if self.bias is None else y + self.along(self.bias, y)

    def _gates(self, h: Tensor) -> Tensor:
        """g, with e channels."""
        score = self.wide(h, self.mo_sara_router_in[None])
        return torch.softmax(self.wide(score, self.mo_sara_router_out[:, None]), self.channels)

    def corrected(self) -> Tensor:
        """There is no W'.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"a {type(self).__name__} cannot be merged: its router mixes the experts anew for every input, so that no "
            "single weight computes the same; keep the layer as it is, or train with SARA or EDoRA, which can be merged"
        )


def start(weight: Tensor, basis: SVD, experts: int, generator: Generator) -> dict[str, Tensor]:
    """The parameters at the start; `basis` has the k leading singular vectors of the weight (m×n)."""
    k = len(basis.s)
    router_in, router_out = (2 * torch.rand(count, generator=generator) - 1 for count in (k, experts))
    return {
        "mo_sara_u": basis.u,
        "mo_sara_vh": basis.vh,
        "mo_sara_lambdas": torch.zeros(experts, k),
        "mo_sara_router_in": router_in / sqrt(k),
        "mo_sara_router_out": router_out,
        "mo_sara_scale": torch.zeros(len(weight)),
    }
