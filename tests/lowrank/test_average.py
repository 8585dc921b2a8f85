"""Averages of the weights through changes of basis."""

import pytest
import torch
from lowrank_helpers import assert_near, only_site, small_net
from torch import nn

from hpclr.lowrank import EMA, BasisChange, factorize, select
from hpclr.lowrank.factors import svd


def step(model, generator):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.1)


def change_basis(site, ema, rank=None):
    basis = svd(site.core())
    left, right = basis.u[:, :rank], basis.vh[:rank].mT
    if site.is_lowrank:
        change = BasisChange(site.name, site.parameter, left, right)
        site.convert(site.factors.u @ left, torch.diag(basis.s[:rank]), right.mT @ site.factors.vh)
    else:
        change = BasisChange(site.name, site.parameter, left, right, site.to_matrix)
        site.convert(left, torch.diag(basis.s[:rank]), right.mT)
    ema.follow(change)


def test_the_average_is_the_recursion_it_is_said_to_be():
    layer = nn.Linear(4, 3)
    ema = EMA(layer, 0.9)
    expected = layer.weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        step(layer, generator)
        ema.update()
        expected = 0.9 * expected + 0.1 * layer.weight.detach()
    with ema.applied():
        torch.testing.assert_close(layer.weight.detach(), expected)


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 6), lambda: nn.Conv2d(2, 8, 2)])
def test_within_the_basis_the_average_follows_exactly(make):
    """Without a cut, the average of W is what it would be without any change of basis."""
    layer = make().double()
    ema = EMA(layer, 0.8)
    site = only_site(layer)
    expected = layer.weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    for turn in range(9):
        step(layer, generator)
        ema.update()
        expected = 0.8 * expected + 0.2 * layer.weight.detach()
        if turn % 3 == 2:
            change_basis(site, ema)
    with ema.applied():
        assert_near(layer.weight, expected)


def test_after_a_cut_it_is_the_part_within_the_basis():
    layer = nn.Linear(8, 6).double()
    ema = EMA(layer, 0.5)
    step(layer, torch.Generator().manual_seed(0))
    ema.update()
    with ema.applied():
        average = layer.weight.detach().clone()
    change_basis(only_site(layer), ema, 3)
    u, _, vh = only_site(layer).factors
    with ema.applied():
        assert layer.sigma.shape == (3, 3)
        assert_near(layer.weight, u @ u.mT @ average @ vh.mT @ vh)


@pytest.mark.parametrize("fails", [False, True])
def test_the_models_own_weights_and_gradients_come_back(fails):
    model = small_net()
    factorize(model, 3, exclude=["4"])
    ema = EMA(model, 0.9)
    model(torch.randn(4, 12)).sum().backward()
    step(model, torch.Generator().manual_seed(0))
    ema.update()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = {name: (p, p.grad) for name, p in model.named_parameters()}
    try:
        with ema.applied() as applied:
            assert applied is model
            assert not torch.equal(model[0].sigma, before["0.sigma"])
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name][0]
        assert parameter.grad is parameters[name][1]
    assert not any("u" in name.split(".") for name in ema.state_dict()["averages"])


def test_copying_to_the_model_is_for_good():
    layer = nn.Linear(4, 3)
    ema = EMA(layer, 0.9)
    average = layer.weight.detach().clone()
    layer.weight.data.zero_()
    ema.copy_to_model()
    assert torch.equal(layer.weight, average)
    layer.weight.data.zero_()
    assert torch.equal(ema.state_dict()["averages"]["weight"], average)


def test_a_round_trip_through_a_state_dict():
    model, twin = small_net(), small_net()
    twin.load_state_dict(model.state_dict())
    ema, other = EMA(model, 0.9), EMA(twin, 0.5)
    for site in select(model).eligible[:2]:
        change_basis(site, ema, 3)
    step(model, torch.Generator().manual_seed(0))
    ema.update()
    state = ema.state_dict()
    factorize(twin, {"0": 3, "2": 3})
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    step(twin, torch.Generator().manual_seed(1))
    other.update()
    assert other.decay == 0.9
    for name, average in state["averages"].items():
        expected = 0.9 * average + 0.1 * twin.get_parameter(name).detach()
        torch.testing.assert_close(other.state_dict()["averages"][name], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda averages: averages.update({"weight": torch.zeros(2, 2)}), r"'weight' .*\(2, 2\).*\(3, 4\)"),
        (lambda averages: averages.update({"other": torch.zeros(3)}), "'other'"),
        (lambda averages: averages.pop("bias"), "'bias'"),
    ],
)
def test_averages_that_do_not_fit_are_refused_whole(change, message):
    layer = nn.Linear(4, 3)
    ema = EMA(layer, 0.9)
    state = ema.state_dict()
    for average in state["averages"].values():
        average.zero_()
    change(state["averages"])
    with pytest.raises(ValueError, match=message):
        ema.load_state_dict(state)
    assert all(average.any() for average in ema.state_dict()["averages"].values())


def test_what_was_frozen_later_keeps_its_average():
    layer = nn.Linear(4, 3)
    ema = EMA(layer, 0.9)
    layer.weight.requires_grad_(False)
    state = ema.state_dict()
    state["averages"]["weight"] += 1
    ema.load_state_dict(state)
    assert torch.equal(ema.state_dict()["averages"]["weight"], state["averages"]["weight"])


@pytest.mark.parametrize("rank", [1, 2])
def test_an_average_that_was_not_told_of_a_change_says_so(rank):
    layer = nn.Linear(4, 3)
    ema = EMA(layer, 0.9)
    factorize(layer, rank)
    with pytest.raises(ValueError, match=r"'sigma' .*on_change\(ema.follow\)"):
        ema.update()


@pytest.mark.parametrize("decay", [0, 1, -0.1, 1.5])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        EMA(nn.Linear(4, 3), decay)
