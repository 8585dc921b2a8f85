"""What the tests of the methods share: small models, gradients from nowhere, weights as matrices."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from hpclr import OIALR
from hpclr.lowrank import WeightSite, select


def mlp(widths: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Linear layers with GELU between them."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for n, m in pairwise(widths):
        layers += [nn.Linear(n, m, dtype=dtype), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def stack(*matrices: Tensor) -> nn.Sequential:
    """Linear layers without biases that hold exactly these weights; their names are 0, 1, …"""
    model = nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in matrices))
    for layer, w in zip(model, matrices, strict=True):
        with torch.no_grad():
            layer.weight.copy_(w)
    return model


def orthonormal(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=g, dtype=torch.float64))[0].to(dtype)


def with_spectrum(values: Sequence[float], m: int, n: int, seed: int = 0) -> Tensor:
    """An m×n float64 matrix with these singular values and, where they are fewer than min(m, n), zeros."""
    s = torch.tensor(values, dtype=torch.float64)
    return orthonormal(m, len(values), seed) @ torch.diag(s) @ orthonormal(n, len(values), seed + 1000).mT


def sites(model: nn.Module) -> dict[str, WeightSite]:
    return {site.name: site for site in select(model).eligible}


def matrix(site: WeightSite) -> Tensor:
    """The weight as a dense m×n matrix, a copy in float64; of a factored layer the product, without its rounding."""
    if not site.is_lowrank:
        return site.core().double().clone()
    u, sigma, vh = (factor.detach().double() for factor in site.factors)
    return u @ sigma @ vh


def matrices(model: nn.Module) -> dict[str, Tensor]:
    return {name: matrix(site) for name, site in sites(model).items()}


def random_gradients(model: nn.Module, seed: int, size: float = 1.0) -> None:
    """A gradient for every trained parameter: as good as any where only the bookkeeping is tested."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = size * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)


def idle(model: nn.Module) -> Optimizer:
    """An optimiser whose steps change nothing."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


def batch(step: int, features: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The samples of a step, a function of its number: classes are told apart by a fixed direction each, and noise."""
    g = torch.Generator().manual_seed(1000 + step)
    y = torch.randint(0, classes, (32,), generator=g)
    prototypes = torch.randn(classes, features, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    noise = torch.randn(32, features, generator=g, dtype=torch.float64)
    return (prototypes[y] + noise).to(dtype), y


def train_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


class Loop:
    """A training of `model` by `optimizer` under `oialr`, whose passes whoever has it makes with `backward(step)`."""

    model: nn.Module
    optimizer: Optimizer
    oialr: OIALR

    def end(self) -> None:
        """What follows the passes of a step."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.oialr.step()


def frobenius(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))
