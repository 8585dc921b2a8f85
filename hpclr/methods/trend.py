"""Whether a number that is measured now and then still moves."""

from dataclasses import dataclass, field


@dataclass
class Trend:
    """How a number has moved of late.

    Attributes:
        smoothed: its exponential moving average.
        slopes: how much that has changed at each of the last measurements.
        flat: whether it has been flat; stays so.
    """

    smoothed: float
    slopes: list[float] = field(default_factory=list)
    flat: bool = False

    def add(self, value: float, window: int, flatness: float) -> None:
        """Takes a measurement: smoothed as over `window` of them, and flat once the slopes of as many are small."""
        slope = 2 / (window + 1) * (value - self.smoothed)
        self.smoothed += slope
        self.slopes = [*self.slopes, slope][-window:]
        self.flat |= len(self.slopes) == window and sum(map(abs, self.slopes)) / window <= flatness
