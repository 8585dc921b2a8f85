"""OIALR with a head that has the weight of an embedding: both train as one low-rank weight."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_runs import Loop
from torch import nn

from hpclr import OIALR
from hpclr.lowrank import EMA, densify, load_state_dict
from hpclr.lowrank.probing import outside
from hpclr.methods import FixedRank

TOKENS, WIDTH = 40, 12
SETTINGS = {"delay": 3, "every": 3, "cutoff": 0.4, "layer_fraction": 1.0, "tied": True}


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(TOKENS, WIDTH, padding_idx=0, dtype=torch.float64)
        self.body = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False, dtype=torch.float64)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.body(self.embedding(ids))))


def loss(model, step):
    x = torch.randint(TOKENS, (60,), generator=torch.Generator().manual_seed(step))
    return F.cross_entropy(model(x), (7 * x + 3) % TOKENS)


class Run(Loop):
    """A small training, a step at a time."""

    def __init__(self, optimizer=torch.optim.AdamW, **settings):
        self.model = Language()
        self.optimizer = optimizer(self.model.parameters(), lr=1e-2)
        self.oialr = OIALR(self.model, self.optimizer, **SETTINGS | settings)

    def train(self, last):
        while self.oialr.steps < last:
            with self.oialr.probing():
                loss(self.model, self.oialr.steps).backward()
            self.end()
        return self


def shared(model, name):
    assert model.head._parameters[name] is model.embedding._parameters[name]
    return model.head._parameters[name]


def test_one_sigma_takes_the_place_of_the_one_weight():
    run = Run()
    weight = run.model.head.weight
    run.train(4)
    assert run.oialr.ranks["head"] == WIDTH  # nothing is cut at the conversion
    before = run.model.head.weight.clone()
    assert shared(run.model, "sigma") is weight
    assert run.oialr.report["embedding"].startswith("its weight is that of the head 'head'")
    run.train(12)
    k = run.oialr.ranks["head"]
    assert 1 < k < WIDTH
    assert shared(run.model, "u").shape == (TOKENS, k)
    assert run.optimizer.state[weight]["exp_avg"].shape == (k, k)
    assert not torch.equal(run.model.head.weight, before)
    assert torch.equal(run.model.head.weight, run.model.embedding.weight)


def test_a_step_after_the_conversion_is_that_of_the_dense_weight_in_the_bases():
    """With plain descent Σ' = Uᵀ(W − ηG)V, where G is the gradient of both uses."""
    run = Run(torch.optim.SGD).train(3)
    dense, step = densify(copy.deepcopy(run.model)), run.oialr.steps
    u, vh = shared(run.model, "u").clone(), shared(run.model, "vh").clone()
    loss(dense, step).backward()
    expected = u.mT @ (dense.head.weight - 1e-2 * dense.head.weight.grad) @ vh.mT
    run.train(4)
    torch.testing.assert_close(shared(run.model, "sigma"), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"order": "output"}], ids=["by size", "by output"])
def test_what_the_basis_leaves_out_is_of_the_gradient_of_both_uses(settings):
    run = Run(**settings).train(5)
    dense, factors = densify(copy.deepcopy(run.model)), copy.deepcopy(run.model.head).factors(run.model.head.slots[0])
    loss(dense, 5).backward()
    gradient = dense.head.weight.grad
    run.train(6)
    assert run.oialr.outside["head"] == pytest.approx(float(outside(gradient, factors).norm() / gradient.norm()))


@pytest.mark.parametrize(
    "settings",
    [{"order": "output"}, {"convert": "when_it_pays", "cutoff": 0.6}, {"freeze": "stable", "delay": 9}],
    ids=lambda settings: "-".join(settings),
)
def test_in_every_way_of_converting(settings):
    run = Run(**settings).train(18)
    assert run.oialr.frozen["head"]
    assert run.oialr.ranks["head"] == shared(run.model, "sigma").shape[0] < WIDTH


def test_averages_follow_and_are_kept_once():
    run = Run()
    ema = EMA(run.model, 0.5)
    run.oialr.on_change(ema.follow)
    for last in range(1, 8):
        run.train(last)
        ema.update()
    names = ema.state_dict()["averages"]
    assert {name for name in names if "head" in name or "embedding" in name} == {"embedding.sigma"}
    own = run.model.embedding.weight.clone()
    with ema.applied() as averaged:
        assert torch.equal(averaged.head.weight, averaged.embedding.weight)
        assert not torch.equal(averaged.head.weight, own)
    assert torch.equal(run.model.head.weight, own)


@pytest.mark.parametrize("at", [2, 4, 8])
def test_resumed_to_the_bit(at):
    whole, first, second = Run().train(12), Run().train(at), Run()
    saved = copy.deepcopy([part.state_dict() for part in (first.oialr, first.model, first.optimizer)])
    second.oialr.load_state_dict(saved[0])
    load_state_dict(second.model, saved[1])
    second.optimizer.load_state_dict(saved[2])
    second.train(12)
    assert second.oialr.ranks == whole.oialr.ranks
    for name in ("u", "sigma", "vh"):
        assert torch.equal(shared(second.model, name), shared(whole.model, name))


def test_other_methods_and_oialr_unasked_leave_it_alone():
    for method in (
        lambda model, optimizer: OIALR(model, optimizer, **SETTINGS | {"tied": False}),
        lambda model, optimizer: FixedRank(model, optimizer, rank=0.5),
    ):
        model = Language()
        report = method(model, torch.optim.AdamW(model.parameters())).report
        assert report["head"] == "tied: its weight is shared with another layer"


def test_a_model_without_such_a_head_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="tied=True, but no"):
        OIALR(model, torch.optim.AdamW(model.parameters()), **SETTINGS)
