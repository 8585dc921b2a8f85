"""Stopping anywhere and going on: not a bit may differ from the run that was not stopped."""

import io
from functools import cache

import pytest
import torch
from small_runs import batch, idle, mlp, train_step

from hpclr import OIALR

STEPS = 26
WIDTHS = [10, 16, 12, 8]
DELAY, EVERY = 12, 4
# before the first check, at checks before the conversion, between them, at the conversion, after it, before checks that
# cut, at them
STOPS = [1, 4, 7, 8, 12, 13, 15, 16, 20, 25]

MODES = {
    "paper": {"cutoff": 0.35, "layer_fraction": 0.4},
    "stable": {"cutoff": 0.35, "layer_fraction": 0.4, "freeze": "stable", "stability_threshold": 0.9},
    "pays": {"cutoff": 0.6, "layer_fraction": 0.5, "convert": "when_it_pays"},
    "outputs": {"cutoff": {"rule": "energy", "share": 0.9}, "layer_fraction": 0.4, "order": "output"},
    "stable, pays": {
        "cutoff": 0.6,
        "layer_fraction": 0.5,
        "freeze": "stable",
        "stability_threshold": 0.9,
        "convert": "when_it_pays",
    },
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=5e-3),
}


class Run:
    """Everything that trains, as a fresh process would make it."""

    def __init__(self, mode, optimizer, seed=0):
        self.model = mlp(WIDTHS, seed=seed)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.oialr = OIALR(
            self.model, self.optimizer, delay=DELAY, every=EVERY, keep_last=False, sigma_lr=1.5, **MODES[mode]
        )

    def train(self, first, last):
        for step in range(first, last):
            train_step(self.model, self.optimizer, *batch(step, WIDTHS[0], WIDTHS[-1]))
            self.scheduler.step()
            self.oialr.step()
        return self

    def state(self):
        return {
            "oialr": self.oialr.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load(self, state):
        self.oialr.load_state_dict(state["oialr"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        return self


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_bits(one, other, path=""):
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            assert_same_bits(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same_bits(*pair, f"{path}/{i}")
    else:
        assert one == other, path


@cache
def uninterrupted(mode, optimizer):
    run = Run(mode, optimizer).train(0, STEPS)
    return through_a_file(run.state()), run.oialr


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(mode, optimizer, stop):
    expected, _ = uninterrupted(mode, optimizer)
    saved = through_a_file(Run(mode, optimizer).train(0, stop).state())
    resumed = Run(mode, optimizer, seed=99).load(saved)  # other initial weights: nothing of them may stay
    assert_same_bits(through_a_file(resumed.state()), saved)
    resumed.train(stop, STEPS)
    assert_same_bits(through_a_file(resumed.state()), expected)


@pytest.mark.parametrize("mode", MODES)
def test_these_runs_do_what_the_stops_are_to_interrupt(mode):
    _, oialr = uninterrupted(mode, "adamw")
    assert oialr.steps == STEPS
    assert all(oialr.frozen.values()) == ("pays" not in mode)
    assert any(oialr.frozen.values())
    assert min(oialr.ranks.values()) < 8
    if mode == "stable":
        early = Run(mode, "adamw").train(0, DELAY - 1)
        assert any(early.oialr.frozen.values())


def test_two_runs_with_one_seed_are_the_same_to_the_bit():
    assert_same_bits(Run("stable", "adamw").train(0, STEPS).state(), uninterrupted("stable", "adamw")[0])


@pytest.mark.parametrize("mode", MODES)
def test_an_earlier_state_can_be_taken_back_in_place(mode):
    """As after a loss that became NaN: layers are dense again, or at the ranks they had."""
    run = Run(mode, "adamw").train(0, 5)
    before = through_a_file(run.state())
    run.train(5, STEPS).load(before).train(5, STEPS)
    assert_same_bits(run.state(), uninterrupted(mode, "adamw")[0])


def test_the_state_of_an_untrained_run_can_be_taken_back():
    run = Run("paper", "sgd")
    state = through_a_file(run.state())
    again = Run("paper", "sgd", seed=5).load(state).train(0, STEPS)
    assert_same_bits(again.state(), uninterrupted("paper", "sgd")[0])


def test_failures_are_remembered():
    model = mlp([6, 6, 6])
    optimizer = idle(model)
    oialr = OIALR(model, optimizer, delay=4, every=2)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    for _ in range(2):
        optimizer.step()
    oialr.step()
    assert oialr.failures == 1
    other = mlp([6, 6, 6])
    again = OIALR(other, idle(other), delay=4, every=2)
    again.load_state_dict(through_a_file(oialr.state_dict()))
    assert (again.failures, again.steps) == (1, 2)


def test_the_state_of_another_model_is_refused_by_the_names_of_its_layers():
    model, other = mlp([8, 8, 8]), mlp([8, 8, 8, 8, 8])
    state = OIALR(other, idle(other), delay=4, every=2, keep_last=False).state_dict()
    oialr = OIALR(model, idle(model), delay=4, every=2, keep_last=False)
    with pytest.raises(ValueError, match=r"another model or other settings: layers 4, 6 differ"):
        oialr.load_state_dict(state)
    assert oialr.steps == 0
    assert not any(oialr.frozen.values())


def test_a_state_with_ranks_that_do_not_fit_is_refused_before_anything_changes():
    wide, narrow = mlp([16, 16, 16]), mlp([16, 16, 4])
    optimizer = idle(wide)
    trained, fresh = (
        OIALR(model, o, delay=1, every=2, keep_last=False) for model, o in ((wide, optimizer), (narrow, idle(narrow)))
    )
    optimizer.step()
    trained.step()
    with pytest.raises(ValueError, match=r"layers 2 differ"):
        fresh.load_state_dict(trained.state_dict())
    assert not any(fresh.frozen.values())


def test_a_run_made_longer_goes_on_checking():
    """Fractions of a longer run put the checks elsewhere; those still to come are made."""
    model = mlp([8, 8, 8])
    short = OIALR(model, idle(model), delay=0.2, every=0.1, total_steps=10)
    longer_model = mlp([8, 8, 8])
    longer = OIALR(longer_model, idle(longer_model), delay=0.2, every=0.1, total_steps=40)
    short._counter.taken = 10
    short.step()
    longer.load_state_dict(short.state_dict())
    for taken in range(11, 41):
        longer._counter.taken = taken
        longer.step()
    assert longer.checks >= 7
