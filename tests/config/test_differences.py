import msgspec
import pytest

from hpclr.config import differences, parse_run_file
from hpclr.config.compare import FREE, GROWING

FILE = """\
name: digits
model: {target: 'a:b', args: {text: "%s-end"}}
data: {path: digits.h5, batch_size: 64}
optimizer: {lr: 1e-3}
method: {name: oialr, delay: 200, every: 100, exclude: [head]}
train: {epochs: 40}
""" % ("long" * 30)


def changed(*overrides, first=()):
    stored = parse_run_file(FILE, "run.yaml", first)
    return differences(stored, parse_run_file(FILE, "run.yaml", [*first, *overrides]))


def test_a_run_file_does_not_differ_from_itself():
    assert changed() == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.seed=1", "train.seed: 0 in the run, 1 now"),
        ("train.epochs=39", "train.epochs: 40 in the run, 39 now"),
        ("data.batch_size=32", "data.batch_size: 64 in the run, 32 now"),
        ("optimizer.betas=[0.9, 0.98]", "optimizer.betas: null in the run, [0.9, 0.98] now"),
        ("optimizer.args.fused=true", "optimizer.args.fused: absent in the run, true now"),
        ("method.exclude=[]", "method.exclude: ['head'] in the run, [] now"),
        ("method.cutoff=0.2", "method.cutoff: 0.1 in the run, 0.2 now"),
        ("method.name=dense", "method: 'oialr' in the run, 'dense' now"),
        ("model.name=mlp", "model: 'a:b' in the run, 'mlp' now"),
        ("name=other", "name: 'digits' in the run, 'other' now"),
    ],
)
def test_changes_of_the_result_are_listed(override, line):
    assert line in changed(override)


def test_what_differs_only_far_into_a_long_text_is_listed():
    assert len(changed(f"model.args.text={'long' * 30}-other")) == 1


def test_a_change_from_epochs_to_steps_is_listed():
    lines = ["train.epochs: 40 in the run, null now", "train.steps: null in the run, 10 now"]
    assert changed("train.epochs=null", "train.steps=10") == lines


def test_steps_may_grow_but_not_shrink():
    steps = ("train.epochs=null", "train.steps=10")
    assert changed("train.steps=11", first=steps) == []
    assert changed("train.steps=9", first=steps) == ["train.steps: 10 in the run, 9 now"]


@pytest.mark.parametrize(
    "override",
    [
        "train.epochs=41",
        "train.threads=3",
        "train.device=cpu",
        "data.path=elsewhere.h5",
        "data.in_memory=false",
        "validation.patience=3",
        "validation.every_steps=7",
        "checkpoint.every=10",
        "checkpoint.keep_best=false",
        "track.tensorboard=true",
        "track=null",
    ],
)
def test_what_may_change_is_not_listed(override):
    assert changed(override) == []


def test_what_may_change_are_keys_of_the_run_file():
    run = msgspec.to_builtins(parse_run_file(FILE, "run.yaml"))
    for key in [*FREE, *GROWING]:
        value = run
        for part in key.split("."):
            value = value[part]  # a KeyError names the key
