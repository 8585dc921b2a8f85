"""What frozen bases leave out, found by a check in the passes of the step before it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_runs import Loop, batch, mlp
from torch import nn

from hpclr import OIALR
from hpclr.lowrank import densify, select
from hpclr.lowrank.probing import outside
from hpclr.methods.base import Dense

SETTINGS = {"delay": 3, "every": 4, "cutoff": 0.5, "layer_fraction": 1.0, "keep_last": False}
DUE = (3, 7, 11, 15)


class Run(Loop):
    """A small training in float64, of which every pass may be watched."""

    def __init__(self, **settings):
        self.model = mlp([10, 16, 12, 8], torch.float64)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=5e-3)
        self.oialr = OIALR(self.model, self.optimizer, **SETTINGS | settings)
        self.forward = self.model

    def loss(self, step, part=slice(None)):
        x, y = batch(step, 10, 8, torch.float64)
        return F.cross_entropy(self.forward(x[part]), y[part])

    def backward(self, step, part=slice(None), scale=1.0):
        (scale * self.loss(step, part)).backward()

    def train(self, last):
        while self.oialr.steps < last:
            with self.oialr.probing():
                self.backward(self.oialr.steps + 1)
            self.end()
        return self

    def expected(self, step):
        """The shares by the gradients of the dense model."""
        dense = densify(copy.deepcopy(self.model))
        x, y = batch(step, 10, 8, torch.float64)
        F.cross_entropy(dense(x), y).backward()
        gradients = {site.name: site.to_matrix(site.parameter.grad) for site in select(dense).eligible}
        factors = {site.name: site.factors for site in select(self.model).eligible}
        return {n: float(outside(g, factors[n]).norm() / g.norm()) for n, g in gradients.items()}


PARTS = {
    "one pass": [[(slice(None), 1.0)]],
    "passes in one block": [[(slice(0, 16), 0.5), (slice(16, 32), 0.5)]],
    "blocks": [[(slice(0, 8), 0.25)], [(slice(8, 16), 0.25), (slice(16, 32), 0.5)]],
    "scaled": [[(slice(None), 1024.0)]],
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_the_share_is_that_of_the_dense_models_gradient(parts):
    run = Run().train(10)
    expected = run.expected(11)
    for block in parts:
        with run.oialr.probing():
            for part, weight in block:
                run.backward(11, part, weight)
        run.oialr.step()  # there is nothing to do yet
    run.end()
    assert run.oialr.outside == pytest.approx(expected, rel=1e-9)
    assert all(0.1 < share < 1 for share in expected.values())


def test_only_steps_before_a_check_of_frozen_bases_are_watched():
    run, watched = Run(), []
    while run.oialr.steps < 15:
        with run.oialr.probing():
            if any("arithmetic" in module.__dict__ for module in run.model.modules()):
                watched.append(run.oialr.steps + 1)
            run.backward(run.oialr.steps + 1)
        run.end()
        assert not run.oialr._probe.gradients
    assert watched == [7, 11, 15]


def test_a_training_differs_by_rounding_alone():
    watched, plain = Run().train(15), Run()
    for step in range(1, 16):
        plain.backward(step)
        plain.end()
    assert plain.oialr.outside == {}
    assert watched.oialr.ranks == plain.oialr.ranks
    for mine, theirs in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert (mine - theirs).detach().norm() < 1e-9 * theirs.detach().norm()


def test_what_was_not_measured_is_absent():
    """A check that nobody gathered for, a step that was not taken with what was gathered, a gradient that is zero."""
    run = Run().train(7)
    assert run.oialr.outside.keys() == run.oialr.ranks.keys()
    for step in range(8, 12):
        run.backward(step)
        run.end()
    assert run.oialr.outside == {}
    run.train(14)
    with run.oialr.probing():
        run.backward(15, scale=0.0)
    run.end()
    assert run.oialr.outside == {}
    run.train(18)
    with run.oialr.probing():
        run.backward(19)
    assert run.oialr._probe.gradients
    for _ in range(2):
        run.optimizer.step()
    run.oialr.step()
    assert run.oialr.checks == 5
    assert run.oialr.outside == {}
    assert not run.oialr._probe.gradients, "what is of no use is not kept"


def test_a_scaler_that_skips_the_step():
    run = Run().train(6)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (float("inf"), 1.0):
        with run.oialr.probing():
            scaler.scale(factor * run.loss(7)).backward()
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
        run.oialr.step()
    assert run.oialr.steps == 7
    assert run.oialr.checks == 2
    assert run.oialr.outside == {}, "what is not finite has no share"


def test_a_state_has_the_last_shares_and_older_states_have_none():
    run, fresh, older = Run().train(9), Run(), Run()
    state = run.oialr.state_dict()
    fresh.oialr.load_state_dict(state)
    assert fresh.oialr.outside == run.oialr.outside
    assert len(run.oialr.outside) == 3
    older.oialr.load_state_dict({key: value for key, value in state.items() if key != "outside"})
    assert older.oialr.outside == {}


def test_a_compiled_model_is_measured_and_not_compiled_anew():
    torch.compiler.reset()
    run = Run(max_cut=0.0).train(6)
    compiled = []
    run.forward = torch.compile(
        run.model, backend=lambda graph, inputs: compiled.append(graph) or graph, fullgraph=True
    )
    run.backward(6)
    run.optimizer.zero_grad()
    assert len(compiled) == 1
    expected = run.expected(7)
    run.train(7)
    assert run.oialr.outside == pytest.approx(expected, rel=1e-9)
    run.train(10)
    assert len(compiled) == 1
    torch.compiler.reset()


def test_every_method_has_such_a_block():
    model = nn.Linear(2, 2)
    with Dense(model).probing():
        model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None
