"""Nested training: sampled truncation is the mask of NestedLoRA, the order is learnt, draws follow from the seed."""

import copy
import pickle

import pytest
import torch
from small_runs import batch, idle, mlp, stack, train_step, with_spectrum
from torch import nn

from hpclr import FixedRank, Nested, densify
from hpclr.lowrank import LowRankWarning, select
from hpclr.lowrank.activations import input_moments
from hpclr.lowrank.elastic import cut
from hpclr.lowrank.regression import nearest_in
from hpclr.nested import joint, sequential


def drawn_gradients(nesting, fractions, target):
    """Gradients of ‖T − W‖² with regard to A and B for each rank that is drawn, and A and B themselves."""
    model = stack(torch.randn(target.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    optimizer = idle(model)
    method = Nested(model, optimizer, delay=0, fractions=fractions, nesting=nesting, keep_last=False)
    found = {}
    while len(found) < len(fractions):
        optimizer.zero_grad()
        (model(torch.eye(target.shape[1], dtype=torch.float64)).mT - target).square().sum().backward()
        found[method.drawn["0"]] = (model[0].u.grad, model[0].vh.grad)
        optimizer.step()
        method.step()
    return found, model[0].u.detach(), model[0].vh.detach()


def masked_gradients(nesting, a, b, target):
    """Equation (2) of NestedLoRA with its masks, written out."""
    v, m = nesting.vector.double(), nesting.matrix.double()
    of_a = 2 * (-target @ b.mT * v + a @ (m * (b @ b.mT)))
    of_b = 2 * (-v[:, None] * (a.mT @ target) + (m * (a.mT @ a)).mT @ b)
    return of_a, of_b


TARGET = with_spectrum([6, 4.5, 3.2, 2.2, 1.4, 0.8, 0.4, 0.2], 10, 8)


def test_joint_sampling_is_the_mask_of_its_probabilities():
    fractions, weights = (1.0, 0.5, 0.25, 0.125), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    found, a, b = drawn_gradients("joint", fractions, TARGET)
    assert sorted(found) == [1, 2, 4, 8]
    lengths = torch.zeros(8, dtype=torch.float64)
    for weight, k in zip(weights, (8, 4, 2, 1), strict=True):
        lengths[k - 1] = weight
    for place, expected in enumerate(masked_gradients(joint(lengths), a, b, TARGET)):
        mean = sum(weight * found[k][place] for weight, k in zip(weights, (8, 4, 2, 1), strict=True))
        assert torch.allclose(mean, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_sequential_sampling_is_the_mask_of_its_blocks(step):
    found, a, b = drawn_gradients("sequential", [k / 8 for k in range(step, 9, step)], TARGET)
    for place, expected in enumerate(masked_gradients(sequential(8, step), a, b, TARGET)):
        assert torch.allclose(sum(one[place] for one in found.values()), expected, rtol=1e-10, atol=1e-10)


LENGTHS = (1, 2, 4, 8)


def fitted(make, steps=800):
    """Trains a random weight towards the target; ‖T − W_k‖² for every k of LENGTHS."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(8, 10, bias=False)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    method = make(model, optimizer)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.eye(8, dtype=torch.float64)).mT - TARGET).square().sum().backward()
        optimizer.step()
        method.step()
        rate.step()
    u, vh = model[0].u.detach(), model[0].vh.detach()
    return [float((TARGET - u[:, :k] @ vh[:k]).square().sum()) for k in LENGTHS]


def test_training_puts_the_directions_into_the_order_of_singular_values():
    best = [float(torch.linalg.svdvals(TARGET)[k:].square().sum()) for k in LENGTHS]
    every = [k / 8 for k in LENGTHS]
    for nesting in ("joint", "sequential"):
        found = fitted(lambda m, o, n=nesting: Nested(m, o, delay=0, fractions=every, nesting=n, keep_last=False))
        assert found == sorted(found, reverse=True)
        assert all(one <= least + 0.05 * best[0] for one, least in zip(found, best, strict=True)), (nesting, found)
    plain = fitted(lambda m, o: FixedRank(m, o, rank=1.0, keep_last=False))
    assert plain[-1] < 1e-6
    assert max(one - least for one, least in zip(plain, best, strict=True)) > 0.1 * best[0]  # in no such order


LAYERS = {
    "linear": (nn.Linear(12, 16), (5, 12)),
    "convolution": (nn.Conv2d(4, 16, 3, padding=1), (2, 4, 5, 5)),
    "groups": (nn.Conv2d(8, 16, 3, groups=2, padding_mode="circular", padding=1), (2, 8, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_step_takes_the_leading_directions_and_evaluation_all(name):
    torch.manual_seed(0)
    layer, shape = copy.deepcopy(LAYERS[name])
    model, x = nn.Sequential(layer).double(), torch.randn(shape).double()
    optimizer = idle(model)
    method = Nested(model, optimizer, delay=0, fractions=(1, 0.3), keep_last=False, seed=3)
    while method.drawn["0"] == method.ranks["0"]:
        optimizer.step()
        method.step()
    k = method.drawn["0"]
    twin = densify(copy.deepcopy(model))
    assert torch.allclose(twin.eval()(x), model.eval()(x), atol=1e-12)
    small = copy.deepcopy(model)
    cut(small, 0.3)
    expected = small.eval()(x)
    outputs = model.train()(x)
    assert torch.allclose(outputs, expected, atol=1e-12)
    assert not torch.allclose(outputs, twin(x), atol=1e-3)
    assert torch.allclose(model[0].weight, densify(small)[0].weight, atol=1e-12)
    outputs.square().sum().backward()
    u, vh = model[0].u.grad, model[0].vh.grad
    assert u[:, :k].abs().min() > 0 == u[:, k:].abs().max()
    assert vh[:k].abs().min() > 0 == vh[k:].abs().max()
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other.train()(x), outputs)


def test_attention_computes_with_the_leading_directions():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    model, x = nn.ModuleList([attention]), torch.randn(2, 5, 16)
    method = Nested(model, idle(model), delay=0, fractions=(0.25,), keep_last=False)
    assert method.ranks == {"0.in_proj": 4, "0.out_proj": 4} == method.drawn
    small = copy.deepcopy(model)
    cut(small, 0.25)
    assert torch.allclose(model[0](x, x, x)[0], densify(small)[0](x, x, x)[0], atol=1e-6)


def draws(count=400, **settings):
    model = mlp([8, 8, 8, 8])
    optimizer = idle(model)
    method = Nested(model, optimizer, **({"delay": 0, "keep_last": False} | settings))
    found = []
    for _ in range(count):
        found.append(tuple(method.drawn.values()))
        optimizer.step()
        method.step()
    return found


def test_draws_follow_from_the_seed_and_the_step_and_come_as_often_as_asked():
    torch.manual_seed(1)
    found = draws(fractions=(0.5, 1, 0.25), weights=(0.2, 0.5, 0.3), seed=7)
    torch.manual_seed(2)
    assert draws(fractions=(1, 0.5, 0.25), weights=(0.5, 0.2, 0.3), seed=7) == found
    assert draws(fractions=(1, 0.5, 0.25), weights=(5, 2, 3), seed=8) != found
    assert {len(set(one)) for one in found} == {1}  # the same share in all layers
    for rank, share in ((8, 0.5), (4, 0.2), (2, 0.3)):
        assert abs(found.count((rank,) * 3) / 400 - share) < 4 * (share * (1 - share) / 400) ** 0.5
    by_layer = draws(draw="layer", fractions=(1, 0.25))
    assert {one.count(2) for one in by_layer} == {0, 1}
    assert {one.index(2) for one in by_layer if 2 in one} == {0, 1, 2}


def test_running_statistics_come_from_steps_with_all_directions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    optimizer = idle(model)
    method = Nested(model, optimizer, delay=0, fractions=(1, 0.25), seed=1)
    seen = set()
    for step in range(20):
        before, whole = model[1].running_mean.clone(), method.drawn["0"] == 8
        train_step(model, optimizer, *batch(step, 8, 8))
        assert torch.equal(model[1].running_mean, before) != whole
        seen.add(whole)
        method.step()
    assert seen == {True, False}


def passes(model, batches):
    """Passes of training, the inputs in single samples; and one of evaluation between them, which does not count."""
    for x in batches:
        model(x).square().sum().backward()
        model.eval()(torch.ones_like(x))
        model.train()


def test_directions_begin_in_the_order_of_the_outputs_in_the_step_before():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 12), nn.Conv1d(1, 6, 3)).double()
    model.insert(3, nn.Unflatten(1, (1, 12)))
    optimizer = idle(model)
    method = Nested(model, optimizer, delay=2, fractions=(1, 0.25), keep_last=False)
    data = torch.randn(2, 4, 12, dtype=torch.float64) * torch.logspace(0, -2, 12, dtype=torch.float64)
    passes(model, [torch.ones(4, 12, dtype=torch.float64)])  # the step before that
    optimizer.step()
    method.step()
    before, x = copy.deepcopy(model), torch.cat(list(data))
    sites = select(before).eligible
    moments = input_moments(before, sites, [x])
    passes(model, data)
    assert method.converted is False
    optimizer.step()
    method.step()
    assert method.converted
    assert all(not module._forward_pre_hooks for module in model.modules())
    cut(model, 0.25)
    for site, after in zip(sites, select(model).eligible, strict=True):
        weight, moment = site.core(), moments[site.name]
        best = nearest_in(weight, moment, -(-min(weight.shape) // 4))
        assert torch.allclose(densify(copy.deepcopy(after.module)).weight.flatten(1), best, atol=1e-9), site.name


def test_what_is_compiled_shows_its_inputs(recwarn):
    model = mlp([8, 8, 8])
    optimizer, compiled = idle(model), torch.compile(model, backend="eager")
    method = Nested(model, optimizer, delay=2, keep_last=False)
    for step in range(3):
        with method.probing():
            train_step(compiled, optimizer, *batch(step, 8, 8))
        method.step()
    assert method.converted
    assert not [one for one in recwarn if issubclass(one.category, LowRankWarning)]


def test_who_cannot_see_inputs_says_so():
    model = mlp([8, 8, 8])
    optimizer = idle(model)
    method = Nested(model, optimizer, delay=1, keep_last=False)
    optimizer.step()
    with pytest.warns(
        LowRankWarning, match=r"2 layers \(0, 2\) took nothing in, or zeros alone, .*: their directions are taken"
    ):
        method.step()
    assert method.drawn


def test_until_the_delay_nothing_changes_and_then_all_directions_that_are_to_be_kept():
    model = mlp([10, 16, 12, 8])
    optimizer = idle(model)
    method = Nested(model, optimizer, delay=0.25, total_steps=8, fractions=(0.5, 0.2), order="size")
    seen = []
    for _ in range(3):
        seen.append((method.ranks, method.drawn.keys()))
        optimizer.step()
        method.step()
    full = {"0": 10, "2": 12}
    assert seen == [(full, set())] * 2 + [({"0": 5, "2": 6}, {"0", "2"})]
    assert "keep_last" in method.report["4"]
    assert type(densify(model)[0]) is nn.Linear
    FixedRank(model, idle(model), rank=1.0)
    model.train()
    assert model[0].factors_in_use(model[0].slots[0]).u.shape[1] == 10  # the draw has not outlived its method


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fractions": ()}, r"fractions must be one or more different shares, found \(\)"),
        ({"fractions": (0.5, 0.5)}, "fractions must be one or more different shares"),
        ({"fractions": (0.5, 1.5)}, r"fractions must be shares of the smaller side in \(0, 1\], found 1.5"),
        ({"weights": (1.0,)}, "weights must be as many as fractions, one for each: found 1 and 4"),
        ({"weights": (1, 1, 1, 0)}, "weights must be finite numbers above 0, found 0"),
        ({"nesting": "both"}, "nesting must be 'joint' or 'sequential', found 'both'"),
        ({"draw": "unit"}, "draw must be 'model' or 'layer', found 'unit'"),
        ({"order": "input"}, "order must be 'output' or 'size', found 'input'"),
        ({"delay": 0.5}, "delay=0.5 is a fraction of the run, whose length is not known"),
        ({"max_aspect": 1.0}, "max_aspect must be a number above 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    model = mlp([6, 6, 6])
    with pytest.raises(ValueError, match=message):
        Nested(model, idle(model), **({"delay": 0} | settings))
    assert type(model[0]) is nn.Linear
