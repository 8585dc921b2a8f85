"""The order of the samples of an epoch, computed and never stored.

Position p of an epoch shows sample π(p), where π is a permutation of 0 … n − 1 keyed by (seed, epoch).
π is a Feistel network on the smallest domain of 2^(2b) ≥ n numbers; a number that falls outside 0 … n − 1
goes through the network again until it falls inside ("cycle walking"), which keeps π a bijection.
Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.

Files too large for memory are read in chunks, so an order of kind "chunks" permutes these, and single samples
only within windows of consecutive chunks of that order: the same permutation, at two levels.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from hpclr.data.hashing import U64, Stream, hashes, key, mix

Indices = npt.NDArray[np.int64]

_ROUNDS = 6
_HALF_ROUNDS = 10
_STRETCH = 4096  # positions computed at a time: numpy takes as long for those of a batch as for many


@dataclass(frozen=True)
class Order:
    """How the samples of an epoch are shuffled; `dataclasses.asdict(order)` is JSON, `Order(**that)` the order again.

    A checkpoint keeps it, so that a resumed run goes on in the order that it began with, whatever the
    chunks of the file are by then.

    Attributes:
        kind: "samples": every order of the samples is possible. "chunks": chunks are shuffled, and samples within
            each `window` of consecutive chunks of that order.
        chunk: samples a chunk, the last one of each file excepted, which may be smaller; with "chunks".
        window: chunks a window; with "chunks".

    Raises:
        ValueError: for values that make no order.
    """

    kind: Literal["samples", "chunks"] = "samples"
    chunk: int = 1
    window: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("samples", "chunks"):
            raise ValueError(f"kind of an order: expected 'samples' or 'chunks', found {self.kind!r}")
        for name in ("chunk", "window"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} of an order: expected a whole number from 1 on, found {value!r}")

    def samples(self, seed: int, epoch: int, positions: Indices, sizes: Sequence[int]) -> Indices:
        """The sample at each of the given positions of an epoch.

        Args:
            seed: the run's seed.
            epoch: the epoch, from 0.
            positions: places in the epoch, each in 0 … n − 1; shape (k,).
            sizes: number of samples of each file of the split, n in all.

        Returns:
            Sample indices (k,) int64 over the files one after another; over all n positions each sample comes once.
            Time and memory are those of `positions` (and of the windows they are in), whatever n is.

        Raises:
            ValueError: if n < 1 or a position is outside 0 … n − 1.
        """
        if self.kind == "samples":
            return sample_order(seed, epoch, positions, sum(sizes))
        shuffled = _shuffled(self, seed, epoch, tuple(sizes))
        return shuffled.samples(shuffled.places(positions)[0])

    def batch(self, seed: int, epoch: int, positions: Indices, sizes: Sequence[int]) -> Indices:
        """The samples at these positions, which follow one another, in the order in which the processes share them out.

        The r-th of N processes takes the r-th N-th of what this returns. With "chunks", that is sorted by place in
        the window, so that it takes about the same N-th of the window's chunks in every batch and touches few
        others. (Not sorted by index or place in the epoch: of a batch that lies in two windows one process would
        get only the first window's samples, from all of its chunks.)
        """
        _check(positions, sum(sizes))
        first, last = int(positions[0]), int(positions[-1]) + 1
        numbers = range(first // _STRETCH, -(-last // _STRETCH))
        stretches = [_stretch(self, seed, epoch, tuple(sizes), number) for number in numbers]
        inside = slice(first - numbers[0] * _STRETCH, last - numbers[0] * _STRETCH)
        samples, places = (np.concatenate(parts)[inside] for parts in zip(*stretches, strict=True))
        return samples[np.argsort(places, kind="stable")]


def sample_order(seed: int, epoch: int, positions: Indices, n: int) -> Indices:
    """The sample at each of the given positions (k,) of an epoch of n samples, in an order of kind "samples".

    Raises:
        ValueError: if n < 1 or a position is outside 0 … n − 1.
    """
    return permute(key(seed, epoch, Stream.ORDER), positions, n)


class Chunks:
    """The chunks of a split: `rows` consecutive samples of one file each, the last one of a file perhaps fewer.

    Args:
        sizes: number of samples of each file.
        rows: samples a chunk.
    """

    def __init__(self, sizes: Sequence[int], rows: int) -> None:
        self.rows = rows
        self._sizes: Indices = np.array([size for size in sizes if size], dtype=np.int64)
        self._first_sample: Indices = np.concatenate([[0], np.cumsum(self._sizes)])
        self._first_chunk: Indices = np.concatenate([[0], np.cumsum(-(-self._sizes // rows))])
        self.count = int(self._first_chunk[-1])
        self.samples = int(self._first_sample[-1])

    def first_sample(self, chunks: Indices) -> Indices:
        """The first sample of each chunk."""
        file = np.searchsorted(self._first_chunk, chunks, side="right") - 1
        return self._first_sample[file] + (chunks - self._first_chunk[file]) * self.rows

    def of(self, samples: Indices) -> Indices:
        """The chunk of each sample."""
        file = np.searchsorted(self._first_sample, samples, side="right") - 1
        return self._first_chunk[file] + (samples - self._first_sample[file]) // self.rows

    def bounds(self, chunk: int) -> tuple[int, int]:
        """The first sample of a chunk, and the one after its last."""
        file = int(np.searchsorted(self._first_chunk, chunk, side="right")) - 1
        first = int(self._first_sample[file] + (chunk - self._first_chunk[file]) * self.rows)
        return first, min(first + self.rows, int(self._first_sample[file + 1]))

    def last_of_files(self) -> tuple[Indices, Indices]:
        """The last chunk of each file, and how many samples it lacks."""
        return self._first_chunk[1:] - 1, -self._sizes % self.rows


class ShuffledChunks:
    """The chunks of a split in the order of an epoch.

    Slot s of that order holds chunk π(s). The samples in slot 0, slot 1, … one after another have the places
    0 … n − 1. A place is slot · rows + row, less what the last chunks of files lack that came before it: these
    few are found by the inverse of π, so nothing here grows with n.
    """

    def __init__(self, order: Order, seed: int, epoch: int, sizes: Sequence[int]) -> None:
        self._chunks, self._window = Chunks(sizes, order.chunk), order.window
        self._shuffle = Bijection(key(seed, epoch, Stream.CHUNK), self._chunks.count)
        self._window_key = key(seed, epoch, Stream.WINDOW)
        last, lacking = self._chunks.last_of_files()
        slots = self._shuffle.positions(last)
        ascending = np.argsort(slots)
        self._short_slots = slots[ascending]
        self._lacking: Indices = np.concatenate([[0], np.cumsum(lacking[ascending])])
        self._short_ends: Indices = (self._short_slots + 1) * order.chunk - self._lacking[1:]

    def places(self, positions: Indices) -> tuple[Indices, Indices]:
        """The place of each position, which stays within the position's window, and the first place of that window."""
        _check(positions, self._chunks.samples)
        windows = self._slots(positions) // self._window
        places, first_of_window = np.empty_like(positions), np.empty_like(positions)
        for window in np.unique(windows).tolist():
            bounds = np.array([window, window + 1]) * self._window
            first, last = self._first_places(np.minimum(bounds, self._chunks.count)).tolist()
            mine = windows == window
            shuffle = Bijection(key(self._window_key, window), last - first)
            places[mine] = first + shuffle.images(positions[mine] - first)
            first_of_window[mine] = first
        return places, first_of_window

    def samples(self, places: Indices) -> Indices:
        """The sample at each place."""
        slots = self._slots(places)
        chunks = self._shuffle.images(slots)
        return self._chunks.first_sample(chunks) + places - self._first_places(slots)

    def _slots(self, places: Indices) -> Indices:
        return (places + self._lacking[np.searchsorted(self._short_ends, places, side="right")]) // self._chunks.rows

    def _first_places(self, slots: Indices) -> Indices:
        return slots * self._chunks.rows - self._lacking[np.searchsorted(self._short_slots, slots)]


@lru_cache(maxsize=4)
def _stretch(order: Order, seed: int, epoch: int, sizes: tuple[int, ...], number: int) -> tuple[Indices, Indices]:
    """The samples at the `number`-th 4096 positions of an epoch, and by what a batch of them is sorted."""
    positions = np.arange(number * _STRETCH, min((number + 1) * _STRETCH, sum(sizes)))
    if order.kind == "samples":
        return order.samples(seed, epoch, positions, sizes), positions
    shuffled = _shuffled(order, seed, epoch, sizes)
    places, first_of_window = shuffled.places(positions)
    return shuffled.samples(places), places - first_of_window


@lru_cache(maxsize=4)
def _shuffled(order: Order, seed: int, epoch: int, sizes: tuple[int, ...]) -> ShuffledChunks:
    """The same for all batches of an epoch."""
    return ShuffledChunks(order, seed, epoch, sizes)


def permute(permutation_key: int, positions: Indices, n: int) -> Indices:
    """The images of `positions` under the permutation of 0 … n − 1 that belongs to the key."""
    _check(positions, n)
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    round_keys = hashes(permutation_key, np.arange(_ROUNDS))
    return _walk(lambda x: _feistel(x, round_keys, half_bits), positions, n)


def _feistel(x: U64, round_keys: U64, half_bits: int) -> U64:
    bits, unused = np.uint64(half_bits), np.uint64(64 - half_bits)
    left, right = x >> bits, x & np.uint64((1 << half_bits) - 1)
    for round_key in round_keys:
        left, right = right, left ^ (mix(right + round_key) >> unused)
    return (left << bits) | right


class Bijection:
    """A keyed permutation of 0 … n − 1 that can also be undone, and is quicker than `permute` for small batches.

    The same construction on a grid of a × b ≥ n numbers with a, b ≈ √n, whose coordinates take turns at being moved
    by a hash of the other one. It is hardly larger than n, so numbers seldom go through it twice. (`permute` stays as
    it is, because results that were computed with it must repeat.)
    """

    def __init__(self, permutation_key: int, n: int) -> None:
        self._n = n
        self._height = math.isqrt(max(0, n - 1)) + 1
        self._width = -(-n // self._height)
        self._round_keys = hashes(permutation_key, np.arange(_HALF_ROUNDS))

    def images(self, positions: Indices) -> Indices:
        """What each position is mapped to."""
        _check(positions, self._n)
        return _walk(lambda x: self._moved(x, range(_HALF_ROUNDS), forward=True), positions, self._n)

    def positions(self, images: Indices) -> Indices:
        """Which positions are mapped to these."""
        _check(images, self._n)
        return _walk(lambda x: self._moved(x, reversed(range(_HALF_ROUNDS)), forward=False), images, self._n)

    def _moved(self, x: U64, half_rounds: Iterable[int], *, forward: bool) -> U64:
        sides = np.uint64(self._height), np.uint64(self._width)
        place: list[U64] = list(np.divmod(x, sides[1]))
        for number in half_rounds:
            moved, other = number % 2, 1 - number % 2
            shift = mix(place[other] + self._round_keys[number]) % sides[moved]
            place[moved] = (place[moved] + (shift if forward else sides[moved] - shift)) % sides[moved]
        return place[0] * sides[1] + place[1]


def _walk(step: Callable[[U64], U64], numbers: Indices, n: int) -> Indices:
    """Steps each number once, and then on until it is in 0 … n − 1 again."""
    result = step(numbers.astype(np.uint64))
    outside = np.flatnonzero(result >= n)
    while outside.size:
        result[outside] = step(result[outside])
        outside = outside[result[outside] >= n]
    return result.astype(np.int64)


def _check(positions: Indices, n: int) -> None:
    if n < 1:
        raise ValueError(f"an order needs at least one sample, found n = {n}")
    if positions.size and not (positions.min() >= 0 and positions.max() < n):
        raise ValueError(f"positions must be in 0 to {n - 1}, found {positions.min()} to {positions.max()}")
