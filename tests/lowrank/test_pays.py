"""At which ranks factors are worth having: no larger than the dense weight and no slower."""

import pytest
from torch import nn

from hpclr.lowrank import select
from hpclr.lowrank.product import pays


def largest(m: int, n: int, **convolution: int) -> int:
    """The largest rank that pays; 0 if none does."""
    return max((k for k in range(1, min(m, n) + 1) if pays(m, n, k, **convolution)), default=0)


@pytest.mark.parametrize(("m", "n", "rank"), [(768, 768, 318), (3072, 768, 538), (768, 3072, 538), (20, 20, 8)])
def test_for_a_matrix_it_is_the_numbers_that_decide(m, n, rank):
    assert largest(m, n) == rank
    assert rank * (m + n) + rank**2 <= m * n < (rank + 1) * (m + n) + (rank + 1) ** 2


@pytest.mark.parametrize(
    ("layer", "rank"),
    [
        (nn.Conv2d(512, 512, 3), 425),  # by its numbers, as a matrix
        (nn.Conv2d(16, 16, 3), 8),  # measured: slower than dense at 10, faster at 7
        (nn.Conv2d(64, 64, 1), 0),  # measured: slower at every rank from 16 up
        (nn.Conv2d(64, 64, 3, groups=4), 8),
        (nn.Conv1d(64, 64, 3), 37),
    ],
    ids=str,
)
def test_a_small_convolution_must_save_more_than_it_costs_to_do_two(layer, rank):
    [site] = select(layer).eligible
    assert site.positions == layer.weight[0, 0].numel()
    m, n = site.shape
    assert largest(m, n, groups=site.groups, positions=site.positions) == rank
    assert rank <= largest(m, n, groups=site.groups)


def test_a_matrix_has_no_positions():
    assert [site.positions for site in select(nn.Linear(4, 4)).eligible] == [None]
