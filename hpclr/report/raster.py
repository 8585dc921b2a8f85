"""The cells of heat maps, as PNG pictures with a palette: small, and the same wherever they are shown."""

import base64
import struct
import zlib
from collections.abc import Sequence

# Viridis (Smith and van der Walt), which grows in lightness evenly and so is also read in grey, in 16 steps.
_VIRIDIS = (
    "440154 481a6c 472f7d 414487 39568c 31688e 2a788e 23888e 1f988b 22a884 35b779 54c568 7ad151 a5db36 d2e21b fde725"
)
_NOTHING = 255  # in the palette: transparent
_LEVELS = 255


def level(value: float | None, low: float, high: float) -> int:
    """The place in the palette of a value of the scale from `low` to `high`; None: there is no value."""
    if value is None:
        return _NOTHING
    share = (value - low) / (high - low) if high > low else 1.0
    return min(_LEVELS - 1, max(0, int(share * _LEVELS)))


def picture(rows: Sequence[bytes]) -> str:
    """A data: URI of a PNG in which each byte is a pixel, by its `level`.

    Args:
        rows: from the top, of equal length.
    """
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    parts = (
        (b"IHDR", header),
        (b"PLTE", _palette()),
        (b"tRNS", b"\xff" * _LEVELS + b"\0"),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows), 9)),
        (b"IEND", b""),
    )
    content = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)
    return "data:image/png;base64," + base64.b64encode(content).decode()


def colour(share: float) -> str:
    """The colour at a share, 0 to 1, of the scale."""
    return "#" + _mixed(share).hex()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _palette() -> bytes:
    return b"".join(_mixed(number / (_LEVELS - 1)) for number in range(_LEVELS)) + b"\0\0\0"


def _mixed(share: float) -> bytes:
    """Red, green and blue, between two of the known colours."""
    known = [bytes.fromhex(text) for text in _VIRIDIS.split()]
    place = share * (len(known) - 1)
    left = min(int(place), len(known) - 2)
    pairs = zip(known[left], known[left + 1], strict=True)
    return bytes(round(a + (b - a) * (place - left)) for a, b in pairs)
