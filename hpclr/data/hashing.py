"""Random numbers as functions of their arguments: a 64-bit mixer over counters, no state anywhere.

Every random choice about data (order, augmentation, mixup, split) is a hash of what it belongs to, so a
resumed run, or one on another number of processes, makes the same choices without storing any.
"""

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Stream(IntEnum):
    """What a random choice is for; keeps choices that share seed and epoch independent."""

    ORDER = 1
    FLIP = 2
    CROP_ROW = 3
    CROP_COLUMN = 4
    MIXUP_WEIGHT = 5
    MIXUP_PARTNER = 6
    SPLIT = 7
    CHUNK = 8
    WINDOW = 9
    SHIFT = 10


def mix(x: U64) -> U64:
    """SplitMix64's finaliser: a bijection of 64-bit words that changes half the bits for any change.

    Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, with the
    constants of Stafford's variant 13.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*parts: int) -> int:
    """One 64-bit key for a tuple of whole numbers of any sign and size below 2⁶⁴."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = mix((state + _GOLDEN) ^ np.uint64(part & _MASK))
    return int(state[0])


def hashes(key: int, counters: npt.NDArray[Any]) -> U64:
    """A 64-bit random word for each counter, (n,) → (n,): SplitMix64 read at these places."""
    return mix(np.uint64(key) + (counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def below(words: U64, bound: int | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Random words as whole numbers 0 … bound − 1, for bounds below 2³¹, one for all or one for each."""
    return ((words >> np.uint64(32)) * np.asarray(bound, np.uint64) >> np.uint64(32)).astype(np.int64)
