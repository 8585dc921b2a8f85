"""Mean and standard deviation of each channel, in one pass."""

import numpy as np
import numpy.typing as npt

from hpclr.data.layout import Array

Floats = npt.NDArray[np.float64]


class ChannelStatistics:
    """Gathers rows (n, C, …) and knows their mean and standard deviation along axis 1.

    Blocks are merged by the pairwise rule of Chan, Golub and LeVeque (1983), which loses no digits where
    the mean is large against the spread, as sums of squares would.
    """

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._mean: Floats = np.zeros(channels)
        self._squares: Floats = np.zeros(channels)  # sums of squared differences from the mean

    def update(self, rows: Array) -> None:
        """Add rows (n, C, …)."""
        values = np.moveaxis(rows, 1, 0).reshape(rows.shape[1], -1).astype(np.float64)
        count = values.shape[1]
        if not count:
            return
        mean = values.mean(axis=1)
        squares = np.square(values - mean[:, None]).sum(axis=1)
        total, step = self._count + count, mean - self._mean
        self._mean = self._mean + step * (count / total)
        self._squares = self._squares + squares + step**2 * (self._count * count / total)
        self._count = total

    @property
    def mean(self) -> Floats:
        """Mean of each channel (C,)."""
        return self._mean

    @property
    def std(self) -> Floats:
        """Standard deviation of each channel (C,), 1 where a channel never varies so that one can divide by it."""
        std = np.sqrt(self._squares / max(1, self._count))
        rounding = 1e-12 * np.abs(self._mean)
        return np.where(std > rounding, std, 1.0)
