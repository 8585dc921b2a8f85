import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpclr.data import sample_order


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
