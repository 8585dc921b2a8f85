"""Truncation, fixed rank and Cuttlefish: when, at which rank, with which penalty; resumed to the bit."""

import copy
import io
import math
import pickle
from fractions import Fraction

import pytest
import torch
from small_runs import batch, frobenius, idle, matrices, mlp, stack, train_step, with_spectrum
from torch import nn

from hpclr import EMA, OIALR, Cuttlefish, FixedRank, Nested, SVDTraining, Truncate, densify, factorize
from hpclr.lowrank import select
from hpclr.lowrank.activations import input_moments
from hpclr.lowrank.factors import stable_rank
from hpclr.lowrank.ranks import Energy
from hpclr.lowrank.regression import nearest_in, order_by_output
from hpclr.methods.random_start import random_product
from hpclr.methods.regularizers import squared_norm
from hpclr.methods.trend import Trend
from hpclr.methods.two_factors import share_of_side

NEVER = 10**6
METHODS = {
    "truncate": lambda model, optimizer, **s: Truncate(model, optimizer, **({"at": 3, "rank": 0.5} | s)),
    "fixed_rank": lambda model, optimizer, **s: FixedRank(model, optimizer, **({"rank": 0.5} | s)),
    "cuttlefish": lambda model, optimizer, **s: Cuttlefish(
        model, optimizer, **({"every": 1, "delay": 3, "window": 3} | s)
    ),
    "nested": lambda model, optimizer, **s: Nested(model, optimizer, **({"delay": 0, "fractions": (0.5, 0.25)} | s)),
}
VARIANTS = METHODS | {"truncate by outputs": lambda *args, **s: METHODS["truncate"](*args, order="output", **s)}
every_method = pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)


def steps(model, optimizer, method, count, dtype=torch.float32, first=0):
    """Trains, with the penalty; the model is an mlp of 10 features and 8 classes."""
    for step in range(first, first + count):
        x, y = batch(step, 10, 8, dtype)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x), y) + method.penalty()).backward()
        optimizer.step()
        method.step()


def lower_stable_ranks(model):
    """Since the start, as far as Cuttlefish sees, which would factor nothing otherwise."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.weight.data[:] += 0.5


def held(optimizer):
    return [id(p) for group in optimizer.param_groups for p in group["params"]]


def leading(weight, k):
    """Its best approximation of rank k."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :k] @ torch.diag(s[:k]) @ vh[:k]


# --- truncation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0.5, {"rule": "energy", "share": 0.9}])
def test_truncation_by_outputs_leaves_the_nearest_in_outputs(rank):
    """At a share, and by a rule, which then judges by outputs."""
    model = mlp([10, 16, 12, 8], torch.float64)
    optimizer = idle(model)
    method = Truncate(model, optimizer, at=2, rank=rank, order="output")
    for step in range(2):
        x = batch(step, 10, 8, torch.float64)[0] * torch.logspace(0, -2, 10).double()
        model(x).sum().backward()
        optimizer.step()
        before, moments = matrices(model), input_moments(model, select(model).eligible, [x])
        method.step()
    assert len(method.report) < len(before) == 3
    for site in (site for site in select(model).eligible if site.is_lowrank):
        name = site.name
        order = order_by_output(before[name], moments[name])
        k = share_of_side(0.5, site.shape) if rank == 0.5 else Energy(0.9)(order.s, site.shape)
        assert site.rank == k
        expected = nearest_in(before[name], moments[name], k)
        assert frobenius(matrices(densify(copy.deepcopy(model)))[name] - expected) < 1e-9 * frobenius(expected)


def test_truncation_by_outputs_does_not_go_with_noise():
    model = mlp([10, 16, 8])
    with pytest.raises(ValueError, match="rule for noise in weights"):
        Truncate(model, idle(model), at=2, rank={"rule": "gavish_donoho"}, order="output")


def test_at_its_step_every_weight_becomes_its_best_approximation():
    model = mlp([10, 16, 12, 8], torch.float64)
    optimizer = idle(model)
    method = Truncate(model, optimizer, at=0.3, rank=0.55, total_steps=10, keep_last=False)
    dense = matrices(model)
    seen = []
    for _ in range(5):
        seen.append((method.ranks, method.converted, method.checks))
        steps(model, optimizer, method, 1, torch.float64)
    full, cut = {"0": 10, "2": 12, "4": 8}, {"0": 6, "2": 7, "4": 5}  # ⌈5.5⌉, ⌈6.6⌉, ⌈4.4⌉
    assert seen == [(full, False, 0)] * 3 + [(cut, True, 1)] * 2
    for name, weight in dense.items():
        found = model[int(name)].weight.detach()
        assert (found - leading(weight, cut[name])).abs().max() < 1e-13
    assert method.failures == 0
    assert float(method.penalty()) == 0


def test_ranks_by_shares_and_rules():
    for rank, least, expected in (
        (0.4, 0.0, 4),
        (0.29, 0.0, 3),
        (1, 0.0, 10),
        (1e-9, 0.0, 1),
        (Energy(0.8), 0.0, 2),
        ({"rule": "energy", "share": 0.8}, 0.0, 2),
        ({"rule": "relative", "cutoff": 0.4}, 0.5, 5),
    ):
        model = stack(with_spectrum([4, 3, 1, 1, 1, 1, 1, 0.5, 0.1, 0.1], 10, 12))
        method = Truncate(model, idle(model), at=0, rank=rank, min_rank=least, keep_last=False)
        assert method.ranks == {"0": expected}
    exact = mlp([100, 100])
    assert Truncate(exact, idle(exact), at=0, rank=0.55, keep_last=False).ranks == {"0": 55}


def test_after_it_the_momentum_goes_on():
    """One step of SGD with momentum from A and B, against the step written out."""
    model = mlp([10, 12, 8], torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = Truncate(model, optimizer, at=2, rank=0.5, exclude=["2"])
    steps(model, optimizer, method, 1, torch.float64)
    steps(model, optimizer, copy_without_step(method), 1, torch.float64, first=1)
    weight, momentum = (t.detach().clone() for t in (model[0].weight, momentum_of(optimizer, model[0].weight)))
    method.step()
    a, b = model[0].u.detach().clone(), model[0].vh.detach().clone()
    assert (a @ b - leading(weight, 5)).abs().max() < 1e-13
    optimizer.zero_grad()
    x, y = batch(2, 10, 8, torch.float64)
    nn.functional.cross_entropy(model(x), y).backward()
    gradient = model[0].u.grad.clone()
    optimizer.step()
    assert torch.allclose(model[0].u, a - 0.1 * (0.9 * momentum @ b.mT + gradient), atol=1e-14)


def copy_without_step(method):
    """The penalty of a method whose turn does not come."""

    class Idle:
        penalty = staticmethod(method.penalty)
        step = staticmethod(lambda: None)

    return Idle


def momentum_of(optimizer, parameter):
    return optimizer.state[parameter]["momentum_buffer"]


def test_a_weight_that_is_not_finite_stays_dense_later_and_is_refused_at_first():
    model = mlp([6, 6, 6])
    optimizer = idle(model)
    method = Truncate(model, optimizer, at=1, rank=0.5, keep_last=False)
    model[0].weight.data[0, 0] = math.nan
    optimizer.step()
    method.step()
    assert (method.ranks, method.failures) == ({"0": 6, "2": 3}, 1)
    assert "not finite" in method.report["0"]
    method.step()
    assert (method.failures, method.checks) == (1, 1)
    for make in METHODS.values():
        bad = mlp([6, 6, 6])
        bad[2].weight.data[0, 0] = math.inf
        with pytest.raises(ValueError, match="layer '2': a 6×6 matrix has entries that are not finite"):
            make(bad, idle(bad), keep_last=False, **({"at": 0} if make is METHODS["truncate"] else {}))
        assert type(bad[0]) is nn.Linear


# --- fixed rank ------------------------------------------------------------------------------------------------------


def test_the_spectral_start_is_the_truncated_weight():
    model = mlp([10, 16, 12, 8], torch.float64)
    dense = matrices(model)
    method = FixedRank(model, torch.optim.SGD(model.parameters(), lr=0.1), rank=0.3)
    assert method.ranks == {"0": 3, "2": 4}
    assert "keep_last" in method.report["4"]
    for name, k in method.ranks.items():
        layer = model[int(name)]
        assert (layer.u @ layer.vh - leading(dense[name], k)).abs().max() < 1e-14
        assert torch.allclose(layer.u.mT @ layer.u, layer.vh @ layer.vh.mT, atol=1e-14)


def test_the_random_start_has_the_size_of_the_weight_and_follows_from_it():
    models = [mlp([30, 40, 20], torch.float64, seed=seed) for seed in (0, 0, 1)]
    weights = matrices(models[0])
    state = torch.get_rng_state()
    for model in models:
        FixedRank(model, idle(model), rank=0.5, init="random", keep_last=False)
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in weights.items():
        one, same, other = (model[int(name)] for model in models)
        assert frobenius(one.u @ one.vh) == pytest.approx(frobenius(weight), rel=1e-12)
        assert frobenius(one.u) == pytest.approx(frobenius(one.vh), rel=0.3)  # neither outweighs the other
        assert torch.equal(one.u, same.u)
        assert not torch.equal(one.u, other.u)
        assert abs(float((one.weight * weight).sum())) < 0.3 * frobenius(weight) ** 2
    zeros = random_product(torch.zeros(4, 6), 2)
    assert zeros.s.abs().sum() == 0 < zeros.vh.abs().min()
    assert random_product(torch.ones(4, 6, dtype=torch.bfloat16), 3).u.dtype == torch.float32


# --- Frobenius decay -------------------------------------------------------------------------------------------------


def test_the_penalty_is_the_norm_of_the_products_and_has_its_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, (3, 2)), nn.Flatten(), nn.Linear(24, 10), nn.Linear(10, 4)).double()
    method = FixedRank(model, idle(model), rank=0.5, frobenius_decay=0.3)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    factors = [p for layer in (model[0], model[2]) for p in (layer.u, layer.vh)]
    literal = sum(0.3 / 2 * (layer.u @ layer.s.diag() @ layer.vh).square().sum() for layer in (model[0], model[2]))
    found = method.penalty()
    assert found.item() == pytest.approx(literal.item(), rel=1e-12)
    for one, other in zip(torch.autograd.grad(found, factors), torch.autograd.grad(literal, factors), strict=True):
        assert torch.allclose(one, other, rtol=1e-12)
    a, b = torch.randn(5, 2), torch.randn(2, 9)
    assert squared_norm(a, b).item() == pytest.approx((a @ b).square().sum().item(), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method.penalty(), found)
    half = mlp([40, 30, 20], torch.bfloat16)
    assert FixedRank(half, idle(half), rank=0.5, frobenius_decay=0.1).penalty().dtype == torch.float32


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("decay", [None, 0.0, 0.4])
def test_weight_decay_acts_on_the_factors_once_or_not_at_all(name, decay):
    """With gradients of zero, decay is all that happens."""
    model = mlp([10, 12, 8], torch.float64)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1, weight_decay=0.5)
    method = FixedRank(model, optimizer, rank=0.5, frobenius_decay=decay)
    a, b, rest = model[0].u.detach().clone(), model[0].vh.detach().clone(), model[2].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    if name == "SGD" and decay:
        method.penalty().backward()
    optimizer.step()
    expected = {None: a * (1 - 0.1 * 0.5), 0.0: a, 0.4: a - 0.1 * 0.4 * a @ b @ b.mT if name == "SGD" else a}[decay]
    assert torch.allclose(model[0].u, expected, atol=1e-14)
    assert torch.allclose(model[2].weight, rest * (1 - 0.1 * 0.5), atol=1e-14)  # that of all others goes on


def test_groups_and_schedules_are_left_as_they_are():
    model = mlp([10, 16, 12, 8])
    groups = [{"params": [*model[0].parameters()], "lr": 0.1}, {"params": [*model[2:].parameters()]}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)  # which refuses other groups than these
    method = Cuttlefish(
        model, optimizer, every=2, delay=4, window=2, frobenius_decay=1e-3, keep_last=False, min_rank=0.2
    )
    lower_stable_ranks(model)
    seen = []
    optimizer.register_step_pre_hook(lambda opt, *_: seen.append([len(g["params"]) for g in opt.param_groups]))
    for _ in range(6):
        steps(model, optimizer, method, 1)
        schedule.step()
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1]
        trained = [id(p) for p in model.parameters() if p.requires_grad]
        assert held(optimizer) == trained
        assert [len(g["params"]) for g in optimizer.state_dict()["param_groups"]] == [
            len(g["params"]) for g in optimizer.param_groups
        ]
    assert seen == [[2, 4]] * 4 + [[1, 2, 2, 4]] * 2
    assert optimizer.param_groups[0]["lr"] < 0.1


def test_two_methods_without_weight_decay_and_a_step_that_fails():
    model = mlp([10, 16, 12, 8])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    settings = {"rank": 0.5, "frobenius_decay": 0.0, "keep_last": False}
    methods = [FixedRank(model, optimizer, include=[name], **settings) for name in ("0", "4")]
    places, rates = held(optimizer), []

    def fail(*_):
        raise InterruptedError

    for fails in (False, True, False):
        handle = optimizer.register_step_pre_hook(fail) if fails else None
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        if handle is not None:
            with pytest.raises(InterruptedError):
                optimizer.step()
            handle.remove()
            optimizer.param_groups[0]["lr"] = 0.2
            optimizer.register_step_pre_hook(lambda opt, *_: rates.append([g["lr"] for g in opt.param_groups]))
            continue
        optimizer.step()
        assert held(optimizer) == places
        assert len(optimizer.param_groups) == 1
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {"0.bias", "2.weight", "2.bias", "4.bias"}
    assert rates == [[0.2] * 3]
    assert [method.ranks for method in methods] == [{"0": 5}, {"4": 4}]


def test_the_state_after_a_step_that_failed_can_be_saved_and_loaded():
    model = mlp([10, 12, 8])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    method = FixedRank(model, optimizer, rank=0.5, frobenius_decay=0.1)
    steps(model, optimizer, method, 1)
    good, places = copy.deepcopy(optimizer.state_dict()), held(optimizer)

    def fail(*_):
        raise InterruptedError

    for use in (optimizer.state_dict, lambda: optimizer.load_state_dict(good)):
        handle = optimizer.register_step_pre_hook(fail)
        with pytest.raises(InterruptedError):
            optimizer.step()
        handle.remove()
        saved = use() or good
        assert_same(saved["param_groups"], good["param_groups"])
        assert held(optimizer) == places
    steps(model, optimizer, method, 1)
    assert method.steps == 2


def test_a_compiled_step_is_the_same_step():
    ends = []
    for compiled in (False, True):
        model = mlp([10, 12, 8], torch.float64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        method = FixedRank(model, optimizer, rank=0.5, frobenius_decay=0.1)
        step = torch.compile(lambda o=optimizer: o.step(), backend="eager") if compiled else optimizer.step
        for i in range(3):
            optimizer.zero_grad()
            x, y = batch(i, 10, 8, torch.float64)
            (nn.functional.cross_entropy(model(x), y) + method.penalty()).backward()
            step()
        assert (method.steps, len(optimizer.param_groups)) == (3, 1)
        ends.append([p.detach() for p in model.parameters()])
    for plain, other in zip(*ends, strict=True):
        assert torch.allclose(plain, other, rtol=0, atol=1e-4)  # torch's compiled AdamW alone differs by 1e-6


# --- Cuttlefish ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "window", "flatness", "flat_at"),
    [
        ([5.0] * 6, 3, 0.0, 3),
        ([5.0, 5.3, 5.0, 5.3, 5.0, 5.3], 3, 0.1, 4),  # slopes of 0.15, −0.075, 0.1125, −0.094
        ([5.0, 6.0, 5.0, 6.0, 5.0, 6.0], 3, 0.1, None),
        ([float(i) for i in range(12)], 3, 0.5, None),
        ([float(i) for i in range(12)], 3, 1.0, 3),  # of a line the smoothed slope comes near its own
        ([16 * 0.7**i for i in range(20)], 2, 0.1, 14),
        ([5.0] * 3, 3, 0.1, None),  # not yet as many slopes
        ([5.0, 5.0, 5.0, 9.0, 1.0, 9.0], 2, 0.1, 2),  # what has been flat stays so
    ],
)
def test_when_a_trend_is_flat(values, window, flatness, flat_at):
    trend = Trend(values[0])
    smoothed = values[0]
    for i, value in enumerate(values[1:], start=1):
        trend.add(value, window, flatness)
        smoothed += 2 / (window + 1) * (value - smoothed)
        assert trend.smoothed == pytest.approx(smoothed)
        assert trend.flat == (flat_at is not None and i >= flat_at), i


def moving(values, m=12, n=10):
    """Weights of these stable ranks: as many equal singular values, and one for what is left."""
    return [with_spectrum([1.0] * int(v) + ([math.sqrt(v % 1)] if v % 1 else []), m, n, seed=5) for v in values]


def course(values, **settings):
    """Cuttlefish on one layer with this history of stable ranks, measured after each step; the step of conversion."""
    weights = moving(values)
    model = stack(weights[0])
    optimizer = idle(model)
    method = Cuttlefish(model, optimizer, **({"every": 1, "delay": NEVER, "keep_last": False} | settings))
    for step, weight in enumerate(weights[1:], start=1):
        model[0].weight.data.copy_(weight)
        optimizer.step()
        method.step()
        if method.converted:
            return step, method
        assert method.stable_ranks["0"] <= max(values)
    return None, method


def test_flat_stable_ranks_switch_and_others_wait_for_the_delay():
    flat, falling = [8.0, 6.0, 5.0, *[4.0] * 12], [10 - 0.5 * i for i in range(15)]
    found, method = course(flat, window=4)
    assert 6 < found < 14
    assert method.flat == {"0": True}
    assert method.ranks == {"0": 5}  # ⌈4 · 10/8⌉
    found, method = course(falling, window=4)
    assert (found, method.flat, method.ranks) == (None, {"0": False}, {"0": 10})
    assert course(falling, window=4, delay=9)[0] == 9
    assert course(falling, window=4, flatness=0.6)[0] == 4
    assert course(falling, window=4.0, flatness=0.6)[0] == 4
    assert course(flat, window=4, every=3)[0] is None or course(flat, window=4, every=3)[0] % 3 == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"every": 5, "delay": 50}, "window·every is 15·5 = 75 steps, but delay 50: only 10 of the 15 measurements"),
        ({"every": 0.05, "delay": 0.5, "total_steps": 200}, "15·10 = 150 steps, but delay 100: only 10"),
        (
            {"every": 0.02, "delay": 0.5, "total_steps": 10},
            "15·1 = 15 steps, but delay 5: only 5 of .* raise delay to 15",
        ),
        ({"every": 4, "delay": 11, "window": 3}, "only 2 of the 3 measurements"),
        ({"every": 1, "delay": 0, "window": 1}, "only 0 of the 1"),
    ],
)
def test_a_delay_before_any_layer_could_be_flat_is_refused(settings, said):
    model = mlp([8, 8, 8])
    with pytest.raises(ValueError, match=said):
        Cuttlefish(model, idle(model), **settings)
    assert type(model[0]) is nn.Linear
    enough = {"window": 2, "every": 4, "delay": 8}
    assert not Cuttlefish(model, idle(model), **enough).converted


def test_the_rank_is_the_stable_rank_in_units_of_that_at_the_start():
    at_once = {"delay": 1, "window": 1}
    for first, now, expected in ((10.0, 3.0, 3), (5.0, 1.0, 2), (8.0, 2.5, 4), (2.0, 1.0, 5)):
        _, method = course([first, now], **at_once)
        assert method.ranks == {"0": expected}, (first, now)
    _, method = course([10.0, 2.0], min_rank=0.35, **at_once)
    assert method.ranks == {"0": 4}
    _, method = course([2.0, 8.0], **at_once)  # the ranks would be above the full one, which saves nothing
    assert method.ranks == {"0": 10}
    assert method.report["0"] == "factors of rank 10 would save nothing"


def test_all_layers_must_be_flat_and_stay_so_counted():
    flat, falling = [4.0] * 6, [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]
    columns = [moving(flat), moving(falling)]
    model = stack(columns[0][0], columns[1][0].mT.contiguous())
    optimizer = idle(model)
    method = Cuttlefish(model, optimizer, every=1, delay=NEVER, window=2, keep_last=False)
    for step in range(1, 6):
        model[0].weight.data.copy_(columns[0][step] if step < 4 else columns[1][1])  # moves again after it was flat
        model[2 - 1].weight.data.copy_(columns[1][step].mT)
        optimizer.step()
        method.step()
        assert method.flat == {"0": step >= 2, "1": False}
    assert not method.converted
    assert method.checks == 5


def test_what_would_save_nothing_stays_dense_by_its_shape_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 8))
    for i in (0, 1, 3):
        weight = model[i].weight.data
        rank = 3
        u, v = torch.linalg.qr(torch.randn(8, rank)).Q, torch.linalg.qr(torch.randn(weight.numel() // 8, rank)).Q
        weight.copy_((u @ v.mT).reshape(weight.shape))
    optimizer = idle(model)
    method = Cuttlefish(model, optimizer, every=1, delay=1, window=1, keep_last=False)
    optimizer.step()
    method.step()
    assert method.converted
    # scaled stable ranks are full ranks as at the start: nothing saves
    assert method.ranks == {"0": 8, "1": 8, "3": 8}
    assert set(method.report) >= {"0", "1", "3"}


def test_a_weight_that_began_at_zero_has_its_stable_rank():
    model = stack(torch.zeros(12, 10, dtype=torch.float64), with_spectrum([1.0] * 8, 8, 12))
    optimizer = idle(model)
    method = Cuttlefish(model, optimizer, every=1, delay=1, window=1, keep_last=False)
    model[0].weight.data.copy_(with_spectrum([1.0, 1.0, 1.0], 12, 10))
    optimizer.step()
    method.step()
    assert method.ranks["0"] == 3


def test_it_goes_with_real_training():
    model = mlp([10, 16, 12, 8])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    method = Cuttlefish(model, optimizer, every=5, delay=90, window=4, frobenius_decay=1e-3)
    first = {name: stable_rank(weight.float()) for name, weight in matrices(model).items()}
    assert {name: rank for name, rank in first.items() if name != "4"} == pytest.approx(method.stable_ranks)
    losses = []
    for step in range(120):
        steps(model, optimizer, method, 1, first=step)
        x, y = batch(step, 10, 8)
        losses.append(nn.functional.cross_entropy(model(x), y).item())
    assert method.converted
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert all(p.isfinite().all() for p in model.parameters())


# --- what they have in common ----------------------------------------------------------------------------------------


@every_method
def test_settings_models_and_optimisers_that_cannot_work_are_refused(make):
    model = mlp([6, 6, 6])
    for settings, message in (
        ({"max_aspect": 1.0}, "max_aspect must be a number above 1, found 1.0"),
        ({"exclude": ["head"]}, "the pattern 'head'"),
        ({"include": ["0"], "exclude": ["0"]}, "no layer that .* can convert"),
    ):
        with pytest.raises(ValueError, match=message):
            make(model, idle(model), **settings)
    with pytest.raises(ValueError, match="does not hold"):
        make(model, torch.optim.SGD([model[0].bias], lr=0.1))
    with pytest.raises(TypeError, match="LBFGS"):
        make(model, torch.optim.LBFGS(model.parameters()))
    assert type(model[0]) is nn.Linear
    optimizer = idle(model)
    method = make(model, optimizer)
    with pytest.raises(ValueError, match=r"another method already trains|held as factors already"):
        make(model, optimizer)
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            attempt(method)
    factored = mlp([6, 6, 6])
    SVDTraining(factored, idle(factored), sparsity=0.1, prune_at=9)
    with pytest.raises(ValueError, match="layer '0' is held as factors already; make the model dense first"):
        make(factored, idle(factored))
    factorize(other := mlp([6, 6, 6]))
    with pytest.raises(ValueError, match="factors with frozen bases"):
        make(other, idle(other))
    assert make(densify(other), idle(other)).ranks["0"] > 0


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (
            Truncate,
            {"at": 3, "rank": 0},
            r"rank must be a share of the smaller side in \(0, 1\] or a rank rule, found 0",
        ),
        (Truncate, {"at": 3, "rank": 1.5}, "rank must be a share .* found 1.5"),
        (Truncate, {"at": 3, "rank": {"rule": "best"}}, "Unknown rank rule 'best'"),
        (Truncate, {"at": 0.5, "rank": 0.5}, "at=0.5 is a fraction of the run, whose length is not known"),
        (Truncate, {"at": 3, "rank": 0.5, "min_rank": 2}, r"min_rank must be a number in \[0, 1\], found 2"),
        (FixedRank, {"rank": 0.0}, r"rank must be a share of the smaller side in \(0, 1\], found 0.0"),
        (FixedRank, {"rank": 0.5, "init": "zeros"}, "init must be 'spectral' or 'random', found 'zeros'"),
        (FixedRank, {"rank": 0.5, "frobenius_decay": -1.0}, "frobenius_decay must be a finite number of 0 or more"),
        (Cuttlefish, {"every": 0, "delay": 3}, "every must be a number above 0, found 0"),
        (Cuttlefish, {"every": 1, "delay": 3, "window": 0}, "window must be a whole number of measurements"),
        (Cuttlefish, {"every": 1, "delay": 3, "flatness": math.inf}, "flatness must be"),
        (Cuttlefish, {"every": 1, "delay": 3, "frobenius_decay": math.nan}, "frobenius_decay must be"),
        (Cuttlefish, {"every": 1, "delay": 2.5}, "delay must be a whole number of steps or a fraction"),
        *(
            (make, settings | {name: wrong}, f"^{name} must be .*{said}.* found {wrong!r}")
            for make, settings, name, said in (
                (Truncate, {"at": 3}, "rank", r"a share of the smaller side in \(0, 1\] or a rank rule"),
                (Truncate, {"rank": 0.5}, "at", "a whole number of steps or a fraction"),
                (FixedRank, {}, "rank", r"a share of the smaller side in \(0, 1\]"),
                (FixedRank, {"rank": 0.5}, "frobenius_decay", "a finite number of 0 or more"),
                (FixedRank, {"rank": 0.5}, "max_aspect", "a number above 1"),
                (Cuttlefish, {"delay": 3}, "every", "a number above 0"),
                (Cuttlefish, {"every": 1, "delay": 3}, "window", "a whole number"),
                (Cuttlefish, {"every": 1, "delay": 3}, "flatness", "a finite number"),
                (Cuttlefish, {"every": 1, "delay": 3}, "min_rank", "a number in"),
            )
            for wrong in ("half", True)
        ),
    ],
)
def test_values_out_of_range_are_refused(method, settings, message):
    model = mlp([6, 6, 6])
    with pytest.raises(ValueError, match=message):
        method(model, idle(model), **settings)
    assert type(model[0]) is nn.Linear


OPTIMIZERS = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01, "fused": True},
    "RMSprop": {"lr": 0.01, "centered": True},
    "Adagrad": {"lr": 0.01},
    "Adamax": {"lr": 0.01},
    "Adadelta": {},
    "Rprop": {"lr": 0.01},
    "ASGD": {"lr": 0.01, "t0": 2},
    "Muon": {"lr": 0.01},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@every_method
def test_every_trained_parameter_moves_under_every_optimiser(make, name):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    model = mlp([10, 16, 12, 8], torch.float64)
    if name == "Muon":
        model = nn.Sequential(*(nn.Linear(n, m, bias=False).double() for n, m in ((10, 16), (16, 12), (12, 8))))
    optimizer = getattr(torch.optim, name)(model.parameters(), **OPTIMIZERS[name])
    method = make(model, optimizer)
    if not method.converted:
        lower_stable_ranks(model)
    for step in range(6):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train_step(model, optimizer, *batch(step, 10, 8, torch.float64))
        for key, p in model.named_parameters():
            assert p.isfinite().all()
            assert torch.equal(p, before[key]) == key.endswith(".s"), key
        method.step()
        assert held(optimizer) == [id(p) for p in model.parameters() if p.requires_grad]
    assert type(model[0]) is not nn.Linear


@every_method
def test_gradients_accumulated_before_the_conversion_count_after_it(make):
    model = mlp([10, 12, 8], torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = make(model, optimizer)
    train_step(model, optimizer, *batch(0, 10, 8, torch.float64))
    method._counter.taken = 3
    x, y = batch(1, 10, 8, torch.float64)
    nn.functional.cross_entropy(model(x), y).backward()
    method.step()
    assert method.converted
    nn.functional.cross_entropy(model(x), y).backward()
    assert all(p.grad.shape == p.shape for p in model.parameters() if p.requires_grad)


def test_two_methods_may_train_different_layers():
    model = mlp([10, 16, 12, 8])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    oialr = OIALR(model, optimizer, delay=2, every=2, cutoff=0.3, layer_fraction=1, include=["0"], keep_last=False)
    method = Truncate(model, optimizer, at=3, rank=0.25, exclude=["0"], keep_last=False)
    for step in range(6):
        steps(model, optimizer, method, 1, first=step)
        oialr.step()
    assert oialr.ranks.keys() == {"0"}
    assert method.ranks == {"2": 3, "4": 2}


def test_what_is_made_dense_again_is_trained_as_its_factors_were():
    for name, make in METHODS.items():
        model = mlp([10, 12, 8])
        method = make(model, idle(model), **({"at": 0} if name == "truncate" else {}))
        assert method.converted == (name != "cuttlefish")
        assert all(p.requires_grad for p in densify(model).parameters()), name
    model = mlp([10, 12, 8])
    FixedRank(model, idle(model), rank=0.5)
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in densify(model).parameters())


# --- resuming --------------------------------------------------------------------------------------------------------

STEPS, STOPS = 12, [0, 2, 4, 5, 6, 9, 11]
CASES = {
    "truncate": (lambda m, o: Truncate(m, o, at=5, rank=0.5), "Adam"),
    "fixed rank, Frobenius decay": (lambda m, o: FixedRank(m, o, rank=0.5, frobenius_decay=0.01), "SGD"),
    "fixed rank, random": (lambda m, o: FixedRank(m, o, rank=0.3, init="random"), "Adam"),
    "cuttlefish": (
        lambda m, o: Cuttlefish(m, o, every=2, delay=5, window=2, frobenius_decay=0.01, min_rank=0.2),
        "Adam",
    ),
    "nested": (lambda m, o: Nested(m, o, fractions=(0.5, 0.25, 0.1), delay=3, seed=5), "Adam"),
    "nested, a layer at a time": (
        lambda m, o: Nested(m, o, delay=0, fractions=(0.5, 0.2), draw="layer", frobenius_decay=0.01),
        "SGD",
    ),
    "cuttlefish, flat": (lambda m, o: Cuttlefish(m, o, every=2, delay=99, window=2, flatness=9.0), "SGD"),
}


class Run:
    """Everything that trains, as a fresh process would make it."""

    def __init__(self, case, seed=0):
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Unflatten(1, (2, 2, 4)),
            nn.Conv2d(2, 6, (2, 3), padding=1),
            nn.Flatten(),
            nn.Tanh(),
            nn.Linear(72, 16),
            nn.Linear(16, 8),
        )
        make, name = CASES[case]
        options = {"lr": 0.01, "weight_decay": 0.1} | ({"momentum": 0.9} if name == "SGD" else {})
        self.optimizer = getattr(torch.optim, name)(self.model.parameters(), **options)
        self.method = make(self.model, self.optimizer)
        if not self.method.converted:
            lower_stable_ranks(self.model)
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


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_stopped_anywhere_goes_on_to_the_same_bits(case):
    whole = Run(case).train(0, STEPS)
    end = whole.state()
    assert whole.method.converted
    assert whole.method.ranks["4"] < 16
    assert sum(p.numel() for p in whole.model.parameters()) < 72 * 16 + 300
    for stop in STOPS:
        saved = Run(case).train(0, stop).state()
        resumed = Run(case, seed=99).load(saved)
        assert_same(resumed.state(), saved)
        assert_same(resumed.train(stop, STEPS).state(), end)
    whole.load(saved := Run(case).train(0, 3).state())  # back in place, in the form and with the ranks of then
    assert_same(whole.state(), saved)
    assert_same(whole.train(3, STEPS).state(), end)


def test_the_state_of_another_model_is_refused():
    for make in METHODS.values():
        model, other = mlp([8, 8, 8]), mlp([8, 8, 6, 8])
        method, saved = make(model, idle(model)), make(other, idle(other)).state_dict()
        with pytest.raises(ValueError, match="another model or other settings: layers 2 differ"):
            method.load_state_dict(saved)


def test_the_state_of_another_method_is_refused():
    makers = METHODS | {
        "svd_training": lambda model, optimizer: SVDTraining(model, optimizer, sparsity=0.1, prune_at=9),
        "oialr": lambda model, optimizer: OIALR(model, optimizer, delay=4, every=2),
    }
    states = {}
    for name, make in makers.items():
        model = mlp([8, 8, 8])
        states[name] = make(model, idle(model)).state_dict()
    for name, make in makers.items():
        model = mlp([8, 8, 8])
        method = make(model, idle(model))
        before = method.state_dict()
        for other in makers.keys() - {name}:
            with pytest.raises(ValueError, match=f"is not of {name}" if other == "oialr" else f"is of {other}, not"):
                method.load_state_dict(states[other])
        with pytest.raises(ValueError, match=f"is not of {name}"):
            method.load_state_dict({})
        assert_same(method.state_dict(), before)
        method.load_state_dict({key: value for key, value in before.items() if key != "method"})  # as it once was


def test_a_longer_run_is_not_truncated_twice_and_measures_when_it_is_due():
    states = []
    for total in (10, 40):
        model = mlp([10, 8, 8])
        optimizer = idle(model)
        method = Truncate(model, optimizer, at=0.5, rank=0.25, total_steps=total)
        if total == 10:
            steps(model, optimizer, method, 6)
            states = [method.state_dict(), model.state_dict()]
    method.load_state_dict(states[0])
    model.load_state_dict(states[1])
    steps(model, optimizer, method, 20)
    assert (method.at, method.ranks, method.checks) == (20, {"0": 2}, 0)

    longer = mlp([10, 8, 8])
    optimizer = idle(longer)
    method = Cuttlefish(longer, optimizer, every=0.1, delay=0.9, window=9, total_steps=100)
    method.load_state_dict(method.state_dict() | {"steps": 12, "measured": 12})  # of a run a tenth as long
    steps(longer, optimizer, method, 8)
    assert method.checks == 1


def test_shares_are_exact():
    for share, side in ((0.55, 100), (0.07, 100), (1 / 3, 12), (0.1, 30), (0.29, 100)):
        model = mlp([side, side])
        method = FixedRank(model, idle(model), rank=share, keep_last=False)
        assert method.ranks["0"] == math.ceil(Fraction(share).limit_denominator(1000) * side)
