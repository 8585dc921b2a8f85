"""What the tests of the room share: comparisons, and layers of every kind with an input that fits."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hpclr.lowrank import WeightSite, densify, factorize, select

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def distance(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def assert_near(found: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    assert found.dtype == expected.dtype
    assert distance(found, expected) <= (tolerance or TOLERANCE[expected.dtype])


def converted(model: nn.Module, rank: Any = None) -> nn.Module:
    """A low-rank copy; at least one weight must have been converted."""
    twin = copy.deepcopy(model)
    assert any(report.converted for report in factorize(twin, rank))
    return twin


def dense_twin(model: nn.Module) -> nn.Module:
    return densify(copy.deepcopy(model))


def only_site(model: nn.Module) -> WeightSite:
    (site,) = select(model).eligible
    return site


def some_loss(y: Tensor) -> Tensor:
    """Has a gradient everywhere; a mean of squares has none behind a LayerNorm."""
    return (y.float().flatten() * torch.linspace(-1, 1, y.numel())).mean() * 100


def gradients_of(model: nn.Module) -> Tensor:
    """All of them in one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


Case = tuple[Callable[[], nn.Module], tuple[int, ...]]


def case(cls: type[nn.Module], *sizes: Any, x: tuple[int, ...], **options: Any) -> Case:
    """How to make a layer, and the shape of an input for it."""
    return lambda: cls(*sizes, **options), x


LINEAR: dict[str, Case] = {
    "square": case(nn.Linear, 16, 16, x=(8, 16)),
    "wide": case(nn.Linear, 32, 6, x=(8, 32)),
    "tall": case(nn.Linear, 6, 32, x=(8, 6)),
    "no bias": case(nn.Linear, 12, 9, x=(8, 12), bias=False),
    "sequences": case(nn.Linear, 12, 9, x=(3, 5, 12)),
    "one vector": case(nn.Linear, 12, 9, x=(12,)),
    "no rows": case(nn.Linear, 12, 9, x=(0, 12)),
}

CONV: dict[str, Case] = {
    "1d": case(nn.Conv1d, 4, 6, 5, x=(2, 4, 20)),
    "1d stride, dilation": case(nn.Conv1d, 4, 6, 3, stride=2, dilation=3, padding=2, x=(2, 4, 20)),
    "2d": case(nn.Conv2d, 4, 6, 3, x=(2, 4, 9, 8)),
    "2d oblong": case(nn.Conv2d, 4, 6, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), x=(2, 4, 9, 14)),
    "2d no bias": case(nn.Conv2d, 4, 6, 3, bias=False, x=(2, 4, 9, 8)),
    "2d unbatched": case(nn.Conv2d, 4, 6, 3, x=(4, 9, 8)),
    "2d groups": case(nn.Conv2d, 8, 12, 3, groups=4, padding=1, x=(2, 8, 9, 8)),
    "2d depthwise": case(nn.Conv2d, 6, 12, 3, groups=6, x=(2, 6, 9, 8)),
    "2d same": case(nn.Conv2d, 4, 6, (4, 3), padding="same", dilation=2, x=(2, 4, 9, 8)),
    "2d valid": case(nn.Conv2d, 4, 6, 3, padding="valid", x=(2, 4, 9, 8)),
    "2d same, reflect": case(nn.Conv2d, 4, 6, 4, padding="same", padding_mode="reflect", x=(2, 4, 9, 8)),
    "2d reflect": case(nn.Conv2d, 4, 6, 3, padding=2, padding_mode="reflect", x=(2, 4, 9, 8)),
    "2d replicate": case(nn.Conv2d, 4, 6, 3, padding=(1, 2), padding_mode="replicate", x=(2, 4, 9, 8)),
    "2d circular": case(nn.Conv2d, 4, 6, 3, padding=1, padding_mode="circular", stride=2, x=(2, 4, 9, 8)),
    "2d no images": case(nn.Conv2d, 4, 6, 3, x=(0, 4, 9, 8)),
    "3d": case(nn.Conv3d, 3, 4, 2, groups=1, x=(2, 3, 4, 5, 6)),
    "3d groups": case(nn.Conv3d, 4, 6, (1, 2, 3), groups=2, stride=(1, 2, 1), padding=1, x=(2, 4, 4, 5, 6)),
}

LAYERS = {f"Linear {name}": case for name, case in LINEAR.items()} | {
    f"Conv {name}": case for name, case in CONV.items()
}
