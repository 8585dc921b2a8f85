"""Optimiser state through changes of basis, for every optimiser of torch."""

import warnings

import pytest
import torch
from lowrank_helpers import assert_near, only_site
from torch import nn
from torch.optim import Optimizer

from hpclr.lowrank import BasisChange, LowRankWarning, select
from hpclr.lowrank.factors import svd
from hpclr.lowrank.moments import STATE_RULES, carry, check_optimizer

OPTIMIZERS = {
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "SGD nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "SGD plain": {"lr": 0.05},
    "Adam": {"lr": 0.01},
    "Adam amsgrad": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01, "foreach": False},
    "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.01},
    "Adamax": {"lr": 0.01},
    "RMSprop": {"lr": 0.01},
    "RMSprop centred": {"lr": 0.01, "centered": True, "momentum": 0.5},
    "Adagrad": {"lr": 0.01},
    "Adadelta": {},
    "Rprop": {"lr": 0.01},
    "ASGD": {"lr": 0.01, "t0": 2},
    "Adafactor": {"lr": 0.01},
    "Muon": {"lr": 0.01},
}
REFUSED = {"LBFGS", "SparseAdam"}
AVAILABLE = [name for name in OPTIMIZERS if hasattr(torch.optim, name.split()[0])]  # Muon came late
every_optimizer = pytest.mark.parametrize("name", AVAILABLE)


def make(name, parameters):
    return getattr(torch.optim, name.split()[0])(parameters, **OPTIMIZERS[name])


def net():
    return nn.Sequential(nn.Linear(6, 9, bias=False), nn.Tanh(), nn.Linear(9, 5, bias=False)).double()


def train(model, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
        loss = (model(x) - x[:, :5].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def change_basis(optimizer, site, rank=None):
    """What a method does to a layer: new factors from its SVD, state and gradient carried."""
    basis = svd(site.core())
    left, right = basis.u[:, :rank], basis.vh[:rank].mT
    old_shape, old_grad = site.parameter.shape, site.parameter.grad
    change = BasisChange(site.name, site.parameter, left, right)
    if site.is_lowrank:
        site.convert(site.factors.u @ left, torch.diag(basis.s[:rank]), right.mT @ site.factors.vh)
    else:
        change = BasisChange(site.name, site.parameter, left, right, site.to_matrix)
        site.convert(left, torch.diag(basis.s[:rank]), right.mT)
    carry(optimizer, change, old_shape, old_grad)
    return change


def test_no_optimiser_of_torch_is_forgotten():
    classes = {
        name for name, value in vars(torch.optim).items() if isinstance(value, type) and issubclass(value, Optimizer)
    }
    assert classes - {"Optimizer"} - REFUSED == {name.split()[0] for name in OPTIMIZERS if name != "Muon"} | (
        {"Muon"} & classes
    )


@every_optimizer
def test_state_fits_and_training_goes_on(name):
    model = net()
    optimizer = make(name, model.parameters())
    train(model, optimizer, 4)
    for rank in (None, 3, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if name == "Adafactor" else "error", LowRankWarning)
            for site in select(model).eligible:
                change_basis(optimizer, site, rank)
                state = optimizer.state[site.parameter]
                assert_sound(state, site.parameter.shape)
        before = [site.parameter.detach().clone() for site in select(model).eligible]
        train(model, optimizer, 3)
        for site, old in zip(select(model).eligible, before, strict=True):
            assert site.parameter.isfinite().all()
            assert not torch.equal(site.parameter, old)


def assert_sound(state, shape):
    for key, value in state.items():
        if torch.is_tensor(value):
            assert value.isfinite().all(), key
            assert value.shape in ((), shape), key
            if STATE_RULES.get(key) in (BasisChange.squared, BasisChange.magnitude):
                assert (value >= 0).all(), key
    if "grad_avg" in state:
        assert (state["square_avg"] - state["grad_avg"].square() >= -1e-15).all()


@pytest.mark.parametrize("name", ["SGD", "SGD nesterov"])
def test_momentum_in_a_full_basis_follows_the_dense_run(name):
    """For square weights Σ is W in rotated coordinates; SGD knows no coordinates, so nothing may change."""
    dense = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 5, bias=False)).double()
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 5, bias=False)).double()
    model.load_state_dict(dense.state_dict())
    for module, rotates in ((dense, False), (model, True)):
        optimizer = make(name, module.parameters())
        for part in range(4):
            train(module, optimizer, 5, seed=part)
            if rotates:
                change_basis(optimizer, select(module).eligible[0])
    assert_near(model[0].weight, dense[0].weight)
    assert_near(model[2].weight, dense[2].weight)


def test_linear_state_and_gradient_are_rotated_exactly():
    model = net()
    optimizer = make("SGD", model.parameters())
    train(model, optimizer, 3)
    site = select(model).eligible[0]
    momentum, gradient = optimizer.state[site.parameter]["momentum_buffer"].clone(), site.parameter.grad.clone()
    for rank in (4, 2):
        change = change_basis(optimizer, site, rank)
        momentum, gradient = (change.left.mT @ t @ change.right for t in (momentum, gradient))
        torch.testing.assert_close(optimizer.state[site.parameter]["momentum_buffer"], momentum)
        torch.testing.assert_close(site.parameter.grad, gradient)


def test_squared_state_goes_by_the_squares():
    model = net()
    optimizer = make("Adagrad", model.parameters())
    train(model, optimizer, 3)
    site = select(model).eligible[0]
    squares = optimizer.state[site.parameter]["sum"].clone()
    change = change_basis(optimizer, site, 4)
    expected = torch.einsum("mk,mn,nl->kl", change.left**2, squares, change.right**2)
    torch.testing.assert_close(optimizer.state[site.parameter]["sum"], expected)


@pytest.mark.parametrize("name", [name for name in AVAILABLE if name != "Adafactor"])  # which is reset
def test_a_permutation_of_coordinates_permutes_the_state(name):
    """The one change of basis under which state of every kind has an exact image."""
    layer = nn.Linear(6, 6, bias=False).double()
    optimizer = make(name, layer.parameters())
    train(nn.Sequential(layer, nn.Linear(6, 5).double()), optimizer, 3)
    site = only_site(layer)
    old = {key: value.clone() for key, value in optimizer.state[layer.weight].items() if torch.is_tensor(value)}
    rows, columns = torch.randperm(6), torch.randperm(6)
    left, right = torch.eye(6).double()[:, rows], torch.eye(6).double()[:, columns]
    weight, shape, gradient = site.core(), site.parameter.shape, site.parameter.grad
    site.convert(left, left.mT @ weight @ right, right.mT)
    carry(optimizer, BasisChange(site.name, site.parameter, left, right), shape, gradient)
    for key, value in optimizer.state[site.parameter].items():
        if torch.is_tensor(value):
            expected = old[key][rows][:, columns] if value.ndim else old[key]
            torch.testing.assert_close(value, expected)


def adams_step(state, eps=1e-8):
    return float((state["exp_avg"] / (state["exp_avg_sq"].sqrt() + eps)).norm())


@pytest.mark.parametrize("name", ["Adam", "Adam amsgrad"])
def test_adams_next_step_does_not_grow(name):
    """The gradient of one weight alone, a step of length 1, becomes one of all weights, each with a step of 1."""
    layer = nn.Linear(40, 30, bias=False).double()
    optimizer = make(name, layer.parameters())
    for _ in range(5):
        layer.weight.grad = torch.zeros(30, 40).double()
        layer.weight.grad[3, 4] = 1
        optimizer.step()
    before = adams_step(optimizer.state[layer.weight])
    site = only_site(layer)
    change_basis(optimizer, site)
    assert adams_step(optimizer.state[site.parameter]) <= before * 1.001  # ε is in it too
    change_basis(optimizer, site, 5)
    assert adams_step(optimizer.state[site.parameter]) <= before * 1.001  # ε is in it too


def test_a_centred_optimiser_survives_constant_gradients():
    """RMSprop divides by the root of square_avg − grad_avg²; carried apart, they would give the root of less than 0."""
    layer = nn.Linear(6, 6, bias=False).double()
    optimizer = make("RMSprop centred", layer.parameters())
    for _ in range(5):
        layer.weight.grad = torch.ones(6, 6).double() + 0.01 * torch.randn(6, 6).double()
        optimizer.step()
    change_basis(optimizer, only_site(layer))
    layer.sigma.grad = torch.randn(6, 6).double()
    optimizer.step()
    assert layer.sigma.isfinite().all()


def test_state_of_a_convolution_is_seen_as_a_matrix():
    layer = nn.Conv2d(4, 6, 3).double()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    layer(torch.randn(2, 4, 8, 8).double()).square().mean().backward()
    optimizer.step()
    momentum = optimizer.state[layer.weight]["momentum_buffer"].clone()
    change = change_basis(optimizer, only_site(layer), 3)
    expected = change.left.mT @ momentum.flatten(1) @ change.right
    torch.testing.assert_close(optimizer.state[layer.sigma]["momentum_buffer"], expected)
    assert change.to_matrix(momentum).shape == (6, 36)


def test_a_parameter_without_state_or_gradient_needs_nothing():
    layer = nn.Linear(6, 5)
    optimizer = torch.optim.Adam(layer.parameters())
    change_basis(optimizer, only_site(layer), 2)
    assert layer.sigma.grad is None
    assert layer.sigma not in optimizer.state


class Historical(torch.optim.SGD):
    """Keeps something nobody knows how to carry."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("history", parameter.detach().clone())


@pytest.mark.parametrize(
    ("make", "key"),
    [(lambda p: Historical(p, 0.1, momentum=0.9), "'history'"), (torch.optim.Adafactor, "'row_var', 'col_var'")],
)
def test_unknown_state_is_reset_with_a_warning_that_names_it(make, key):
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer, 2)
    first, second = select(model).eligible
    with pytest.warns(LowRankWarning, match=f"keeps state {key} for layer '0'"):
        change_basis(optimizer, first, 3)
    assert first.parameter not in optimizer.state
    assert optimizer.state[second.parameter]
    train(model, optimizer, 2)


class NotAnOptimizer:
    """A wrapper, as some libraries make."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.LBFGS, "LBFGS cannot follow a change of basis"),
        (lambda p: torch.optim.SparseAdam(list(p)), "SparseAdam cannot follow a change of basis"),
        (
            lambda p: NotAnOptimizer(torch.optim.Adam(p)),
            "found NotAnOptimizer; if it wraps one, pass the optimiser inside",
        ),
    ],
)
def test_what_cannot_follow_is_refused(make, message):
    model = net()
    with pytest.raises(TypeError, match=message):
        check_optimizer(make(model.parameters()), {"0": model[0].weight})


def test_an_optimiser_of_other_parameters_is_refused():
    model, other = net(), net()
    weights = {site.name: site.parameter for site in select(model).eligible}
    check_optimizer(torch.optim.Adam(model.parameters()), weights)
    with pytest.raises(ValueError, match=r"the weights of 2 of the 2 layers .*\(0, 2\)"):
        check_optimizer(torch.optim.Adam(other.parameters()), weights)
    with pytest.raises(ValueError, match=r"the weights of 1 of the 2 layers .*\(2\)"):
        check_optimizer(torch.optim.Adam([*other.parameters(), model[0].weight]), weights)
