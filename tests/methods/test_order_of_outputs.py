"""OIALR with `order="output"`: directions are judged and cut by what they do to outputs, of the inputs of one step."""

import copy
import io
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from small_runs import Loop, batch, matrices, mlp, sites
from torch import nn

from hpclr import OIALR
from hpclr.lowrank.activations import input_moments, shrunk
from hpclr.lowrank.factors import LowRankWarning
from hpclr.lowrank.regression import nearest_in

SHARE = 0.95
SETTINGS = {
    "delay": 3,
    "every": 4,
    "cutoff": {"rule": "energy", "share": SHARE},
    "layer_fraction": 1.0,
    "max_cut": 1.0,
    "keep_last": False,
    "order": "output",
}


class Run(Loop):
    """A small training in float64, whose inputs have more of some directions than of others."""

    def __init__(self, **settings):
        self.model = mlp([10, 16, 12, 8], torch.float64)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=5e-3)
        self.oialr = OIALR(self.model, self.optimizer, **SETTINGS | settings)

    def backward(self, step, *parts):
        two = (batch(step + more, 10, 8, torch.float64) for more in (0, 1000))  # 64: four rows for each of 16 inputs
        x, y = map(torch.cat, zip(*two, strict=True))
        x = x * torch.logspace(0.5, -1.5, 10, dtype=torch.float64)
        for part in parts or [slice(None)]:
            F.cross_entropy(self.model(x[part]), y[part]).backward()
        return x

    def train(self, last):
        while self.oialr.steps < last:
            self.backward(self.oialr.steps + 1)
            self.end()
        return self


def cut_by_hand(run, step):
    """Weights after the check of `step`, of those before it: the nearest in outputs of the least rank that will do."""
    before = copy.deepcopy(run.model)
    x = run.backward(step)
    moments = input_moments(before, list(sites(before).values()), [x])
    run.optimizer.step()
    run.optimizer.zero_grad()
    expected = {}
    for name, weight in matrices(run.model).items():
        root = torch.linalg.cholesky(moments[name] + 1e-14 * torch.eye(len(moments[name])).double())
        s = torch.linalg.svdvals(weight @ root)[: sites(before)[name].rank]
        kept = s.square().cumsum(0) / s.square().sum()
        rank = int((kept < SHARE).sum()) + 1
        expected[name] = rank, nearest_in(weight, moments[name], rank)
    return expected


@pytest.mark.parametrize("convert", ["at_delay", "when_it_pays"])
def test_a_check_leaves_the_weights_that_are_nearest_in_their_outputs(convert):
    """The first check that cuts, of dense weights (when it pays) or whole factors, and the next, of cut ones."""
    run = Run(convert=convert).train(6)
    for step in (7, 11):
        expected = cut_by_hand(run, step)
        run.oialr.step()
        cut = [name for name, frozen in run.oialr.frozen.items() if frozen]
        assert len(cut) >= 2
        for name in cut:
            rank, weight = expected[name]
            assert run.oialr.ranks[name] == rank < min(weight.shape)
            assert (matrices(run.model)[name] - weight).norm() < 1e-7 * weight.norm()
        run.train(step + 3)


def test_small_directions_that_matter_are_kept():
    """By size the cut is another, and errs more in the outputs at the same ranks."""
    run = Run().train(6)
    x = run.backward(7)
    run.optimizer.zero_grad()
    weights, whole = matrices(run.model), run.model(x)
    run.optimizer.step()
    run.oialr.step()
    by_size = copy.deepcopy(run.model)
    for name, site in sites(by_size).items():
        k = run.oialr.ranks[name]
        u, s, vh = torch.linalg.svd(weights[name], full_matrices=False)
        site.densify()
        site.module.weight.data = (u[:, :k] * s[:k]) @ vh[:k]
    lost, lost_by_size = ((whole - model(x)).norm() for model in (run.model, by_size))
    assert lost < 0.8 * lost_by_size


def test_parts_of_a_batch_count_as_the_batch():
    whole, parts = Run().train(6), Run().train(6)
    whole.backward(7)
    parts.backward(7, slice(0, 5), slice(5, 64))
    for run in (whole, parts):
        for parameter in run.model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        run.end()
    for mine, theirs in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert (mine - theirs).detach().norm() < 1e-10 * theirs.detach().norm()


def test_only_the_step_before_a_check_is_looked_at_and_evaluation_does_not_count():
    run, seen = Run(), []
    for step in range(1, 16):
        if any(module._forward_pre_hooks for module in run.model.modules()):
            seen.append(step)
            run.model.eval()
            run.model(1e6 * torch.randn(64, 10).double())
            run.model.train()
        run.backward(step)
        run.end()
    assert seen == [7, 11, 15], "the conversion of step 3 cuts nothing"
    assert [p.tolist() for p in Run().train(15).model.parameters()] == [p.tolist() for p in run.model.parameters()]


def test_what_took_nothing_in_is_not_cut_and_said():
    class OneOfTwo(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(6, 8), nn.Linear(6, 8)

        def forward(self, x):
            return self.used(x)

    model = OneOfTwo()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    oialr = OIALR(model, optimizer, **SETTINGS | {"delay": 0, "every": 1, "cutoff": {"rule": "energy", "share": 0.5}})
    model(torch.randn(16, 6)).square().sum().backward()
    optimizer.step()
    with pytest.warns(LowRankWarning, match=r"1 layers \(idle\) took nothing in, or zeros alone, .* not cut"):
        oialr.step()
    assert oialr.ranks["idle"] == 6 > oialr.ranks["used"]
    model.eval()  # a loop that trains so has nothing cut either
    model(torch.randn(16, 6)).square().sum().backward()
    optimizer.step()
    with pytest.warns(LowRankWarning, match=r"2 layers \(used, idle\)"):
        oialr.step()


def test_nothing_is_said_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Run(freeze="stable", convert="when_it_pays", stability_threshold=0.5).train(15)


def test_a_layer_that_settles_early_is_cut_by_its_outputs():
    run = Run(delay=12, freeze="stable", convert="when_it_pays", stability_threshold=0.3).train(11)
    early = {name: step for name, step in run.oialr.frozen_at.items() if step < 12}
    assert early
    assert all(run.oialr.ranks[name] < min(sites(run.model)[name].shape) for name in early)


@pytest.mark.parametrize("rule", ["marchenko_pastur", "gavish_donoho"])
def test_rules_for_noise_in_weights_are_refused(rule):
    with pytest.raises(ValueError, match=r"order='output' .* rule for noise in weights"):
        Run(cutoff={"rule": rule})


def test_an_order_that_is_none():
    with pytest.raises(ValueError, match="order must be 'size' or 'output', found 'input'"):
        Run(order="input")


def test_a_compiled_model_is_looked_at():
    torch.compiler.reset()
    run, plain = Run().train(5), Run().train(8)
    forward, run.model = run.model, torch.compile(run.model, backend="eager")
    for step in (6, 7, 8):
        with run.oialr.probing():
            run.backward(step)
        run.end()
    assert run.oialr.ranks == plain.oialr.ranks
    assert math.isclose(*(float(p[0].sum()) for p in map(list, (forward.parameters(), plain.model.parameters()))))
    torch.compiler.reset()


@pytest.mark.parametrize(("rows", "rank"), [(2, 9), (11, 8), (47, 6), (48, 4)])
def test_few_rows_cut_with_care(rows, rank):
    """Fewer than four for each input of a Σ, over all passes that count: its moment is shrunk."""
    run = Run().train(6)
    before = copy.deepcopy(run.model)
    with run.oialr.probing():
        x = run.backward(7, slice(0, rows // 2), slice(rows // 2, rows))[:rows]
    with run.oialr.probing(counts=False):
        run.backward(7)
    whole = input_moments(before, list(sites(before).values()), [x.repeat(64, 1)])  # of the same rows, as if of many
    run.optimizer.step()
    weights = matrices(run.model)
    run.oialr.step()
    for name, weight in weights.items():
        vh = sites(before)[name].factors.vh
        inside = vh.mT @ shrunk(vh @ whole[name] @ vh.mT, rows) @ vh
        expected = nearest_in(weight, inside, run.oialr.ranks[name])
        assert (matrices(run.model)[name] - expected).norm() < 1e-7 * weight.norm(), name
    assert run.oialr.ranks["2"] == rank, "the higher the fewer rows"


def test_a_step_that_is_repeated_counts_once():
    """As after one that a scaler has skipped; what it saw is forgotten."""
    once, twice = Run().train(6), Run().train(6)
    twice.backward(500)
    twice.optimizer.zero_grad()
    twice.oialr.step()
    for run in (once, twice):
        run.backward(7)
        run.end()
    assert [p.tolist() for p in once.model.parameters()] == [p.tolist() for p in twice.model.parameters()]


def test_inputs_of_nothing_but_zeros_are_no_reason_to_cut():
    run = Run().train(6)
    before = run.oialr.ranks
    run.model(torch.zeros(64, 10).double()).sum().backward()
    with pytest.warns(LowRankWarning, match=r"\(0\) took nothing in"):
        run.end()
    assert run.oialr.ranks["0"] == before["0"]


def test_copies_and_files_of_a_model_that_is_looked_at():
    """They have nothing to do with it: neither do their passes count, nor do they know of it."""
    run, plain = Run().train(6), Run().train(7)
    copied = copy.deepcopy(run.model)
    file = io.BytesIO()
    torch.save(run.model, file)
    for other in (copied, torch.load(io.BytesIO(file.getvalue()), weights_only=False)):
        other.train()(1e3 * torch.randn(64, 10).double())
    run.train(7)
    assert [p.tolist() for p in run.model.parameters()] == [p.tolist() for p in plain.model.parameters()]
    copied(torch.randn(64, 10).double())
