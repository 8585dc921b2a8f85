"""Weights as products of two trained factors: exact, balanced, with the right gradients and sizes, and reversible."""

import copy

import pytest
import torch
from lowrank_helpers import LAYERS, dense_twin, small_net
from torch import nn

from hpclr.lowrank import EMA, FactorizationError, LowRankWarning, load_state_dict, select, summarize
from hpclr.lowrank.factors import SVD, stable_rank, svd
from hpclr.lowrank.interchange import dense_state_dict, factored_weights
from hpclr.lowrank.svd_layers import CHANNEL
from hpclr.lowrank.two_factors import balanced, give_rank, merge, saves, split_in_two

every_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
ATTENTION = {
    "packed": {},
    "separate": {"kdim": 6, "vdim": 5},
    "no bias": {"bias": False},
}


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **({"lr": 0.1, "momentum": 0.9} | options))


def split(model, optimizer=None, rank=None):
    """Every weight as A B, cut to a rank."""
    optimizer = optimizer or sgd(model)
    changes = []
    for site in select(model, kinds=CHANNEL).eligible:
        u, s, vh = svd(site.core())
        k = rank or len(s)
        changes += split_in_two(site, SVD(u[:, :k], s[:k], vh[:k]), optimizer)
    assert changes
    return changes


# --- the same function -----------------------------------------------------------------------------------------------


@every_layer
def test_at_full_rank_it_is_the_dense_layer(make, shape):
    layer = make().double()
    x = torch.randn(shape, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    split(twin)
    found, expected = twin(x), layer(x)
    assert found.shape == expected.shape
    assert (found - expected).abs().sum() <= 1e-12 * max(1, found.numel())
    assert (dense_twin(twin).weight - layer.weight).abs().max() <= 1e-14


@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
def test_attention_at_full_rank(options):
    layer = nn.MultiheadAttention(8, 2, batch_first=True, **options).double()
    q, k, v = (torch.randn(3, 5, n, dtype=torch.float64) for n in (8, options.get("kdim", 8), options.get("vdim", 8)))
    twin = copy.deepcopy(layer)
    split(twin)
    assert all(site.is_lowrank for site in select(twin, kinds=CHANNEL).eligible)
    for found, expected in zip(twin(q, k, v), layer(q, k, v), strict=True):
        assert (found - expected).abs().max() <= 1e-12


def test_the_factors_are_balanced_and_s_is_one_and_frozen():
    layer = nn.Linear(9, 6).double()
    weight, s = layer.weight, svd(layer.weight).s
    split(layer, rank=4)
    assert [name for name, _ in layer.named_parameters()] == ["u", "s", "vh", "bias"]
    assert layer.s is weight
    assert torch.equal(layer.s, torch.ones(4, dtype=torch.float64))
    assert [p.requires_grad for p in layer.parameters()] == [True, False, True, True]
    for gram in (layer.u.mT @ layer.u, layer.vh @ layer.vh.mT):
        assert torch.allclose(gram, torch.diag(s[:4]), atol=1e-14)


def test_a_weight_of_zeros_can_leave_zero():
    layer = nn.Linear(5, 4, bias=False)
    nn.init.zeros_(layer.weight)
    split(layer, optimizer := sgd(layer))
    x = torch.randn(8, 5)
    assert layer(x).abs().max() == 0
    (layer(x) - 1).square().mean().backward()
    optimizer.step()
    assert layer(x).abs().max() > 0
    partly = balanced(SVD(torch.eye(2), torch.tensor([4.0, 0.0]), torch.eye(2)))
    assert torch.equal(partly.u @ partly.vh, torch.diag(torch.tensor([4.0, 0.0])))


# --- gradients and state ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_gradients_and_moments_follow_the_chain_rule(shape):
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=False).double()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.0)
    gradient = torch.randn(shape, dtype=torch.float64)
    layer.weight.grad = gradient.clone()
    optimizer.step()
    layer.weight.grad = gradient.clone()
    split(layer, optimizer, rank=3)
    a, b = (p.detach().clone().requires_grad_() for p in (layer.u, layer.vh))
    of_a, of_b = torch.autograd.grad((a @ b * gradient).sum(), (a, b))
    for p, expected in ((layer.u, of_a), (layer.vh, of_b)):
        assert torch.allclose(p.grad, expected, atol=1e-14)
        assert torch.allclose(optimizer.state[p]["exp_avg"], 0.1 * expected, atol=1e-14)
        assert (optimizer.state[p]["exp_avg_sq"] > 0).all()
        assert float(optimizer.state[p]["step"]) == 1
    for i in (0, 7, 11):  # and by finite differences
        values = []
        for h in (1e-6, -1e-6):
            moved = a.detach().clone()
            moved.view(-1)[i] += h
            values.append((moved @ b * gradient).sum().item())
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(layer.u.grad.view(-1)[i].item(), rel=1e-6)


def test_momentum_is_exact_for_a_convolution():
    layer = nn.Conv2d(4, 6, 3, groups=2).double()
    optimizer = sgd(layer)
    for seed in (0, 1):
        layer.weight.grad = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed)).double()
        layer.bias.grad = torch.ones(6).double()
        optimizer.step()
    momentum = optimizer.state[layer.weight]["momentum_buffer"].flatten(1).clone()
    of_bias = optimizer.state[layer.bias]["momentum_buffer"]
    split(layer, optimizer)
    assert torch.allclose(optimizer.state[layer.u]["momentum_buffer"], momentum @ layer.vh.mT, atol=1e-13)
    assert torch.allclose(optimizer.state[layer.vh]["momentum_buffer"], layer.u.mT @ momentum, atol=1e-13)
    assert optimizer.state[layer.bias]["momentum_buffer"] is of_bias
    assert layer.s not in optimizer.state


class Unknown(torch.optim.SGD):
    """Keeps state of its own."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["of_its_own"] = torch.zeros_like(p)


def test_nothing_is_carried_to_what_is_not_trained():
    layer = nn.Linear(5, 4, bias=False)
    optimizer = Unknown(layer.parameters(), lr=0.1)
    layer.weight.grad = torch.ones(4, 5)
    optimizer.step()
    with pytest.warns(LowRankWarning, match="'of_its_own'") as caught:
        split(layer, optimizer)
    assert len(caught) == 2  # for either factor
    assert not optimizer.state
    assert [p.grad is None for p in (layer.u, layer.s, layer.vh)] == [False, True, False]


def test_the_factors_take_the_place_of_the_weight_and_give_it_back():
    model = small_net()
    groups = [
        {"params": [model[0].weight, model[0].bias], "lr": 0.5},
        {"params": [*model[2].parameters(), *model[4].parameters()]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    before = [list(group["params"]) for group in optimizer.param_groups]
    split(model, optimizer, rank=2)
    first, second = ([id(p) for p in group["params"]] for group in optimizer.param_groups)
    assert first == [id(p) for p in (model[0].u, model[0].vh, model[0].bias)]
    assert second == [id(p) for layer in (model[2], model[4]) for p in (layer.u, layer.vh, layer.bias)]
    assert optimizer.param_groups[0]["lr"] == 0.5
    x = torch.randn(4, 12)
    model(x).sum().backward()
    optimizer.step()
    expected = model(x)
    for site in select(model, kinds=CHANNEL).eligible:
        merge(site, optimizer)
    for group, params in zip(optimizer.param_groups, before, strict=True):
        assert all(p is q and p.requires_grad for p, q in zip(group["params"], params, strict=True))
    assert {id(p) for p in optimizer.state} <= {id(p) for p in model.parameters()}
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_a_rank_whose_contents_are_to_come():
    model, twin = small_net(), small_net()
    optimizer = sgd(twin)
    split(model, rank=2)
    for rank in (5, 2):  # from dense, and from another rank
        for site in select(twin, kinds=CHANNEL).eligible:
            give_rank(site, rank, optimizer)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(4, 12)
    assert torch.equal(twin(x), model(x))
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in twin.parameters() if p.requires_grad]


# --- for whoever looks at it -----------------------------------------------------------------------------------------


def test_sizes():
    model = nn.Sequential(nn.Linear(10, 8), nn.Conv2d(3, 4, 3))
    dense = summarize(model)
    split(model, optimizer := sgd(model), rank=2)
    found = summarize(model, optimizer)
    trained = 2 * (10 + 8) + 8 + 2 * (27 + 4) + 4
    assert (found.trainable, found.stored, found.dense) == (trained, trained + 2 * 2, dense.dense)
    assert (found.gradient_bytes, found.dense_gradient_bytes) == (4 * trained, dense.gradient_bytes)
    assert [layer.rank for layer in found.layers] == [2, 2]


def test_state_dicts_go_everywhere_they_go_from_three_factors():
    model = small_net()
    split(model, rank=3)
    x = torch.randn(4, 12)
    dense, other = small_net(), small_net()
    dense.load_state_dict(dense_state_dict(model.state_dict(), factored_weights(model)))
    assert torch.allclose(dense(x), model(x), atol=1e-6)
    load_state_dict(other, model.state_dict())
    assert torch.equal(other(x), model(x))
    model.load_state_dict(dense.state_dict())  # dense weights into factored layers
    assert torch.allclose(dense(x), model(x), atol=1e-6)


def test_averages_of_the_factors_begin_at_the_conversion():
    model = small_net()
    optimizer, ema, of_a_part = sgd(model), EMA(model, 0.5), EMA(model[0], 0.5)
    for change in split(model, optimizer, rank=2):
        ema.follow(change)
        of_a_part.follow(change)
    averages = ema.state_dict()["averages"]
    assert averages.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert of_a_part.state_dict()["averages"].keys() == {"u", "vh", "bias"}
    assert torch.equal(averages["0.u"], model[0].u)
    model[0].u.data += 1
    ema.update()
    assert torch.allclose(ema.state_dict()["averages"]["0.u"], averages["0.u"] + 0.5, atol=1e-6)
    x = torch.randn(4, 12)
    with ema.applied():
        averaged = model(x)
    assert not torch.equal(averages["0.u"], model[0].u)
    fresh = small_net()
    twin = EMA(fresh, 0.9)  # made while the model was dense
    for site in select(fresh, kinds=CHANNEL).eligible:
        give_rank(site, 2, sgd(fresh))
    fresh.load_state_dict(model.state_dict())
    twin.load_state_dict(ema.state_dict())
    with twin.applied():
        assert torch.equal(fresh(x), averaged)


@pytest.mark.parametrize(("m", "n", "groups"), [(8, 12, 1), (12, 8, 1), (7, 7, 1), (8, 6, 4)])
def test_what_saves(m, n, groups):
    for k in range(1, min(m, n) + 1):
        assert saves(m, n, k, groups=groups) == (k * m + k * n * groups < m * n)
    assert not saves(m, n, min(m, n), groups=groups)


def test_stable_ranks():
    assert stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))) == pytest.approx(6 / 4)
    assert stable_rank(torch.linalg.qr(torch.randn(9, 5, dtype=torch.float64)).Q) == pytest.approx(5)
    assert stable_rank(1e30 * torch.eye(3)) == 3
    assert stable_rank(torch.ones(4, 6, dtype=torch.bfloat16)) == pytest.approx(1)
    assert stable_rank(torch.zeros(4, 6)) == 0
    with pytest.raises(FactorizationError, match="4×6 matrix has entries that are not finite"):
        stable_rank(torch.full((4, 6), torch.nan))
