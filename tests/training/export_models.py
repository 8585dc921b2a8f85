"""A model with one of everything that a weight may be, for `target:`."""

import torch
from torch import Tensor, nn


class Everything(nn.Module):
    """Convolutions with groups, attention packed and separate, Conv1D, tied weights, layers of two names, buffers."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
        self.expand, self.contract = Conv1D(16, 8), Conv1D(6, 16)
        self.one = self.other = nn.Linear(8, 8)
        self.up, self.tied = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.tied.weight = self.up.weight
        self.head = nn.Linear(8, 10)
        self.register_buffer("mask", torch.full((64, 64), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) to (N, 10)."""
        x = self.norm(self.grouped(self.conv(x).relu())).flatten(2).mT
        x = x + self.attention(x, x, x, attn_mask=self.mask, need_weights=False)[0]
        y = self.contract(self.expand(x.contiguous()).relu())
        x = x + self.cross(x, y, y, need_weights=False)[0]
        x = self.other(self.one(x).relu())
        x = self.tied(self.up(x).relu())
        return self.head(x.mean(1))


def lazy() -> nn.Module:
    """Shapes that only samples or weights tell."""
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(24), nn.ReLU(), nn.LazyLinear(10))


class Fixed(nn.Sequential):
    """Its graph takes one number of samples only."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.zeros(1, 10).expand(len(x), -1)


class Branching(Fixed):
    """Has no graph: what it does depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (1.0 if float(x.sum()) > 0 else 0.0)
