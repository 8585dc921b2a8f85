"""`method.auto`: what it decides stands in the run file, and what it decides may not be given."""

import pytest

from hpclr.config import dump, parse_run_file
from hpclr.config.schema import OIALR_AUTO, EnergyRule, Oialr
from hpclr.errors import UsageError

TEXT = """\
name: a
model: {name: mlp}
data: {path: x.h5, batch_size: 1}
optimizer: {lr: 1}
train: {steps: 100}
method: {name: oialr, %s}
"""


def parse(keys, *overrides):
    return parse_run_file(TEXT % keys, "run.yaml", overrides)


def refusal(keys, *overrides):
    with pytest.raises(UsageError) as caught:
        parse(keys, *overrides)
    return str(caught.value)


def test_what_it_decides_is_spelt_out():
    run = parse("auto: true, min_rank: 0, exclude: [a]")
    assert {key: getattr(run.method, key) for key in OIALR_AUTO} == OIALR_AUTO
    assert (run.method.min_rank, run.method.exclude, run.method.keep_last) == (0, ("a",), True)
    text = dump(run)
    assert "rule: energy" in text
    assert parse_run_file(text, "run.yaml") == run


@pytest.mark.parametrize("given", ["delay: 0.3", "cutoff: 0.1", "cutoff: 0.2", "freeze: schedule", "keep_first: false"])
def test_a_key_that_it_decides_may_not_be_given_not_even_as_its_default(given):
    key = given.partition(":")[0]
    message = refusal(f"auto: true, {given}")
    assert message.startswith("run.yaml line 6: method.auto: true decides delay, every, cutoff,")
    assert f"{key} is given; leave {key} out" in message
    assert parse(f"{given}, delay: 0.3, every: 0.1" if key != "delay" else f"{given}, every: 0.1").method.auto is False


def test_its_own_decisions_may_be_given():
    given = "delay: 0.6, every: 0.05, cutoff: {rule: energy, share: 0.9998}, keep_first: true"
    assert parse(f"auto: true, {given}") == parse("auto: true")


def test_an_override_puts_it_in_the_place_of_what_it_decides():
    given = "delay: 0.3, every: 0.1, cutoff: 0.2, sigma_lr: 3, min_rank: 0"
    assert parse(given, "method.auto=true") == parse("auto: true, min_rank: 0")
    assert "delay is given" in refusal("auto: true", "method.delay=0.3")
    assert "delay is given" in refusal("delay: 0.3, every: 0.1", "method.auto=true", "method.delay=0.3")
    assert parse("delay: 0.3, every: 0.1", "method.auto=false").method.delay == 0.3
    assert "not a key of method with name: dense" in refusal("auto: true", "method.name=dense", "method.auto=true")


@pytest.mark.parametrize(
    ("keys", "missing"), [("delay: 3", "every is"), ("every: 3", "delay is"), ("max_cut: 1", "are")]
)
def test_without_it_a_moment_and_an_interval_are_needed(keys, missing):
    message = refusal(keys)
    assert missing in message
    assert "missing; give a number of steps, or a fraction of the run below 1, or leave it to method.auto" in message


def test_half_of_a_spectrum_does_not_tell_the_noise():
    assert "method.heat_rank: 0.6 or more" in refusal("auto: true, svd: heat")
    assert parse("auto: true, svd: heat, heat_rank: 0.6").method.svd == "heat"


def test_made_in_python_it_is_held_to_the_same():
    assert Oialr(auto=True).cutoff == EnergyRule(share=0.9998)
    with pytest.raises(ValueError, match="max_cut is given"):
        Oialr(auto=True, max_cut=0.4)
