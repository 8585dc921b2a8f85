"""The numbers that are reported, against counting by hand."""

import pytest
import torch
from lowrank_helpers import converted, dense_twin, small_net
from torch import nn

from hpclr.lowrank import count_flops, factorize, optimizer_bytes, summarize


def test_parameters_of_a_layer():
    layer = nn.Linear(40, 30)
    dense = summarize(layer)
    assert (dense.trainable, dense.stored, dense.dense) == (1230, 1230, 1230)
    factorize(layer, 4)
    low = summarize(layer)
    assert low.trainable == 4 * 4 + 30
    assert low.stored == 30 * 4 + 4 * 4 + 4 * 40 + 30
    assert low.dense == 1230
    assert (low.gradient_bytes, low.dense_gradient_bytes) == (4 * low.trainable, 4 * 1230)
    assert (low.trainable_share, low.stored_share) == (46 / 1230, 326 / 1230)
    (size,) = low.layers
    assert (size.name, size.shape, size.rank, size.converted) == ("Linear", (30, 40), 4, True)


def test_full_rank_factors_are_larger_than_the_weight():
    layer = converted(nn.Linear(8, 8))
    assert summarize(layer).stored == 3 * 64 + 8
    assert summarize(layer).dense == 64 + 8


def mixed():
    shared = nn.Linear(12, 12)
    return nn.Sequential(
        nn.Embedding(9, 12), shared, nn.LayerNorm(12), shared, nn.MultiheadAttention(12, 3, kdim=6), nn.Conv1d(4, 8, 3)
    )


def test_counts_agree_with_the_models_themselves():
    model = mixed()
    model[2].weight.requires_grad_(False)
    factorize(model, 2, exclude=["5"])
    summary = summarize(model)
    assert summary.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert summary.stored == sum(p.numel() for p in model.parameters())
    assert summary.dense == sum(p.numel() for p in dense_twin(model).parameters())
    assert [layer.name for layer in summary.layers] == ["1", "4.q_proj", "4.k_proj", "4.v_proj", "4.out_proj", "5"]
    assert summary.as_dict()["ranks"] == {"1": 2, "4.q_proj": 2, "4.k_proj": 2, "4.v_proj": 2, "4.out_proj": 2}
    assert "layers" not in summary.as_dict()
    assert summary.rank_share == pytest.approx((4 * 2 / 12 + 2 / 6) / 5)  # k_proj is 12×6


def test_bytes_follow_the_type_of_the_numbers():
    layer = converted(nn.Linear(8, 6), 2)
    assert summarize(layer.bfloat16()).gradient_bytes == 2 * (4 + 6)
    assert summarize(layer.double()).gradient_bytes == 8 * (4 + 6)


def test_bytes_of_the_optimiser():
    layer = nn.Linear(8, 6)
    optimizer = torch.optim.Adam(layer.parameters())
    assert optimizer_bytes(optimizer) == 0
    layer(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    assert summarize(layer, optimizer).optimizer_bytes == 4 * (2 * (48 + 6) + 2)  # m, v, and a step counter each
    assert summarize(layer).optimizer_bytes is None


def test_bytes_of_an_optimiser_that_nests_its_state():
    parameter = nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter] = {
        "step": 3,
        "bases": [torch.zeros(2, 2), None],
        "inner": {"pair": (torch.zeros(5, dtype=torch.float64), torch.zeros((), dtype=torch.int8))},
    }
    assert optimizer_bytes(optimizer) == 4 * 4 + 8 * 5 + 1


@pytest.mark.parametrize("rows", [1, 50])
def test_operations_of_a_linear_layer(rows):
    m, n, k = 30, 40, 4
    layer = converted(nn.Linear(n, m), k)
    summary = summarize(layer, example=torch.randn(rows, n))
    fold = 2 * k * k * min(rows, m)  # U Σ, or Σ applied to the rows
    assert summary.flops == 2 * rows * n * k + 2 * rows * k * m + fold
    assert summary.dense_flops == 2 * rows * m * n


def test_operations_where_rebuilding_is_cheaper():
    layer = converted(nn.Linear(40, 30))
    summary = summarize(layer, example=torch.randn(500, 40))
    assert summary.flops == 2 * 500 * 30 * 40 + 2 * 30 * 30 * 30 + 2 * 30 * 30 * 40
    assert summary.dense_flops == 2 * 500 * 30 * 40


def test_operations_of_a_convolution():
    layer = converted(nn.Conv2d(8, 16, 3, padding=1), 2)
    summary = summarize(layer, example=torch.randn(4, 8, 10, 10))
    positions = 4 * 10 * 10
    assert summary.flops == 2 * positions * (72 * 2 + 2 * 16) + 2 * 16 * 2 * 2
    assert summary.dense_flops == 2 * positions * 16 * 72


def test_attention_on_its_fast_path_is_counted_too():
    """In eval mode torch runs dense encoder layers as one operation, which its counter does not know."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True).train()
    x = torch.randn(3, 5, 16)
    products = 2 * 15 * (16 * 48 + 16 * 16 + 2 * 16 * 32) + 2 * 2 * 3 * 5 * 5 * 16
    assert count_flops(layer, x) == products
    low = converted(layer, 2)
    summary = summarize(low, example=x)
    assert summary.dense_flops == products
    assert summary.flops < products / 2


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(small_net(), nn.Dropout(), nn.BatchNorm1d(3))
    factorize(model, 2)
    model[0].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    printed = repr(model)
    summary = summarize(model, example=(torch.randn(5, 12),))
    assert summary.dense_flops == 2 * 5 * (12 * 16 + 16 * 16 + 16 * 3)
    assert [module.training for module in model.modules()] == modes
    assert repr(model) == printed
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_counting_runs_nothing_of_the_model_itself():
    layer = nn.BatchNorm1d(12)
    model = nn.Sequential(converted(nn.Linear(12, 12), 2), layer)
    calls = []
    layer.register_buffer("seen", torch.zeros(1))
    layer.register_forward_hook(lambda module, args, output: calls.append(args[0].device.type) or module.seen.add_(1))
    count_flops(model, torch.randn(5, 12))
    assert calls == ["meta"]
    assert layer.seen == 0
