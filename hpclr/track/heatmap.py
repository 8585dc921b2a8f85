"""Layers × checks as a picture, without a library for plots."""

import math
import struct
import zlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from hpclr.track.scalars import is_number

_MOST_COLUMNS = 512  # when there are more, every other one goes
_SIDE = 512  # pixels that the picture is about wide and high
_UNKNOWN = (128, 128, 128)
# Nine colours of viridis, evenly spaced: told apart by all eyes, and in print.
_COLOURS = np.array(
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ]
)


class HeatMap:
    """Values of layers at one check after another.

    Attributes:
        layers: the rows, from the top.
        low: the value that is darkest; None before there is any.
        high: the one that is brightest.
    """

    def __init__(self) -> None:
        self.layers: dict[str, int] = {}
        self.low: float | None = None
        self.high: float | None = None
        self._columns: list[dict[str, float]] = []
        self._every, self._added = 1, 0

    def add(self, values: Mapping[str, object]) -> None:
        """The values of a check, by layer; those that are no numbers are drawn in grey."""
        known = {name: float(value) for name, value in values.items() if is_number(value)}
        for name in values:
            self.layers.setdefault(name, len(self.layers))
        self.low = min([*known.values()] + ([] if self.low is None else [self.low]), default=None)
        self.high = max([*known.values()] + ([] if self.high is None else [self.high]), default=None)
        if self._added % self._every == 0:
            self._columns.append(known)
        self._added += 1
        if len(self._columns) > _MOST_COLUMNS:
            self._columns, self._every = self._columns[::2], 2 * self._every

    def png(self) -> tuple[bytes, int, int]:
        """The picture, a PNG file, with its width and height in pixels."""
        colours = _coloured(self._scaled())
        rows, columns = colours.shape[:2]
        pixels = colours.repeat(math.ceil(_SIDE / rows), 0).repeat(math.ceil(_SIDE / columns), 1)
        return _png(pixels), pixels.shape[1], pixels.shape[0]

    def _scaled(self) -> NDArray[np.float64]:
        """(layers, checks), from 0 to 1; NaN where nothing is known."""
        table = np.full((max(1, len(self.layers)), max(1, len(self._columns))), np.nan)
        for column, values in enumerate(self._columns):
            for name, value in values.items():
                table[self.layers[name], column] = value
        low, high = self.low or 0.0, self.high or 0.0
        return (table - low) / (high - low) if high > low else table - low + 1.0


def _coloured(scaled: NDArray[np.float64]) -> NDArray[np.uint8]:
    """(rows, columns) → (rows, columns, 3)."""
    places = np.linspace(0, 1, len(_COLOURS))
    channels = [np.interp(scaled, places, _COLOURS[:, channel]) for channel in range(3)]
    known = np.isfinite(scaled)[..., None]
    return np.where(known, np.stack(channels, -1), _UNKNOWN).astype(np.uint8)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """(height, width, 3) as a file (ISO/IEC 15948): 8 bits a channel, rows without filter."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, 3 * width)], 1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
