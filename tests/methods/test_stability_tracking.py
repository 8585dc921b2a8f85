"""The stability of every layer's basis, as measured, and freezing by it."""

import pytest
import torch
from small_runs import batch, idle, matrices, mlp, orthonormal, stack, train_step, with_spectrum

from hpclr import OIALR
from hpclr.lowrank import stability

NEVER = 10**6


@pytest.mark.parametrize("cutoff", [1e-12, 0.4])
@pytest.mark.parametrize("layer_fraction", [0.4, 1.0])
def test_what_is_measured_is_the_stability_of_the_weights_between_checks(cutoff, layer_fraction):
    """Before the conversion and after, whether a check covers the layer or not; of a cut weight, with what was kept."""
    model = mlp([8, 14, 10, 6], torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    oialr = OIALR(
        model, optimizer, delay=15, every=5, cutoff=cutoff, layer_fraction=layer_fraction, keep_last=False, min_rank=0
    )
    snapshot, seen = matrices(model), 0
    assert oialr.stability == {}
    for step in range(1, 46):
        train_step(model, optimizer, *batch(step, 8, 6, torch.float64))
        now = matrices(model)
        oialr.step()
        if step % 5 == 0:
            expected = {name: stability(snapshot[name], now[name]) for name in now}
            assert oialr.stability == pytest.approx(expected, abs=1e-9), step
            assert max(expected.values()) < 1 - 1e-6
            snapshot, seen = matrices(model), seen + 1
    assert seen == oialr.checks == 9
    assert (min(oialr.ranks.values()) < 6) == (cutoff == 0.4)


def test_weights_short_of_full_rank_are_measured_alike():
    model = stack(with_spectrum([3.0, 2.0], 7, 5), torch.zeros(6, 7, dtype=torch.float64))
    optimizer = idle(model)
    oialr = OIALR(model, optimizer, delay=2, every=2, cutoff=0.1, layer_fraction=1, keep_last=False, min_rank=1.0)
    seen = []
    for _ in range(6):
        optimizer.step()
        oialr.step()
        seen.append(oialr.stability)
    assert [s["0"] for s in seen[1:]] == pytest.approx([1.0] * 5, abs=1e-9), "nothing moved"
    assert [s["1"] for s in seen[1:]] == [0.0] * 5, "nothing there to keep"


def test_the_stability_says_nothing_before_the_first_check_and_stays_until_the_next():
    model = mlp([6, 6, 6])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    oialr = OIALR(model, optimizer, delay=6, every=3)
    seen = []
    for step in range(9):
        train_step(model, optimizer, *batch(step, 6, 6))
        oialr.step()
        seen.append(oialr.stability.get("0"))
    assert seen[:2] == [None, None]
    assert seen[2] is not None
    assert seen[2] == seen[3] == seen[4] != seen[5] == seen[6]


# --- freeze: stable --------------------------------------------------------------------------------------------------


def restless(model, layer, angle):
    """Turns the basis of a layer by an angle in every plane of its outputs; its singular values stay."""
    with torch.no_grad():
        weight = model[layer].weight
        m = weight.shape[0]
        a = angle * torch.triu(torch.ones(m, m, dtype=weight.dtype), 1)
        weight.copy_(torch.linalg.matrix_exp(a - a.mT) @ weight)


def test_each_layer_freezes_in_its_own_time():
    model = stack(
        *(with_spectrum([4.0, 3.0, 2.0, 1.0], 6, 6, seed) + 0.1 * orthonormal(6, 6, seed) for seed in range(3))
    )
    optimizer = idle(model)
    oialr = OIALR(model, optimizer, delay=40, every=5, freeze="stable", stability_threshold=0.95, keep_last=False)
    history = {}
    for step in range(1, 46):
        if step <= 17 and not oialr.frozen["1"]:
            restless(model, 1, 0.3)  # settles after 17 steps
        if not oialr.frozen["2"]:
            restless(model, 2, 0.3)  # never does
        optimizer.step()
        oialr.step()
        for name, frozen in oialr.frozen.items():
            if frozen:
                history.setdefault(name, step)
    # twice in a row: the still layer at 5 and 10; the second one, moved between 15 and 20, at 25 and 30
    assert history == {"0": 10, "1": 30, "2": 40}


def test_layers_that_learn_nothing_freeze_first():
    model = mlp([10, 16, 16, 8], torch.float64)
    groups = [
        {"params": model[0].parameters(), "lr": 0.0},
        {"params": [*model[2].parameters(), *model[4].parameters()]},
    ]
    optimizer = torch.optim.Adam(groups, lr=1e-2)
    oialr = OIALR(
        model, optimizer, delay=30, every=5, freeze="stable", stability_threshold=0.995, cutoff=1e-6, keep_last=False
    )
    frozen_at = {}
    for step in range(1, 31):
        train_step(model, optimizer, *batch(step, 10, 8, torch.float64))
        oialr.step()
        for name, frozen in oialr.frozen.items():
            if frozen:
                frozen_at.setdefault(name, step)
    assert frozen_at["0"] == 10
    assert frozen_at["2"] > 10
    assert max(frozen_at.values()) <= 30


def test_once_above_the_threshold_is_not_settled():
    model = stack(orthonormal(6, 6, 0))
    optimizer = idle(model)
    oialr = OIALR(model, optimizer, delay=100, every=5, freeze="stable", stability_threshold=0.95, keep_last=False)
    for step in range(1, 51):
        if step % 10 == 1:
            restless(model, 0, 0.5)  # between every other pair of checks
        optimizer.step()
        oialr.step()
        assert not oialr.frozen["0"]


def test_a_first_interval_cut_short_does_not_count():
    """With delay 21 and every 5 the first check is at step 1: every basis is stable over one step."""
    frozen_at = []
    for delay in (20, 21):
        model = stack(orthonormal(6, 6, 0))
        optimizer = idle(model)
        oialr = OIALR(model, optimizer, delay=delay, every=5, freeze="stable", keep_last=False)
        while not oialr.frozen["0"]:
            optimizer.step()
            oialr.step()
        frozen_at.append(oialr.steps)
    assert frozen_at == [10, 11]


def test_layers_frozen_early_are_cut_on_the_schedule():
    model = stack(with_spectrum([1.0] + [1e-2] * 7, 8, 8))
    optimizer = idle(model)
    oialr = OIALR(model, optimizer, delay=20, every=5, freeze="stable", layer_fraction=1, cutoff=0.5, keep_last=False)
    ranks = {}
    for step in range(1, 31):
        optimizer.step()
        oialr.step()
        ranks[step] = oialr.ranks["0"] if oialr.frozen["0"] else None
    assert (ranks[9], ranks[10], ranks[24], ranks[25], ranks[30]) == (None, 8, 8, 4, 2)


def test_a_settled_layer_is_converted_early_only_if_it_pays():
    model = stack(with_spectrum([1.0] + [1e-2] * 7, 8, 8), torch.eye(8, dtype=torch.float64))
    optimizer = idle(model)
    settings = {"freeze": "stable", "convert": "when_it_pays", "layer_fraction": 1, "cutoff": 0.5, "keep_last": False}
    oialr = OIALR(model, optimizer, delay=20, every=5, **settings)
    for _ in range(30):
        optimizer.step()
        oialr.step()
        assert oialr.frozen == {"0": oialr.steps >= 10, "1": False}
    assert oialr.ranks == {"0": 1, "1": 8}
