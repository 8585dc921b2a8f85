"""`auto=True`: layers freeze when what stands out of the noise in them has settled, at the rank that outputs need."""

import pytest
import torch
from small_runs import batch, idle, matrices, mlp, orthonormal, stack, train_step

from hpclr import OIALR
from hpclr.config.schema import OIALR_AUTO
from hpclr.lowrank import MarchenkoPastur, rank_rule
from hpclr.lowrank.factors import alignment
from hpclr.lowrank.regression import nearest_in
from hpclr.lowrank.spectra import decompose
from hpclr.methods.auto import AUTO, signal_in

STEPS, EVERY, LATEST = 40, 2, 24  # of a run, as `auto` shares them out


def noise(m, n, seed):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signal(strengths, m, n, seed=0):
    """Singular values in units of (mn)^¼, below which nothing shows."""
    u, v = (orthonormal(size, 40, seed + size)[:, : len(strengths)] for size in (m, n))  # more of them: the same first
    return (m * n) ** 0.25 * (u * torch.tensor(strengths, dtype=torch.float64)) @ v.mT


@pytest.mark.parametrize("shape", [(120, 120), (300, 100), (100, 300)], ids=str)
@pytest.mark.parametrize("level", [1.0, 0.02])
def test_how_far_a_new_draw_of_the_noise_turns_what_stands_out_is_foretold(shape, level):
    kept = signal([4.0, 3.0, 2.0, 1.7], *shape)
    drawn = [signal_in(decompose(level * (kept + noise(*shape, seed))), MarchenkoPastur()) for seed in range(6)]
    assert {one.rank for one in drawn} == {4}
    assert [one.noise for one in drawn] == pytest.approx([level] * 6, rel=0.05)
    found = [alignment(a.polar, b.polar) for i, a in enumerate(drawn) for b in drawn[:i]]
    assert sum(found) / len(found) == pytest.approx(drawn[0].redrawn, abs=0.05)
    assert 0.4 < drawn[0].redrawn < 0.9


def test_pure_noise_has_nothing_that_could_be_still():
    nothing = signal_in(decompose(noise(90, 60, 1)), MarchenkoPastur())
    assert (nothing.rank, float(nothing.polar.abs().max()), nothing.redrawn) == (0, 0.0, 1.0)
    assert not nothing.is_still(1.0, before=60)


def frozen_of(change, directions):
    """At which step a layer froze, and its rank, where its weight is `change(step)` after each step; None: never.

    What it takes in has so many directions, and very little of all others.
    """
    model = stack(noise(8, 8, 0), change(0), noise(8, 8, 0))
    optimizer = idle(model)
    oialr = OIALR(model, optimizer, auto=True, total_steps=STEPS)
    x = noise(400, directions, 1) @ orthonormal(64, directions, 64).mT + 1e-4 * noise(400, 64, 2)
    for step in range(1, STEPS + 1):
        for layer in model:
            layer(x[:, : layer.in_features])
        optimizer.step()
        if not oialr.frozen["1"]:
            with torch.no_grad():
                model[1].weight.copy_(change(step))
        before = matrices(model)["1"]
        oialr.step()
        if oialr.frozen["1"] and step == oialr.frozen_at["1"]:
            expected = nearest_in(before, x.mT @ x / len(x), oialr.ranks["1"])
            assert torch.allclose(matrices(model)["1"], expected, atol=1e-6), "cut as it froze"
    return (oialr.frozen_at["1"], oialr.ranks["1"]) if oialr.frozen["1"] else None


ADDED = noise(96, 64, 3)
SLOW = [[3.0] * min(6 + step // 4, 10) for step in range(STEPS + 1)]  # one direction more at every second check


@pytest.mark.parametrize(
    ("change", "directions", "expected"),
    [
        (lambda step: signal([4.0, 3.0], 96, 64) + ADDED, 5, (2 * EVERY, 5)),
        (lambda step: signal([4.0, 3.0], 96, 64) + noise(96, 64, step), 5, (2 * EVERY, 5)),
        (lambda step: signal([4.0, 3.0], 96, 64, seed=min(step, 9)) + ADDED, 5, (14, 5)),
        (lambda step: signal(SLOW[step], 96, 64) + ADDED, 12, (20, 12)),
        (lambda step: signal([4.0], 96, 64, seed=step) + ADDED, 5, (LATEST, 5)),
        (lambda step: ADDED, 5, None),
        (lambda step: signal([4.0, 3.0], 96, 64) + ADDED, 31, (2 * EVERY, 31)),
        (lambda step: signal([4.0, 3.0], 96, 64) + ADDED, 40, None),
    ],
    ids=["still", "noise drawn anew", "turning", "growing", "never still", "noise", "many", "too many to pay"],
)
def test_a_layer_freezes_when_its_signal_has_settled(change, directions, expected):
    """At the rank that its outputs need: that of its inputs here."""
    assert frozen_of(change, directions) == expected


def test_the_published_ways_are_as_they_were():
    """Whether a basis has kept still is told by the threshold, unless `auto` tells."""
    model = stack(signal([4.0, 3.0], 96, 64) + ADDED)
    optimizer = idle(model)
    settings = {"cutoff": 0.1, "freeze": "stable", "stability_threshold": 0.99, "keep_last": False}
    oialr = OIALR(model, optimizer, delay=24, every=2, **settings)
    for _ in range(4):
        optimizer.step()
        oialr.step()
    assert oialr.frozen_at == {"0": 4}
    assert oialr.ranks == {"0": 64}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"delay": 10, "cutoff": 0.2}, "delay=10, cutoff=0.2 is given"),
        ({"max_cut": 0.5}, "max_cut=0.5 is given"),
        ({"every": 0.1}, "every=0.1 is given"),
        ({"total_steps": None}, "pass total_steps="),
    ],
)
def test_what_it_decides_may_not_be_given(settings, words):
    model = mlp([8, 16, 16, 8])
    with pytest.raises(ValueError, match=words):
        OIALR(model, idle(model), **({"auto": True, "total_steps": 100} | settings))


def test_without_it_a_moment_and_an_interval_are_needed():
    model = mlp([8, 16, 16, 8])
    for settings, words in (({"every": 3}, "delay must be"), ({"delay": 3}, "every must be")):
        with pytest.raises(ValueError, match=words):
            OIALR(model, idle(model), **settings)


def test_run_files_and_the_library_decide_the_same():
    assert AUTO.keys() == OIALR_AUTO.keys()
    cutoff = OIALR_AUTO["cutoff"]
    assert rank_rule(AUTO["cutoff"]) == rank_rule({"rule": "energy", "share": cutoff.share})
    assert {key: value for key, value in AUTO.items() if key != "cutoff"} == {
        key: value for key, value in OIALR_AUTO.items() if key != "cutoff"
    }


class Run:
    """Everything that trains, as a fresh process would make it."""

    def __init__(self, seed):
        self.model = mlp([10, 32, 48, 32, 8], seed=seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02)
        self.oialr = OIALR(self.model, self.optimizer, auto=True, total_steps=STEPS)

    def train(self, first, last):
        for step in range(first, last):
            parts = [batch(step + 100 * part, 10, 8) for part in range(6)]  # four rows for each of a layer's inputs
            train_step(self.model, self.optimizer, *map(torch.cat, zip(*parts, strict=True)))
            self.oialr.step()
        return self


@pytest.mark.parametrize("stop", [1, 20, 33])
def test_stopped_and_continued_to_the_bit(stop):
    """Before a layer freezes, after it, after the last moment; ranks and counts of checks are part of the state."""
    whole = Run(0).train(0, STEPS)
    assert {1: False, 20: True, 33: True}[stop] == (0 < min(whole.oialr.frozen_at.values()) < min(stop, LATEST))
    part, other = Run(0).train(0, stop), Run(1)
    other.oialr.load_state_dict(part.oialr.state_dict())
    other.model.load_state_dict(part.model.state_dict())
    other.optimizer.load_state_dict(part.optimizer.state_dict())
    other.train(stop, STEPS)
    assert other.oialr.frozen_at == whole.oialr.frozen_at
    assert other.oialr.stability == whole.oialr.stability
    assert all(torch.equal(a, b) for a, b in zip(other.model.parameters(), whole.model.parameters(), strict=True))
