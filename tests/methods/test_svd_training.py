"""SVD training: penalties of known value, one schedule, a pruning that is exact in every respect, exact resuming."""

import copy
import io
import math
import pickle
import warnings
from fractions import Fraction
from itertools import combinations

import pytest
import torch
from small_runs import (
    batch,
    idle,
    matrices,
    mlp,
    orthonormal,
    random_gradients,
    sites,
    stack,
    train_step,
    with_spectrum,
)
from torch import nn

from hpclr import EMA, OIALR, SVDTraining, densify
from hpclr.lowrank import LowRankWarning, factorize, load_state_dict
from hpclr.methods.regularizers import REGULARIZERS, hoyer, hoyer_square, l1, not_orthonormal
from hpclr.methods.svd_training import directions_kept, random_factors

NEVER = 10**6
PLAIN = {"orthogonality": 0.0, "regularizer": "none", "sparsity": 0.0, "keep_last": False}


def svd_training(model, optimizer, **settings):
    return SVDTraining(model, optimizer, **({"sparsity": 0.1, "prune_at": NEVER, "keep_last": False} | settings))


# --- penalties -------------------------------------------------------------------------------------------------------


def test_orthogonality_has_the_values_of_the_paper():
    q = orthonormal(7, 3, 0).mT
    assert float(not_orthonormal(q)) == pytest.approx(0, abs=1e-28)
    assert float(not_orthonormal(2 * q)) == pytest.approx(3 * 3**2 / 3**2)  # ‖4I − I‖² / r²
    assert float(not_orthonormal(0 * q)) == pytest.approx(3 / 3**2)
    assert float(not_orthonormal(torch.ones(2, 5))) == pytest.approx((2 * 4**2 + 2 * 5**2) / 2**2)


def test_regularizers_have_the_values_of_the_paper():
    s = torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64)
    assert (float(l1(s)), float(hoyer(s)), float(hoyer_square(s))) == pytest.approx((7, 7 / 5 - 1, 49 / 25 - 1))
    equal, single = torch.full((9,), -0.3), torch.tensor([0.0, 2.0, 0.0])
    assert (float(hoyer(equal)), float(hoyer_square(equal))) == pytest.approx((2, 8))
    assert (float(hoyer(single)), float(hoyer_square(single))) == (0, 0)
    for multiple in (1e-3, 1e3):
        assert float(hoyer(multiple * s)) == pytest.approx(float(hoyer(s)))
    assert float(REGULARIZERS["none"](s)) == 0


@pytest.mark.parametrize("name", ["hoyer", "hoyer_square", "l1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_have_finite_values_and_slopes(name, dtype):
    for values in ([0, 0, 0], [0.0], [1, 0, -2], [1e-30, 0, 1e-25], [1e-44, 1e-44, 0], [1e-9, -1e-8, 0], [1e18, 0, 1]):
        s = torch.tensor(values, dtype=dtype, requires_grad=True)
        value = REGULARIZERS[name](s)
        value.backward()
        assert 0 <= value.item() < math.inf
        assert s.grad.isfinite().all()
        assert (s.grad[s == 0] == 0).all()  # what has become zero is left there


@pytest.mark.parametrize("decomposition", ["channel", "spatial"])
@pytest.mark.parametrize("regularizer", ["hoyer", "hoyer_square", "l1", "none"])
def test_the_penalty_and_its_gradients_by_finite_differences(regularizer, decomposition):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, (3, 2)), nn.Flatten(), nn.Linear(4, 2)).double()
    settings = {"regularizer": regularizer, "decomposition": decomposition, "orthogonality": 0.7, "sparsity": 0.3}
    method = svd_training(model, idle(model), **settings)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    expected = 0.0
    for layer in (model[0], model[2]):
        r = len(layer.s)
        gram_u, gram_v = layer.u.mT @ layer.u, layer.vh @ layer.vh.mT
        expected += 0.7 * sum(((gram - torch.eye(r)) ** 2).sum() / r**2 for gram in (gram_u, gram_v))
        expected += 0.3 * REGULARIZERS[regularizer](layer.s)
    assert method.penalty().item() == pytest.approx(expected.item(), rel=1e-12)

    parameters = [p for name, p in model.named_parameters() if "bias" not in name]
    gradients = torch.autograd.grad(method.penalty(), parameters, allow_unused=True)
    for p, gradient in zip(parameters, gradients, strict=True):
        gradient = torch.zeros_like(p) if gradient is None else gradient
        for i in range(p.numel()):
            at, steps = p.data.view(-1), []
            for h in (1e-6, -1e-6):
                at[i] += h
                steps.append(method.penalty().item())
                at[i] -= h
            assert (steps[0] - steps[1]) / 2e-6 == pytest.approx(float(gradient.view(-1)[i]), rel=1e-6, abs=1e-8)


def test_the_penalty_is_in_full_precision_under_autocast_and_for_half_weights():
    model = mlp([40, 30, 20])
    method = svd_training(model, idle(model), orthogonality=1.0, sparsity=0.0)
    for p in model.parameters():
        p.data += 1e-3
    expected = method.penalty()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method.penalty(), expected)
    assert method.penalty().dtype == torch.float32
    half = mlp([40, 30, 20], torch.bfloat16)
    assert svd_training(half, idle(half)).penalty().dtype == torch.float32


# --- where it begins -------------------------------------------------------------------------------------------------


def test_the_conversion_keeps_the_function_and_the_parameters():
    model = mlp([10, 16, 12, 8], torch.float64)
    x = torch.randn(5, 10, dtype=torch.float64)
    before, weights = model(x), [model[i].weight for i in (0, 2, 4)]
    optimizer = torch.optim.AdamW(
        [
            {"params": [model[0].weight, model[0].bias], "lr": 0.1},
            {"params": [*model[2].parameters()]},
            {"params": [*model[4].parameters()]},
        ]
    )
    method = SVDTraining(model, optimizer, sparsity=0.1, prune_at=9)
    assert (model(x) - before).abs().max() < 1e-12
    assert method.ranks == {"0": 10, "2": 12}
    assert "keep_last" in method.report["4"]
    assert [model[0].s is weights[0], model[2].s is weights[1], model[4].weight is weights[2]] == [True] * 3
    places = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert places == [[id(p) for p in model[i].parameters()] for i in (0, 2, 4)]
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not optimizer.state


def test_random_factors_have_the_size_of_the_weight_and_follow_from_it():
    model, again, other = (mlp([30, 40, 20], torch.float64, seed=seed) for seed in (0, 0, 1))
    norms = [layer.weight.norm().item() for layer in (model[0], model[2])]
    dense = matrices(model)
    state = torch.get_rng_state()
    for one in (model, again, other):
        svd_training(one, idle(one), init="random")
    assert torch.equal(torch.get_rng_state(), state)
    for layer, norm in zip((model[0], model[2]), norms, strict=True):
        assert layer.weight.norm().item() == pytest.approx(norm, rel=1e-12)
        assert (not_orthonormal(layer.u.mT) + not_orthonormal(layer.vh)).item() < 1e-28
        assert layer.s.std() > 0.5 * layer.s.square().mean().sqrt()
    assert torch.equal(model[0].u, again[0].u)
    assert not torch.equal(model[0].u, other[0].u)
    assert (
        abs((densify(model)[0].weight * dense["0"]).sum().item()) < 0.3 * norms[0] ** 2
    )  # it has nothing to do with it
    assert random_factors(torch.zeros(3, 2)).s.abs().sum() == 0


def test_a_model_that_is_factored_already_is_taken_as_it_is():
    model = mlp([8, 8, 8])
    svd_training(model, idle(model), include=["0"])
    parameters = list(model[0].parameters())
    optimizer = torch.optim.SGD([model[0].s, model[0].bias, *model[2].parameters()], lr=0.1)
    svd_training(model, optimizer)
    assert all(a is b for a, b in zip(model[0].parameters(), parameters, strict=True))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in model.parameters()]
    apart = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)  # each in a group of its own
    svd_training(model, apart)
    assert [len(group["params"]) for group in apart.param_groups] == [1] * 8


def test_a_copy_or_a_pickle_is_refused_since_it_would_lose_its_hooks():
    model = mlp([6, 6, 6])
    method = svd_training(model, idle(model))
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            attempt(method)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decomposition": "tucker"}, "decomposition must be 'channel' or 'spatial', found 'tucker'"),
        ({"regularizer": "l2"}, "regularizer must be .*'l1' or 'none', found 'l2'"),
        ({"init": "zeros"}, "init must be"),
        ({"orthogonality": -1.0}, "orthogonality must be a finite number of 0 or more, found -1.0"),
        ({"sparsity": math.inf}, "sparsity must be"),
        ({"energy": 1.0}, "energy must be a number of 0 or more and below 1, found 1.0"),
        ({"min_rank": 1.5}, "min_rank must be"),
        ({"max_aspect": 1.0}, "max_aspect must be"),
        ({"prune_at": 0.5}, "prune_at=0.5 is a fraction of the run, whose length is not known"),
        ({"prune_at": 0}, "regularize_at must come before prune_at, found 0 and 0"),
        ({"regularize_at": 5, "prune_at": 5}, "regularize_at must come before prune_at, found 5 and 5"),
        ({"exclude": ["head"]}, "the pattern 'head'"),
        ({"include": ["0"], "exclude": ["0"]}, "no layer that SVD training can convert"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    model = mlp([6, 6, 6])
    with pytest.raises(ValueError, match=message):
        svd_training(model, idle(model), **settings)
    assert type(model[0]) is nn.Linear


def test_optimisers_models_and_methods_that_cannot_work_are_refused():
    model = mlp([6, 6, 6])
    if hasattr(torch.optim, "Muon"):
        with pytest.raises(TypeError, match="Muon trains matrices only"):
            svd_training(model, torch.optim.Muon([model[0].weight, model[2].weight]))
    with pytest.raises(TypeError, match="LBFGS"):
        svd_training(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="does not hold"):
        svd_training(model, torch.optim.SGD([model[0].bias], lr=0.1))
    for init in ("svd", "random"):
        bad = mlp([6, 6, 6])
        bad[2].weight.data[0, 0] = math.nan
        with pytest.raises(ValueError, match="layer '2': a 6×6 matrix has entries that are not finite"):
            svd_training(bad, idle(bad), init=init)
        assert type(bad[0]) is nn.Linear
    optimizer = idle(model)
    svd_training(model, optimizer)
    with pytest.raises(ValueError, match="another method already trains"):
        svd_training(model, optimizer)
    with pytest.raises(ValueError, match="factors with trained bases"):
        OIALR(model, idle(model), delay=1, every=1, keep_last=False)
    factorize(other := mlp([6, 6, 6]))
    with pytest.raises(ValueError, match="factors with frozen bases"):
        svd_training(other, idle(other))


# --- the schedule ----------------------------------------------------------------------------------------------------


def test_the_stages_are_one_schedule():
    model = stack(with_spectrum([4, 2, 1, 0.1], 6, 4))
    optimizer = idle(model)
    method = svd_training(model, optimizer, regularize_at=0.2, prune_at=0.5, total_steps=10, sparsity=2.0, energy=0.001)
    assert (method.regularize_at, method.prune_at) == (2, 5)
    model[0].u.data *= 2  # ‖4I − I‖² / r²
    full, cut = 2 * (7.1 / math.sqrt(21.01) - 1), 9 / 4
    seen = []
    for _ in range(8):
        seen.append((method.stage, round(float(method.penalty()), 6), method.ranks["0"], method.checks))
        optimizer.step()
        method.step()
    assert seen[:2] == [("pre-training", cut, 4, 0)] * 2
    assert seen[2:5] == [("regularised", round(full + cut, 6), 4, 0)] * 3
    assert seen[5:] == [("fine-tuning", 9 / 3, 3, 1)] * 3
    assert method.failures == 0


def test_a_model_learns_and_its_ranks_fall():
    found = {}
    for sparsity in (0.0, 0.3):
        model = mlp([10, 16, 12, 8])
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        method = svd_training(model, optimizer, sparsity=sparsity, prune_at=60, energy=0.03)
        losses = []
        for step in range(120):
            x, y = batch(step, 10, 8)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            (loss + method.penalty()).backward()
            optimizer.step()
            method.step()
            losses.append(loss.item())
        assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
        errors = [
            float(not_orthonormal(m))
            for layer in (model[0], model[2], model[4])
            for m in (layer.u.mT.detach(), layer.vh.detach())
        ]
        assert max(errors) < 0.05
        found[sparsity] = method.ranks
    assert sum(found[0.3].values()) < 0.8 * sum(found[0.0].values())
    assert max(found[0.0].values()) > 8


# --- which directions stay -------------------------------------------------------------------------------------------

SPECTRA = {
    "ten equal": [0.1] * 10,
    "signs and order": [0.2, -3.0, 1.0, 0.0, -0.2, 2.0, 1e-3],
    "far apart": [1.0, 1e-5, 1e-12, 1e-30, 1e-200, 0.0],
    "one": [-2.0],
    "zeros": [0.0, 0.0, 0.0],
    "zeros, but one": [0.0, 1e-300, 0.0],
    "float32": torch.rand(8, generator=torch.Generator().manual_seed(0)).tolist(),
}
TINY = 1e-12


@pytest.mark.parametrize("energy", [0, 1e-300, TINY, 1e-6, 0.1, 0.3, 0.5, 0.9, 1 - TINY])
@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
def test_the_least_rank_whose_lost_energy_is_allowed(values, energy):
    e = Fraction(str(energy))
    kept = directions_kept(torch.tensor(values, dtype=torch.float64), e, 1)
    squares = [Fraction(v) ** 2 for v in values]
    total = sum(squares)
    assert sorted(set(kept)) == kept
    assert total - sum(squares[i] for i in kept) <= e * total
    for fewer in combinations(range(len(values)), len(kept) - 1):
        assert not fewer or total - sum(squares[i] for i in fewer) > e * total
    assert min((squares[i] for i in kept), default=0) >= max(
        (squares[i] for i in range(len(values)) if i not in kept), default=0
    )


def test_known_ranks():
    def rank(values, energy, least=1):
        return directions_kept(torch.tensor(values), Fraction(str(energy)), least)

    assert rank([0.1] * 10, 0.1) == list(range(9))  # exactly a tenth may go, and the last of equals goes
    assert rank([0.1] * 10, 0.0999) == list(range(10))
    assert rank([2.0, 0.0, 1.0], 0) == [0, 2]
    assert rank([0.0, 0.0, 0.0], 0) == [0]
    assert rank([2.0, 0.0, 1.0], 1 - TINY) == [0]
    assert rank([2.0, 0.0, 1.0, 0.5], 1 - TINY, least=3) == [0, 2, 3]
    assert rank([2.0, 1.0], 0.5, least=7) == [0, 1]


def test_no_rank_below_the_least():
    model = stack(with_spectrum([1, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3], 10, 10))
    optimizer = idle(model)
    method = svd_training(model, optimizer, prune_at=1, energy=0.5, min_rank=0.3)
    optimizer.step()
    method.step()
    assert method.ranks == {"0": 3}


def test_a_layer_that_is_not_finite_is_counted_and_left():
    model = mlp([6, 6, 6])
    optimizer = idle(model)
    method = svd_training(model, optimizer, prune_at=1, energy=0.5)
    model[0].s.data[2] = math.nan
    optimizer.step()
    method.step()
    assert method.ranks["0"] == 6 > method.ranks["2"]
    assert method.failures == 1


# --- moments ---------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "SGD nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "SGD plain": {"lr": 0.05},
    "Adam": {"lr": 0.01},
    "Adam amsgrad": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01, "foreach": False},
    "AdamW fused": {"lr": 0.01, "fused": True},
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
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def make(name, parameters):
    return getattr(torch.optim, name.split()[0])(parameters, **OPTIMIZERS[name])


def moments(optimizer, parameter):
    """What it keeps that is shaped like the parameter."""
    state = optimizer.state.get(parameter, {})
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and value.ndim > 0}


@every_optimizer
@pytest.mark.parametrize("trained", [0, 4])
def test_state_fits_and_training_goes_on(name, trained):
    model = mlp([10, 16, 12, 8], torch.float64)
    optimizer = make(name, model.parameters())
    for step in range(trained):
        train_step(model, optimizer, *batch(step, 10, 8, torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name == "Adafactor" else "error", LowRankWarning)
        method = svd_training(model, optimizer, prune_at=3, energy=0.2)
        for step in range(6):
            before = [p.detach().clone() for p in model.parameters()]
            train_step(model, optimizer, *batch(step, 10, 8, torch.float64))
            for (key, p), old in zip(model.named_parameters(), before, strict=True):
                assert p.isfinite().all()
                assert not torch.equal(p, old), key
                for value in moments(optimizer, p).values():
                    assert value.isfinite().all()
                    assert value.shape == p.shape or name == "Adafactor"
            method.step()
    assert method.ranks["0"] < 10


@every_optimizer
def test_where_nothing_was_trained_there_is_no_state(name):
    model = mlp([6, 6, 6])
    optimizer = make(name, model.parameters())
    svd_training(model, optimizer)
    for p in model.parameters():  # but Adagrad's sums of squares, which are there from the start
        assert {key: value.shape for key, value in moments(optimizer, p).items()} == (
            {"sum": p.shape} if name == "Adagrad" else {}
        )


@every_optimizer
def test_which_state_a_new_factor_takes_over(name):
    """State in the unit of a weight, an average of it or the size of its updates, cannot be shared out."""
    model = mlp([6, 9, 6], torch.float64)
    optimizer = make(name, model.parameters())
    train_step(model, optimizer, *batch(0, 6, 6, torch.float64))
    before = set(moments(optimizer, model[0].weight))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name == "Adafactor" else "error", LowRankWarning)
        svd_training(model, optimizer)
    taken = set() if name in ("ASGD", "Adadelta", "Rprop", "Adafactor") else before
    assert set(moments(optimizer, model[0].u)) == set(moments(optimizer, model[0].vh)) == taken
    assert set(moments(optimizer, model[0].s)) == (before if name != "Adafactor" else set())


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_moments_and_gradients_at_the_conversion_follow_the_chain_rule(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model = stack(weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    model[0].weight.grad = gradient.clone()
    optimizer.step()
    model[0].weight.grad = gradient.clone()
    svd_training(model, optimizer)
    layer = model[0]
    u, s, vh = (p.detach().clone().requires_grad_() for p in (layer.u, layer.s, layer.vh))
    of_u, of_s, of_vh = torch.autograd.grad(((u * s) @ vh * gradient).sum(), (u, s, vh))
    for p, expected in zip((layer.u, layer.s, layer.vh), (of_u, of_s, of_vh), strict=True):
        assert torch.allclose(p.grad, expected, atol=1e-12)
        assert torch.allclose(optimizer.state[p]["exp_avg"], 0.1 * expected, atol=1e-12)
        assert optimizer.state[p]["exp_avg_sq"].min() >= 0
        assert float(optimizer.state[p]["step"]) == 1
    square = 0.001 * gradient.square()
    assert (
        torch.allclose(optimizer.state[layer.u]["exp_avg_sq"], square @ (vh * s[:, None]).mT.square())
        or (optimizer.state[layer.u]["exp_avg_sq"] >= square @ (vh * s[:, None]).mT.square() - 1e-12).all()
    )  # scaled up where Adam's step would be longer than it was
    optimizer.step()
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}, "each has a count of its own"


@every_optimizer
def test_the_pruning_takes_the_same_entries_from_everything_to_the_bit(name):
    model = mlp([10, 16, 12, 8], torch.float64)
    optimizer = make(name, model.parameters())
    method = svd_training(model, optimizer, prune_at=4, energy=0.2)
    heard = []
    method.on_change(heard.append)
    for step in range(4):
        train_step(model, optimizer, *batch(step, 10, 8, torch.float64))
    before = {
        id(p): (p.detach().clone(), p.grad.clone(), copy.deepcopy(moments(optimizer, p))) for p in model.parameters()
    }
    kept = {n: directions_kept(site.factors.sigma, Fraction("0.2"), 1) for n, site in sites(model).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name == "Adafactor" else "error", LowRankWarning)
        method.step()
    assert [
        (c.name, c.parameter is p)
        for c, p in zip(heard, [p for n in "024" for p in sites(model)[n].factors], strict=True)
    ] == [(n, True) for n in "024" for _ in range(3)]
    for layer, site in sites(model).items():
        assert len(kept[layer]) == site.rank < min(site.shape)
        for p, dim in zip(site.factors, (1, 0, 0), strict=True):
            rows = torch.tensor(kept[layer])
            data, gradient, state = before[id(p)]
            assert torch.equal(p, data.index_select(dim, rows))
            assert torch.equal(p.grad, gradient.index_select(dim, rows))
            if name != "Adafactor":
                now = moments(optimizer, p)
                assert now.keys() == state.keys()
                assert all(torch.equal(now[key], state[key].index_select(dim, rows)) for key in now)


@pytest.mark.parametrize("name", ["SGD nesterov", "AdamW", "RMSprop centred", "Adagrad"])
def test_directions_without_effect_can_go_without_one(name):
    """Training goes on as if they were still there."""
    runs = []
    for prune_at in (5, NEVER):
        model = mlp([8, 12, 8], torch.float64)
        optimizer = make(name, model.parameters())
        method = SVDTraining(model, optimizer, prune_at=prune_at, energy=0, **PLAIN)
        for layer in (model[0], model[2]):
            for entries in (layer.u.data[:, 2:5], layer.s.data[2:5], layer.vh.data[2:5]):
                entries.zero_()
        for step in range(12):
            train_step(model, optimizer, *batch(step, 8, 8, torch.float64))
            method.step()
        runs.append((method.ranks, matrices_of(model)))
    assert (runs[0][0], runs[1][0]) == ({"0": 5, "2": 5}, {"0": 8, "2": 8})
    for one, other in zip(runs[0][1], runs[1][1], strict=True):
        assert (one - other).abs().max() < 1e-11


def matrices_of(model):
    return [layer.weight.detach() for layer in model if isinstance(layer, nn.Linear)]


def test_gradients_accumulated_before_the_pruning_count_after_it():
    model = mlp([8, 12, 8], torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = svd_training(model, optimizer, prune_at=1, energy=0.3)
    random_gradients(model, 0)
    optimizer.step()
    x, y = batch(0, 8, 8, torch.float64)
    nn.functional.cross_entropy(model(x[:16]), y[:16]).backward()
    kept = nn.functional.cross_entropy(model(x[16:]), y[16:])  # its graph is of the old shapes
    method.step()
    nn.functional.cross_entropy(model(x[16:]), y[16:]).backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    assert kept.grad_fn is not None


# --- averages --------------------------------------------------------------------------------------------------------


def test_an_average_of_the_weights_follows():
    model = mlp([8, 12, 8], torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    method = svd_training(model, optimizer, prune_at=5, energy=0.1)
    ema = EMA(model, 0.8)
    method.on_change(ema.follow)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(9):
        train_step(model, optimizer, *batch(step, 8, 8, torch.float64))
        kept = {name: directions_kept(site.factors.sigma, Fraction("0.1"), 1) for name, site in sites(model).items()}
        method.step()
        for name, p in model.named_parameters():
            layer, _, what = name.partition(".")
            if step == 4 and what != "bias":
                expected[name] = expected[name].index_select(1 if what == "u" else 0, torch.tensor(kept[layer]))
            expected[name] = 0.8 * expected[name] + 0.2 * p.detach()
        ema.update()
    averages = ema.state_dict()["averages"]
    assert averages.keys() == expected.keys()
    assert all(torch.allclose(averages[name], expected[name], atol=1e-13) for name in averages)
    assert method.ranks["0"] < 8


# --- resuming --------------------------------------------------------------------------------------------------------

STEPS, STOPS = 14, [0, 1, 3, 5, 6, 9, 10, 13]  # regularised from 3, pruned after 9


class Run:
    """Everything that trains, as a fresh process would make it."""

    def __init__(self, decomposition="channel", optimizer="Adam", seed=0):
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Unflatten(1, (2, 2, 4)),
            nn.Conv2d(2, 6, (2, 3), padding=1),
            nn.Flatten(),
            nn.Tanh(),
            nn.Linear(72, 16),
            nn.Linear(16, 8),
        )
        self.optimizer = make(optimizer, self.model.parameters())
        settings = {"regularize_at": 3, "prune_at": 9, "energy": 0.1}
        self.method = SVDTraining(self.model, self.optimizer, sparsity=0.02, decomposition=decomposition, **settings)
        self.ema = EMA(self.model, 0.9)
        self.method.on_change(self.ema.follow)

    def train(self, first, last):
        for step in range(first, last):
            x, y = batch(step, 16, 8)
            self.optimizer.zero_grad()
            (nn.functional.cross_entropy(self.model(x), y) + self.method.penalty()).backward()
            self.optimizer.step()
            self.method.step()
            self.ema.update()
        return self

    def state(self):
        parts = (self.method, self.model, self.optimizer, self.ema)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in parts], file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, state):
        for part, saved in zip((self.method, self.model, self.optimizer, self.ema), state, strict=True):
            part.load_state_dict(saved)
            assert self.method.ranks == state[0]["ranks"]
        return self


def assert_same(one, other, path=""):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, (dict, list)):
        assert len(one) == len(other), path
        for key in one if isinstance(one, dict) else range(len(one)):
            assert_same(one[key], other[key], f"{path}/{key}")
    else:
        assert one == other, path


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
@pytest.mark.parametrize("decomposition", ["channel", "spatial"])
def test_a_run_that_was_stopped_anywhere_goes_on_to_the_same_bits(decomposition, optimizer):
    whole = Run(decomposition, optimizer).train(0, STEPS)
    assert whole.method.stage == "fine-tuning"
    assert sum(whole.method.ranks.values()) < 22
    for stop in STOPS:
        saved = Run(decomposition, optimizer).train(0, stop).state()
        resumed = Run(decomposition, optimizer, seed=99).load(saved)
        assert_same(resumed.state(), saved)
        assert_same(resumed.train(stop, STEPS).state(), whole.state())
    whole.load(saved := Run(decomposition, optimizer).train(0, 4).state())  # back in place, with the ranks of then
    assert_same(whole.state(), saved)
    assert_same(whole.train(4, STEPS).state(), Run(decomposition, optimizer).train(0, STEPS).state())


def test_the_state_of_another_model_is_refused():
    model, other = mlp([8, 8, 8]), mlp([8, 8, 6, 8])
    method, saved = svd_training(model, idle(model)), svd_training(other, idle(other)).state_dict()
    with pytest.raises(ValueError, match="another model or other settings: layers 4 differ"):
        method.load_state_dict(saved)


def test_a_longer_run_is_not_pruned_twice():
    states, runs = [], []
    for total in (10, 40):
        model = mlp([8, 8, 8])
        optimizer = idle(model)
        method = svd_training(model, optimizer, prune_at=0.5, energy=0.2, total_steps=total)
        runs.append((model, optimizer, method))
        if total == 10:
            for _ in range(6):
                optimizer.step()
                method.step()
            states = [model.state_dict(), method.state_dict()]
    model, optimizer, method = runs[1]
    method.load_state_dict(states[1])
    model.load_state_dict(states[0])
    ranks = method.ranks
    assert (method.stage, method.prune_at) == ("fine-tuning", 20)
    for _ in range(20):
        optimizer.step()
        method.step()
    assert method.ranks == ranks
    assert method.checks == 0


# --- beside OIALR ----------------------------------------------------------------------------------------------------


def test_two_methods_may_train_different_layers():
    model = mlp([10, 16, 12, 8])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    oialr = OIALR(model, optimizer, delay=2, every=2, cutoff=0.3, layer_fraction=1, include=["0"], keep_last=False)
    method = svd_training(model, optimizer, prune_at=5, energy=0.1, exclude=["0"])
    for step in range(8):
        x, y = batch(step, 10, 8)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x), y) + method.penalty()).backward()
        optimizer.step()
        oialr.step()
        method.step()
    assert oialr.ranks.keys() == {"0"}
    assert method.ranks.keys() == {"2", "4"}
    assert method.ranks["2"] < 12
    assert model[0].sigma.ndim == 2
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [
        id(p) for p in model.parameters() if p.requires_grad
    ]
    fresh = mlp([10, 16, 12, 8], seed=1)
    load_state_dict(fresh, model.state_dict())
    assert torch.equal(fresh(x), model(x))
