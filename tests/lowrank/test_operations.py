"""The operations that the choice of order counts, against torch's counter around real passes."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hpclr.lowrank import product, select
from hpclr.lowrank.product import operations


def counted(layer: nn.Module, x: torch.Tensor, training: bool) -> int:
    with torch.set_grad_enabled(training), FlopCounterMode(display=False) as counter:
        y = layer(x)
        if training:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("pass_", ["evaluation", "training", "training of a first layer"])
@pytest.mark.parametrize("rows", [3, 30, 300])
@pytest.mark.parametrize(("m", "n", "k"), [(24, 24, 5), (48, 12, 7), (12, 48, 12)])
def test_of_linear_layers(m, n, k, rows, pass_, order):
    layer, x = nn.Linear(n, m), torch.randn(rows, n, requires_grad=pass_ == "training")
    select(layer).eligible[0].factorize(k)
    training = pass_ != "evaluation"
    expected = operations(rows, m, n, k, training=training, input_gradient=x.requires_grad)
    assert counted(layer, x, training) == (expected.rebuild if order == "rebuild" else expected.through)


@pytest.mark.parametrize("pass_", ["evaluation", "training", "training of a first layer"])
def test_of_convolutions(pass_, order):
    layer, x = nn.Conv2d(8, 12, 3), torch.randn(5, 8, 10, 10, requires_grad=pass_ == "training")
    select(layer).eligible[0].factorize(4)
    training = pass_ != "evaluation"
    expected = operations(5 * 8 * 8, 12, 72, 4, training=training, input_gradient=x.requires_grad, always_folds=True)
    assert counted(layer, x, training) == (expected.rebuild if order == "rebuild" else expected.through)


@pytest.mark.parametrize(("rows", "folds"), [(20_000, False), (60_000, True)])
def test_sigma_is_folded_in_where_that_saves_much(rows, folds):
    m = n = 24
    layer, x = nn.Linear(n, m), torch.randn(rows, n, requires_grad=True)
    select(layer).eligible[0].factorize(12)
    plainly = 8 * rows * 12 * n + 6 * rows * 12 * 12
    saved = 2 * 2 * 12 * 12 * (rows - 24)
    assert counted(layer, x, True) == plainly - folds * saved


def test_many_rows_pay_for_sigma_once():
    rows, m, n, k = 10**9, 768, 3072, 100
    through = operations(rows, m, n, k, training=True).through
    assert round(through / rows) == 4 * m * k + 4 * n * k + 2 * k * k


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_cheaper_order_is_taken(rows, monkeypatch):
    layer, x = nn.Linear(24, 24), torch.randn(rows, 24)
    for k in (1, 12, 24):
        twin = nn.Linear(24, 24)
        select(twin).eligible[0].factorize(k)
        assert counted(twin, x, False) == min(operations(rows, 24, 24, k, training=False))
    assert product.through_factors(rows, 24, 24, 1, training=True)
    assert counted(layer, x, False) == 2 * rows * 24 * 24
