"""Augmentation of pictures as a function of (seed, epoch, sample): nothing else decides what a sample looks like."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from hpclr.data.hashing import Stream, below, hashes, key
from hpclr.data.order import permute

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Augment:
    """What is done to pictures (N, C, H, W) in training.

    Attributes:
        flip: mirror every other one, left to right.
        crop: pad by this many pixels on all sides and cut out the original size at a random place; the
            padding is zero, which after normalisation is the mean.
    """

    flip: bool = False
    crop: int = 0

    def __post_init__(self) -> None:
        if self.crop < 0:
            raise ValueError(f"crop must be 0 or more pixels, found {self.crop}")

    def __call__(self, x: Tensor, indices: Indices, seed: int, epoch: int) -> Tensor:
        """The augmented pictures.

        Args:
            x: normalised pictures (N, C, H, W).
            indices: which samples they are (N,).
            seed: the run's seed.
            epoch: the epoch, from 0.
        """
        height, width = x.shape[2:]
        top = self._offsets(Stream.CROP_ROW, indices, seed, epoch)
        left = self._offsets(Stream.CROP_COLUMN, indices, seed, epoch)
        rows = top[:, None] + np.arange(height)
        columns = left[:, None] + np.arange(width)
        if self.flip:
            mirrored = below(hashes(key(seed, epoch, Stream.FLIP), indices), 2) == 1
            columns[mirrored] = columns[mirrored, ::-1]
        return _gather(F.pad(x, [self.crop] * 4), torch.from_numpy(rows), torch.from_numpy(columns))

    def _offsets(self, stream: Stream, indices: Indices, seed: int, epoch: int) -> Indices:
        return below(hashes(key(seed, epoch, stream), indices), 2 * self.crop + 1)


def _gather(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pictures (N, C, h, w) at rows (N, H) and columns (N, W) of their own → (N, C, H, W)."""
    x = x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    return x.gather(3, columns[:, None, None, :].expand(-1, x.shape[1], x.shape[2], -1))


def mixing(alpha: float, seed: int, epoch: int, batch: int, size: int) -> tuple[Indices, float]:
    """How mixup mixes a global batch: λ·x + (1 − λ)·x[partners], each sample with another one, all with one weight.

    Args:
        alpha: the weight is drawn from Beta(alpha, alpha).
        seed: the run's seed.
        epoch: the epoch, from 0.
        batch: index of the batch in the epoch.
        size: samples of the batch.

    Returns:
        The partners (size,) as rows of the batch, and λ.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
    """
    weight_key = key(seed, epoch, batch, Stream.MIXUP_WEIGHT)
    weight = float(np.random.Generator(np.random.Philox(key=weight_key)).beta(alpha, alpha))
    return permute(key(seed, epoch, batch, Stream.MIXUP_PARTNER), np.arange(size), size), weight
