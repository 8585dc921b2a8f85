"""OIALR beside an optimiser, a scheduler, a gradient scaler and whoever else follows the parameters."""

import pytest
import torch
from small_runs import batch, frobenius, idle, matrix, mlp, random_gradients, sites, stack, train_step, with_spectrum

from hpclr import OIALR
from hpclr.lowrank import EMA

NEVER = 10**6

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


def held(optimizer):
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_trained_parameter_is_in_the_optimiser_and_moves(name):
    model = mlp([10, 16, 12, 8])
    optimizer = OPTIMIZERS[name](model.parameters())
    oialr = OIALR(model, optimizer, delay=4, every=3, cutoff=0.4, layer_fraction=1, keep_last=False)
    for step in range(11):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train_step(model, optimizer, *batch(step, 10, 8))
        for key, parameter in model.named_parameters():
            frozen = key.endswith((".u", ".vh"))
            assert parameter.requires_grad == (not frozen)
            assert torch.equal(parameter, before[key]) == frozen, key
        oialr.step()
        assert {id(p) for p in model.parameters() if p.requires_grad} == held(optimizer)
    assert all(oialr.frozen.values())
    assert sum(key.endswith(".bias") for key in before) == 3
    assert oialr.ranks["4"] < 8


def test_sigma_takes_the_place_of_the_weight_in_its_own_group():
    model = mlp([10, 16, 12, 8])
    groups = [
        {"params": [model[0].weight], "lr": 0.1, "weight_decay": 0.5},
        {"params": [model[2].weight, model[2].bias, model[0].bias], "lr": 0.01},
        {"params": model[4].parameters(), "lr": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    oialr = OIALR(model, optimizer, delay=4, every=2, cutoff=0.3, layer_fraction=1, keep_last=False)
    for step in range(8):
        train_step(model, optimizer, *batch(step, 10, 8))
        scheduler.step()
        oialr.step()
    first, second, third = (group["params"] for group in optimizer.param_groups)
    assert [p is q for p, q in zip(first, [model[0].sigma], strict=True)] == [True]
    assert [p is q for p, q in zip(second, [model[2].sigma, model[2].bias, model[0].bias], strict=True)] == [True] * 3
    assert third[0] is model[4].sigma
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.025, 0.0025, 0.0])
    sigma, grad = model[0].sigma.detach().clone(), torch.randn_like(model[0].sigma)
    model[0].sigma.grad = grad
    optimizer.state.clear()
    optimizer.step()
    expected = sigma - 0.025 * (grad + 0.5 * sigma)
    assert torch.allclose(model[0].sigma, expected, atol=1e-6), "lr and weight decay are those of the weight's group"


def test_the_largest_group_of_a_scheduler_made_before_the_conversion_goes_on():
    model = mlp([8, 8, 8])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=12)
    oialr = OIALR(model, optimizer, delay=3, every=3, layer_fraction=1, keep_last=False)
    rates = []
    for step in range(11):
        train_step(model, optimizer, *batch(step, 8, 8))
        oialr.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert max(rates) == pytest.approx(1e-2, rel=0.1)
    assert rates[-1] < 1e-3


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skips_is_no_step(fused):
    model = mlp([8, 8, 8])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    oialr = OIALR(model, optimizer, delay=3, every=2, layer_fraction=1, keep_last=False)
    counted = []
    for step in range(6):
        optimizer.zero_grad()
        x, y = batch(step, 8, 8)
        scaler.scale(torch.nn.functional.cross_entropy(model(x), y)).backward()
        if step in (1, 3):
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        oialr.step()
        counted.append((oialr.steps, oialr.frozen["0"]))
    assert counted == [(1, False), (1, False), (2, False), (2, False), (3, True), (4, True)]
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def in_weight_space(site):
    """The gradient of W, or that part of it which Σ sees."""
    if not site.is_lowrank:
        return site.parameter.grad.clone()
    return (site.factors.u @ site.parameter.grad @ site.factors.vh).detach()


def test_gradients_accumulated_at_a_check_survive_it_in_the_new_basis():
    model = stack(with_spectrum([3, 2, 1, 0.5], 6, 4), with_spectrum([3, 2, 1, 0.1], 4, 6, seed=5))
    optimizer = idle(model)
    oialr = OIALR(model, optimizer, delay=1, every=1, layer_fraction=1, cutoff=0.2, keep_last=False)
    x = torch.randn(16, 4, dtype=torch.float64)
    for _ in range(2):
        optimizer.step()
        model.zero_grad()
        model(x).square().sum().backward()
        before = {name: in_weight_space(site) for name, site in sites(model).items()}
        oialr.step()
        for name, site in sites(model).items():
            u, _, vh = site.factors
            assert torch.allclose(site.parameter.grad, u.mT @ before[name] @ vh.mT, atol=1e-9)
    assert oialr.ranks == {"0": 3, "1": 3}
    model(x).square().sum().backward()  # more of them can be added
    assert all(site.parameter.grad.shape == (3, 3) for site in sites(model).values())


def test_accumulated_gradients_at_a_conversion_are_worth_what_they_were():
    """Half of a batch before a check and half after it, against the whole batch after it."""
    runs = []
    for halves in (True, False):
        model = mlp([8, 12, 6], torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        oialr = OIALR(model, optimizer, delay=1, every=NEVER, keep_last=False)
        train_step(model, optimizer, *batch(0, 8, 6, torch.float64))
        optimizer.zero_grad()
        x, y = batch(1, 8, 6, torch.float64)
        loss = torch.nn.functional.cross_entropy
        if halves:
            (loss(model(x[:16]), y[:16]) / 2).backward()
            oialr.step()
            (loss(model(x[16:]), y[16:]) / 2).backward()
        else:
            oialr.step()
            loss(model(x), y).backward()
        optimizer.step()
        runs.append({name: matrix(site) for name, site in sites(model).items()})
    for name, weight in runs[0].items():
        assert torch.allclose(weight, runs[1][name], atol=1e-12)


def test_a_loss_that_is_kept_from_the_step_before_does_no_harm():
    model = mlp([8, 12, 6])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    oialr = OIALR(model, optimizer, delay=2, every=1, cutoff=0.5, layer_fraction=1, keep_last=False)
    losses = []
    for step in range(5):
        x, y = batch(step, 8, 6)
        losses.append(torch.nn.functional.cross_entropy(model(x), y))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        oialr.step()
    assert oialr.ranks["2"] < 6


# --- the learning rate of Σ ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_factor_scales_the_updates_of_sigma_and_of_nothing_else(name):
    moved = []
    for factor in (1.0, 2.5):
        model = mlp([8, 8, 8, 8], torch.float64)
        optimizer = OPTIMIZERS[name](model.parameters())
        oialr = OIALR(model, optimizer, delay=2, every=NEVER, keep_last=True, sigma_lr=factor)
        for step in range(2):
            random_gradients(model, step)
            optimizer.step()
        oialr.step()
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        random_gradients(model, 9)
        optimizer.step()
        moved.append({key: p.detach() - before[key] for key, p in model.named_parameters()})
    once, scaled = moved
    assert sum(key.endswith("sigma") for key in once) == 2
    for key, update in once.items():
        factor = 2.5 if key.endswith("sigma") else 1.0
        assert torch.allclose(scaled[key], factor * update, rtol=1e-9, atol=1e-14), key


def test_the_factor_also_holds_for_steps_with_a_closure():
    model = stack(with_spectrum([3, 2, 1], 3, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    OIALR(model, optimizer, delay=0, every=1, keep_last=False, sigma_lr=3.0)
    sigma = model[0].sigma.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = model(torch.eye(3, dtype=torch.float64)).sum()
        loss.backward()
        return loss

    optimizer.zero_grad()
    optimizer.step(closure)
    assert torch.allclose(model[0].sigma, sigma - 3.0 * 0.1 * model[0].sigma.grad, atol=1e-12)


# --- who follows the parameters --------------------------------------------------------------------------------------


def test_hooks_hear_of_every_change_and_can_follow_it():
    model = stack(with_spectrum([3, 2, 1, 0.1], 6, 4))
    optimizer = idle(model)
    oialr = OIALR(model, optimizer, delay=1, every=1, layer_fraction=1, cutoff=0.2, keep_last=False)
    followed = [model[0].weight.detach().clone()]
    heard = []

    def hook(change):
        heard.append(
            (change.name, change.parameter is model[0].sigma, tuple(change.left.shape), tuple(change.right.shape))
        )
        followed[0] = change.linear(followed[0])

    oialr.on_change(hook)
    for _ in range(2):
        optimizer.step()
        oialr.step()
    assert heard == [("0", True, (6, 4), (4, 4)), ("0", True, (4, 3), (4, 3))]
    assert torch.allclose(followed[0], model[0].sigma, atol=1e-12)


def test_an_average_of_the_weights_follows():
    """Averaging W directly and averaging Σ through the changes of basis come to the same."""
    model = mlp([6, 6, 6], torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    settings = {"cutoff": 1e-12, "min_rank": 1.0, "layer_fraction": 1.0, "keep_last": False}
    oialr = OIALR(model, optimizer, delay=5, every=4, **settings)
    ema = EMA(model, 0.8)
    oialr.on_change(ema.follow)
    averages = {name: matrix(site) for name, site in sites(model).items()}
    for step in range(20):
        train_step(model, optimizer, *batch(step, 6, 6, torch.float64))
        ema.update()
        for name, site in sites(model).items():
            averages[name] = 0.8 * averages[name] + 0.2 * matrix(site)
        oialr.step()
    with ema.applied():
        for name, site in sites(model).items():
            assert frobenius(matrix(site) - averages[name]) < 1e-10
    assert all(oialr.frozen.values())
