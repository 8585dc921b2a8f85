"""When layers are converted and cut: the paper's schedule in exact arithmetic."""

import pytest
import torch
from small_runs import idle, mlp

from hpclr import OIALR
from hpclr.methods.schedule import CheckSchedule, exact, in_steps

ONE_THIRD = 1 / 3

# (L, ℓ): layers covered by the checks j = 1, 2, …; from the last number on it stays.
GROWTH = {
    (1, 0.1): [1, 1],
    (1, 0.25): [1, 1],
    (1, ONE_THIRD): [1, 1],
    (1, 1): [1, 1],
    (3, 0.1): [1, 1, 1, 2, 2, 2, 3, 3],
    (3, 0.25): [1, 2, 3, 3],
    (3, ONE_THIRD): [1, 2, 3, 3],
    (3, 1): [3, 3],
    (9, 0.1): [1, 2, 3, 4, 5, 6, 7, 8, 9, 9],
    (9, 0.25): [3, 5, 7, 9, 9],
    (9, ONE_THIRD): [3, 6, 9, 9],
    (9, 1): [9, 9],
    (10, 0.1): [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10],
    (10, 0.25): [3, 5, 8, 10, 10],
    (10, ONE_THIRD): [4, 7, 10, 10],
    (10, 1): [10, 10],
    (11, 0.1): [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11],
    (11, 0.25): [3, 6, 9, 11, 11],
    (11, ONE_THIRD): [4, 8, 11, 11],
    (11, 1): [11, 11],
    (100, 0.1): [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 100],
    (100, 0.25): [25, 50, 75, 100, 100],
    (100, ONE_THIRD): [34, 67, 100, 100],
    (100, 1): [100, 100],
}


@pytest.mark.parametrize(("layers", "fraction"), GROWTH)
def test_each_check_reaches_further_back(layers, fraction):
    schedule = CheckSchedule(delay=10, every=5, layer_fraction=fraction)
    expected = GROWTH[layers, fraction]
    assert [schedule.covered(j, layers) for j in range(1, len(expected) + 1)] == expected
    assert [schedule.covered(j, layers) for j in (-3, -1, 0)] == [0, 0, 0]


def test_growth_is_not_computed_in_binary_fractions():
    assert 3 * 0.1 * 10 > 3  # what a float would make of it: four layers
    assert CheckSchedule(0, 1, 0.1).covered(3, 10) == 3


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3, 2 / 7, 0.001, 1])
def test_exact_takes_the_simple_fraction(value):
    fraction = exact(value)
    assert float(fraction) == value
    assert fraction.denominator <= 1000


@pytest.mark.parametrize(
    ("value", "total", "steps"),
    [
        (0, None, 0),
        (0, 100, 0),
        (1, None, 1),
        (1.0, 100, 1),
        (250, None, 250),
        (0.1, 30, 3),
        (0.29, 100, 29),
        (0.001, 100, 1),
    ],
)
def test_steps_or_a_fraction_of_the_run(value, total, steps):
    assert in_steps("delay", value, total) == steps


@pytest.mark.parametrize("value", [-1, -0.5, 1.5, 250.25, float("inf"), float("nan")])
def test_what_is_no_number_of_steps_is_refused(value):
    with pytest.raises(ValueError, match=r"delay must be a whole number of steps or a fraction of the run"):
        in_steps("delay", value, 100)


def converted_and_cut(layers, steps, calls=None, **settings):
    """Runs an idle optimiser and lists (step, name, rank before, rank after) for every change of basis."""
    widths = [8] * (layers + 1)
    model = mlp(widths)
    optimizer = idle(model)
    changes = []
    # the optimiser counts, so that changes made in the constructor (delay 0) are at step 0
    oialr = OIALR(model, optimizer, keep_last=False, cutoff=0.5, **settings)
    oialr.on_change(lambda change: changes.append((oialr.steps, change.name, *change.left.shape)))
    for step in range(1, steps + 1):
        optimizer.step()
        if calls is None or step in calls:
            oialr.step()
    return oialr, changes


def test_checks_fall_on_delay_and_every_further_interval():
    oialr, changes = converted_and_cut(3, 40, delay=10, every=7, layer_fraction=1)
    assert oialr.steps == 40
    assert {step for step, *_ in changes} == {10, 17, 24, 31, 38}
    at_conversion = [(name, before, after) for step, name, before, after in changes if step == 10]
    assert at_conversion == [(name, 8, 8) for name in ("0", "2", "4")], "conversion cuts nothing"
    assert all(after < before for step, _, before, after in changes if step == 17)


def test_layers_are_cut_from_the_last_to_the_first():
    _, changes = converted_and_cut(11, 60, delay=10, every=5, layer_fraction=0.25)
    names = [str(2 * i) for i in range(11)]  # activations stand between the layers
    for j, count in enumerate(GROWTH[11, 0.25], start=1):
        assert [name for step, name, *_ in changes if step == 10 + 5 * j] == names[11 - count :]


def test_measuring_starts_before_the_conversion_and_on_its_grid():
    model = mlp([8, 8, 8])
    optimizer = idle(model)
    oialr = OIALR(model, optimizer, delay=10, every=4)
    seen = []
    for _ in range(14):
        optimizer.step()
        oialr.step()
        seen.append(oialr.checks)
    assert seen == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4]  # checks at 2, 6, 10 (conversion) and 14


def test_delay_and_every_as_fractions_of_the_run():
    oialr, changes = converted_and_cut(2, 40, delay=0.25, every=0.1, total_steps=40, layer_fraction=1)
    assert oialr.delay == 10
    assert {step for step, *_ in changes} == {10, 14, 18, 22, 26, 30, 34, 38}


def test_a_late_call_makes_up_for_the_last_check_only():
    oialr, changes = converted_and_cut(2, 31, calls={9, 23, 24, 31}, delay=10, every=5, layer_fraction=1)
    assert [step for step, name, *_ in changes if name == "0"] == [23, 31]
    assert next((before, after) for _, name, before, after in changes if name == "0") == (8, 8)
    assert oialr.checks == 3  # at 9 for the one due at 5


def test_without_delay_the_layers_are_converted_at_once():
    oialr, changes = converted_and_cut(2, 10, delay=0, every=5, layer_fraction=1)
    assert oialr.frozen == {"0": True, "2": True}
    assert [step for step, name, *_ in changes if name == "0"] == [5, 10]


@pytest.mark.parametrize("widths", [[6, 10, 7], [10, 6, 7]])
def test_without_delay_the_first_stability_is_that_over_the_first_interval(widths):
    model = mlp(widths)
    optimizer = idle(model)
    oialr = OIALR(model, optimizer, delay=0, every=2, keep_last=False, cutoff=1e-9)
    assert oialr.stability == {}
    for _ in range(2):
        optimizer.step()
    oialr.step()
    assert oialr.stability == {"0": pytest.approx(1.0, abs=1e-5), "2": pytest.approx(1.0, abs=1e-5)}


def test_more_calls_than_steps_change_nothing():
    model = mlp([8, 8, 8])
    optimizer = idle(model)
    oialr = OIALR(model, optimizer, delay=3, every=1)
    x = torch.randn(4, 8)
    for _ in range(10):
        oialr.step()
        model(x).sum().backward()  # accumulation
        with torch.no_grad():
            model.eval()(x)
        model.train()
    assert (oialr.steps, oialr.checks) == (0, 0)
    assert oialr.frozen == {"0": False}


def test_the_smallest_layer_fraction_still_covers_a_layer():
    assert CheckSchedule(delay=0, every=1, layer_fraction=1e-9).covered(1, 10) == 1
