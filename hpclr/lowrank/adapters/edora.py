"""EDoRA: a magnitude for each output and a small core between frozen singular vectors (Nasiri, Garraghan, 2501.12067).

    W' = mag ⊙ (W + (α/r) U_r R A) / ‖W + (α/r) U_r R A‖          ‖·‖ (m): of each row, a constant for the gradient
    y = (mag / ‖·‖) ⊙ (x Wᵀ + (α/r) (x Aᵀ) Rᵀ U_rᵀ) + b

    U_r (m×r) and A = Σ_r V_rᵀ (r×n) from the singular value decomposition of W, frozen; R (r×r) and mag (m) trained:
    r² + m parameters. At the start R = 0 and mag = ‖W‖, so that the layer computes what it did: since U_r and A are
    of full rank and stay, R has a gradient there. (Published is R ~ N(0, σ²) with σ = 10⁻⁵ or 5·10⁻⁶: `init_std`.)

What is kept as `edora_u` is U = (α/r) U_r, so that the parameters alone say what a layer computes.

The norms need no m×n matrix beside W. With C = U R (m×r), for each row

    ‖w + c A‖² = ‖w‖² + 2 c · (w Aᵀ) + c (A Aᵀ) cᵀ

in as many operations as r more rows of the input take. (For exact singular vectors W Aᵀ = U_r Σ_r², but the norms
shall be those of whatever weight the layer holds.) So there is one product with W for the input, and the backward pass
keeps x Aᵀ and what is scaled by mag, not x.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Generator, Tensor

from hpclr.lowrank.adapters.layers import AdaptedModule, Shapes, Sizes
from hpclr.lowrank.factors import SVD, working_dtype


class EDoRALayer(AdaptedModule):
    """A layer with rows of their own length in the direction of those of W + U R A."""

    label = "EDoRA"
    trained = ("edora_core", "edora_magnitude")
    scales = ("edora_magnitude",)
    frozen = ("edora_u", "edora_a")

    edora_u: Tensor
    edora_a: Tensor
    edora_core: Tensor
    edora_magnitude: Tensor

    @classmethod
    def shapes(cls, m: int, n: int, sizes: Sizes) -> Shapes:
        """U (m×r), A (r×n), R (r×r), mag (m)."""
        r = sizes.rank
        return {"edora_u": (m, r), "edora_a": (r, n), "edora_core": (r, r), "edora_magnitude": (m,)}

    @classmethod
    def sizes(cls, shapes: Mapping[str, tuple[int, ...]]) -> Sizes:
        """r, from R."""
        return Sizes(shapes["edora_core"][0])

    def adapted(self, x: Tensor) -> Tensor:
        """y = (mag / ‖·‖) ⊙ (x Wᵀ + (x Aᵀ) Rᵀ Uᵀ) + b."""
        h = self.narrow(x, self.edora_a)
        z = self.base(x) + self.wide(self.wide(h, self.edora_core), self.edora_u)
        y = z * self.along(self.edora_magnitude / self.row_norms().to(self.edora_magnitude.dtype), z)
        return y if self.bias is None else y + self.along(self.bias, y)

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """‖w_i + u_i R A‖ (m), in float32 at least; 1 for a row of zeros, which has no direction.

        Of what is rounded, like the magnitudes, to 16 bits the quotient is exactly 1 at the start.
        """
        weight = self.to_matrix(self.weight)
        dtype = working_dtype(weight.dtype)
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()
        with _without_autocast(weight):
            scale = _scale(self.edora_a)
            across = (weight @ (self.edora_a / scale).mT).to(dtype) * scale
            u, core, a = (factor.to(dtype) for factor in (self.edora_u, self.edora_core, self.edora_a))
            c = u @ core
            squares = squares + (c * (2 * across + c @ (a @ a.mT))).sum(1)
        norms = squares.clamp_min(0).sqrt()
        return torch.where(norms > 0, norms, 1)

    def corrected(self) -> Tensor:
        """mag ⊙ (W + U R A) / ‖·‖."""
        u, core, a, magnitude = self.in_full("edora_u", "edora_core", "edora_a", "edora_magnitude")
        norms = self.row_norms().to(self.edora_magnitude.dtype)
        return (magnitude / norms)[:, None] * (self.base_matrix() + (u @ core) @ a)


def _scale(a: Tensor) -> Tensor | float:
    """A power of two, by which nothing is rounded, that keeps products of rows within what float16 can hold."""
    if a.dtype != torch.float16:
        return 1.0
    return torch.ldexp(torch.ones((), device=a.device), torch.frexp(a.float().abs().amax())[1]).clamp_min(1)


def _without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Norms in 16 bits would be wrong in the third digit."""
    kind = tensor.device.type
    return (
        nullcontext() if tensor.is_meta or not torch.is_autocast_enabled(kind) else torch.autocast(kind, enabled=False)
    )


def start(weight: Tensor, basis: SVD, alpha: float, init_std: float, generator: Generator) -> dict[str, Tensor]:
    """The parameters at the start; `basis` is the leading part, of rank r, of the weight (m×n)."""
    r = len(basis.s)
    return {
        "edora_u": alpha / r * basis.u,
        "edora_a": basis.s[:, None] * basis.vh,
        "edora_core": init_std * torch.randn(r, r, generator=generator),
        "edora_magnitude": torch.linalg.vector_norm(weight, dim=1, dtype=working_dtype(weight.dtype)),
    }
