"""The order of the samples of an epoch, computed and never stored.

Position p of an epoch shows sample π(p), where π is a permutation of 0 … n − 1 keyed by (seed, epoch).
π is a Feistel network on the smallest domain of 2^(2b) ≥ n numbers; a number that falls outside 0 … n − 1
goes through the network again until it falls inside ("cycle walking"), which keeps π a bijection.
Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
"""

import numpy as np
import numpy.typing as npt

from hpclr.data.hashing import U64, Stream, hashes, key, mix

_ROUNDS = 6


def sample_order(seed: int, epoch: int, positions: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.int64]:
    """The sample at each of the given positions of an epoch.

    Args:
        seed: the run's seed.
        epoch: the epoch, from 0.
        positions: places in the epoch, each in 0 … n − 1; any shape (k,).
        n: number of samples of the split.

    Returns:
        Sample indices (k,) int64; over all n positions each sample comes once. Time and memory are those
        of `positions`, whatever n is.

    Raises:
        ValueError: if n < 1 or a position is outside 0 … n − 1.
    """
    return permute(key(seed, epoch, Stream.ORDER), positions, n)


def permute(permutation_key: int, positions: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.int64]:
    """The images of `positions` under the permutation of 0 … n − 1 that belongs to the key."""
    _check(positions, n)
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    round_keys = hashes(permutation_key, np.arange(_ROUNDS))
    result = _feistel(positions.astype(np.uint64), round_keys, half_bits)
    outside = np.flatnonzero(result >= n)
    while outside.size:
        result[outside] = _feistel(result[outside], round_keys, half_bits)
        outside = outside[result[outside] >= n]
    return result.astype(np.int64)


def _feistel(x: U64, round_keys: U64, half_bits: int) -> U64:
    bits, unused = np.uint64(half_bits), np.uint64(64 - half_bits)
    left, right = x >> bits, x & np.uint64((1 << half_bits) - 1)
    for round_key in round_keys:
        left, right = right, left ^ (mix(right + round_key) >> unused)
    return (left << bits) | right


def _check(positions: npt.NDArray[np.int64], n: int) -> None:
    if n < 1:
        raise ValueError(f"an order needs at least one sample, found n = {n}")
    if positions.size and not (positions.min() >= 0 and positions.max() < n):
        raise ValueError(f"positions must be in 0 to {n - 1}, found {positions.min()} to {positions.max()}")
