import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpclr.data import Order, sample_order
from hpclr.data.order import Bijection


def whole(seed, epoch, n):
    return sample_order(seed, epoch, np.arange(n), n)


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1000, 4097, 60_000])
def test_each_sample_comes_once(n):
    assert np.array_equal(np.sort(whole(3, 1, n)), np.arange(n))


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 10**6), st.integers(1, 3000), st.data())
def test_a_position_does_not_depend_on_those_asked_for_with_it(seed, epoch, n, data):
    position = data.draw(st.integers(0, n - 1))
    alone = sample_order(seed, epoch, np.array([position]), n)
    assert alone[0] == whole(seed, epoch, n)[position]


def test_the_order_never_changes_between_versions():
    # a resumed run of an older hpclr must see what the uninterrupted one would have seen
    assert whole(0, 0, 10).tolist() == [0, 3, 6, 4, 9, 5, 8, 1, 7, 2]
    assert sample_order(7, 3, np.array([0, 1, 999_999_999]), 10**9).tolist() == [764068173, 769518513, 421776315]


@pytest.mark.parametrize("n", [2, 3, 7, 16, 17])
def test_every_sample_is_as_likely_at_every_position(n):
    epochs = 1500
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        counts[np.arange(n), whole(1, epoch, n)] += 1
    expected = epochs / n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2  # rows and columns both add up
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 4


def test_all_orders_of_three_come_up_equally_often():
    epochs = 3000
    _, counts = np.unique([whole(0, epoch, 3) for epoch in range(epochs)], axis=0, return_counts=True)
    assert len(counts) == 6
    assert np.abs(counts - epochs / 6).max() < 5 * np.sqrt(epochs / 6)


@pytest.mark.parametrize("other", [(1, 0), (0, 1), (2**32, 0), (-1, 0)])
def test_seeds_and_epochs_are_independent(other):
    n = 20_000
    first, second = whole(0, 0, n), whole(*other, n)
    assert (first == second).sum() < 10  # one in common is what chance gives
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(n)


def test_neighbours_are_not_related():
    n = 50_000
    order = whole(0, 0, n).astype(float)
    for lag in (1, 2, 128, 256):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 4.5 / np.sqrt(n)
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 4.5 / np.sqrt(n)


def test_a_batch_sees_the_whole_range():
    n = 10**9
    samples = sample_order(0, 0, np.arange(100_000), n)
    counts, _ = np.histogram(samples, bins=100, range=(0, n))
    assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 4.5 * np.sqrt(2 * 99)


def test_bad_positions_are_refused_with_their_numbers():
    with pytest.raises(ValueError, match=r"0 to 9, found 3 to 10"):
        sample_order(0, 0, np.array([3, 10]), 10)
    with pytest.raises(ValueError, match="n = 0"):
        sample_order(0, 0, np.array([], dtype=np.int64), 0)


# --- orders of kind "chunks"

SIZES = st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(sum)
CHUNKED = st.builds(Order, st.just("chunks"), st.integers(1, 70), st.integers(1, 9))


def all_of(order, sizes, seed=0, epoch=0):
    return order.samples(seed, epoch, np.arange(sum(sizes)), sizes)


@given(CHUNKED, SIZES, st.integers(0, 2**64 - 1), st.integers(0, 99))
def test_each_sample_comes_once_in_chunks_too(order, sizes, seed, epoch):
    assert np.array_equal(np.sort(all_of(order, sizes, seed, epoch)), np.arange(sum(sizes)))


@given(CHUNKED, SIZES, st.data())
def test_a_position_alone_and_a_batch_agree_with_the_whole(order, sizes, data):
    n = sum(sizes)
    first = data.draw(st.integers(0, n - 1))
    last = data.draw(st.integers(first + 1, n))
    whole = all_of(order, sizes)
    assert order.samples(0, 0, np.array([first]), sizes)[0] == whole[first]
    batch = order.batch(0, 0, np.arange(first, last), sizes)
    assert sorted(batch) == sorted(whole[first:last])


@given(CHUNKED, SIZES)
def test_windows_are_made_of_whole_chunks(order, sizes):
    offsets = np.cumsum([0, *sizes])
    file = np.searchsorted(offsets, samples := all_of(order, sizes), side="right") - 1
    chunks = list(zip(file, (samples - offsets[file]) // order.chunk, strict=True))
    lengths = {chunk: chunks.count(chunk) for chunk in chunks}
    seen, position = set(), 0
    while position < len(chunks):  # as many chunks as a window has must end where its samples end
        window, count = set(), 0
        while count < len(chunks) - position and not (
            sum(lengths[chunk] for chunk in window) == count and len(window) == order.window
        ):
            window.add(chunks[position + count])
            count += 1
        assert len(window) <= order.window
        assert not window & seen
        seen |= window
        position += count


@pytest.mark.parametrize("order", [Order(), Order("chunks", 10, 8)])
@pytest.mark.parametrize(("first", "last"), [(4090, 4100), (4096, 8192), (0, 9000), (8999, 9000)])
def test_large_batches_and_those_far_on_have_the_samples_of_their_positions(order, first, last):
    sizes, positions = [5000, 0, 4000], np.arange(first, last)
    batch, samples = order.batch(1, 2, positions, sizes), order.samples(1, 2, positions, sizes)
    assert np.array_equal(np.sort(batch), np.sort(samples))
    assert order.kind == "chunks" or np.array_equal(batch, samples)
    batch[:] = 0  # what one batch does to its own is not seen by the next
    assert np.array_equal(np.sort(order.batch(1, 2, positions, sizes)), np.sort(samples))


def test_a_batch_is_sorted_by_place_in_its_windows():
    order, sizes = Order("chunks", 10, 8), [1000]
    for first in (0, 40, 64):  # the last two lie in two windows
        batch = order.batch(0, 0, np.arange(first, first + 40), sizes)
        runs = np.flatnonzero(np.diff(batch // 10)) + 1
        for chunk in np.split(batch, runs):
            assert np.array_equal(chunk, np.sort(chunk))
        assert len(runs) < 24  # unsorted it would be about 35


def test_epochs_and_seeds_have_orders_of_their_own():
    order, sizes = Order("chunks", 16, 4), [5000]
    orders = [all_of(order, sizes, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (orders[i] == orders[j]).sum() < 12
        firsts = [orders[k][:64] // 16 for k in (i, j)]
        assert len(set(firsts[0]) & set(firsts[1])) <= 2  # other chunks in the first window


def test_all_orders_of_four_come_up_equally_often():
    count = 3000
    _, counts = np.unique(
        [Bijection(number, 4).images(np.arange(4)) for number in range(count)], axis=0, return_counts=True
    )
    assert len(counts) == 24
    assert ((counts - count / 24) ** 2 / (count / 24)).sum() < 23 + 4 * np.sqrt(46)


def test_a_trillion_samples_cost_what_a_thousand_cost():
    order, sizes = Order("chunks", 340, 64), [10**12 + 17, 5, 3 * 10**11]
    positions = np.concatenate([np.arange(300), 10**12 - np.arange(300), sum(sizes) - 1 - np.arange(300)])
    samples = order.samples(0, 0, positions, sizes)
    assert len(np.unique(samples)) == 900
    assert samples.min() >= 0
    assert samples.max() < sum(sizes)


def test_the_order_of_chunks_never_changes_between_versions():
    order = Order("chunks", 3, 2)
    assert all_of(order, [10]).tolist() == [2, 0, 3, 5, 4, 1, 7, 6, 8, 9]
    assert order.samples(7, 3, np.array([0, 1, 999_999_999]), [10**9]).tolist() == [483933182, 707174351, 341208296]


@given(st.integers(1, 10**6), st.integers(0, 2**64 - 1), st.data())
def test_the_bijection_can_be_undone(n, key, data):
    bijection = Bijection(key, n)
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=9)))
    assert np.array_equal(bijection.positions(bijection.images(positions)), positions)


@pytest.mark.parametrize("order", [Order(), Order("chunks", 85, 64)])
def test_an_order_survives_json(order):
    assert Order(**json.loads(json.dumps(asdict(order)))) == order


@pytest.mark.parametrize(("kind", "chunk", "window"), [("rows", 1, 1), ("chunks", 0, 1), ("chunks", 1, 2.0)])
def test_what_makes_no_order_is_refused(kind, chunk, window):
    with pytest.raises(ValueError, match=r"of an order: expected .*found"):
        Order(kind, chunk, window)


@pytest.mark.parametrize(("positions", "sizes"), [([10], [10]), ([-1], [10]), ([0], [0])])
def test_an_order_refuses_positions_that_are_not_there(positions, sizes):
    with pytest.raises(ValueError, match="found"):
        Order("chunks", 3, 2).samples(0, 0, np.array(positions), sizes)
