"""Runs with `method: {name: svd_training}`: resumed to the bit across the pruning, on two processes, looked at."""

import json
import re
from pathlib import Path

import pytest
import torch
from process_helpers import (  # noqa: F401 - the_tasks and the_team are fixtures
    FLOAT64,
    assert_same_result,
    own_model,
    the_tasks,
    the_team,
)
from training_helpers import SVD, VIT, as_killed_after, assert_same_run, hpclr, last_tree, records, summary

STRICT = {"timeout": 30, "verify_every": 1}
RESNET = {"name": "resnet20", "width": 4}
CASES = {
    "adamw, average": ({"train": {"ema": 0.8}}, (0, 2, 3, 5, 6, 9)),
    "spatial, sgd": (
        {
            "model": RESNET,
            "method": SVD | {"decomposition": "spatial", "init": "random", "prune_at": 4, "regularize_at": 1},
            "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True},
            "train": {"steps": 7},
        },
        (3, 4),
    ),
    "vit, accumulation, bf16": (
        {
            "model": VIT,
            "method": SVD | {"regularizer": "hoyer_square"},
            "train": {"micro_batch": 24, "clip_norm": 0.5, "precision": "bf16"},
        },
        (2, 6, 7),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_killed_anywhere_and_continued_to_the_bit(case, bench):
    sections, steps = CASES[case]
    sections = {"method": SVD} | sections
    reference = bench.train(checkpoint={"every": 1, "keep": 100}, **sections).rename(bench.path / "reference")
    (check,) = records(reference, "check")
    assert check["step"] == (4 if case == "spatial, sgd" else 6)
    assert all(
        check["ranks"][layer["name"]] <= min(layer["shape"])
        for layer in summary(reference)["layers"]
        if layer["converted"]
    )
    assert check["stored"] == check["trainable"]
    assert sum(check["ranks"].values()) < sum(min(x["shape"]) for x in summary(reference)["layers"] if x["converted"])
    for step in steps:
        as_killed_after(reference, step, bench.run)
        assert_same_run(reference, bench.train(checkpoint={"every": 1000}, **sections))
        bench.run.rename(bench.path / f"continued-{step}")


@pytest.mark.parametrize("decomposition", ["channel", "spatial"])
def test_two_processes_give_the_result_of_one(decomposition, team):
    sections = {
        "train": FLOAT64 | {"ema": 0.9, "micro_batch": 24},
        "parallel": STRICT,
        "method": SVD | {"decomposition": decomposition},
    }
    if decomposition == "spatial":
        sections["train"] |= {"micro_batch": None, "steps": 8}
        sections["model"] = {"target": "convolutions:make"}
        (team.bench.path / "convolutions.py").write_text(
            "from torch import nn\n"
            "def make():\n"
            "    parts = [nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, (3, 2), stride=2), nn.Flatten()]\n"
            "    return nn.Sequential(*parts, nn.Linear(72, 10))\n"
        )
    one = team.srun(1, **sections)
    assert one.ended() == [0], one.console
    one.run.rename(team.bench.path / "one")
    two = team.srun(2, **sections)
    assert two.ended() == [0, 0], two.console
    if decomposition == "channel":
        assert_same_result(team.bench.path / "one", two.run)
    a, b = (last_tree(run) for run in (team.bench.path / "one", two.run))
    weights = [key for key in a if key.startswith(("/model/", "/ema/averages/"))]
    assert len(weights) > 10
    assert all(torch.allclose(a[key], b[key], atol=1e-8) for key in weights)
    assert records(two.run, "check")[0]["ranks"] == records(team.bench.path / "one", "check")[0]["ranks"]
    if decomposition == "channel":
        assert "reduced a step" in two.console


def test_two_processes_stopped_before_the_pruning_and_continued_to_the_bit(team):
    sections = {"model": own_model(team.bench), "method": SVD, "parallel": STRICT}
    reference = team.srun(2, **sections)
    assert reference.ended() == [0, 0], reference.console
    reference.run.rename(team.bench.path / "reference")
    asked = team.srun(2, **sections, variables={"TROUBLE": "SIGTERM:1:4"})
    assert asked.ended() == [85, 85], asked.console
    assert "the run is saved at step 5 of 13" in asked.outcome()["message"]
    last = team.srun(2, **sections)
    assert last.ended() == [0, 0], last.console
    assert_same_run(team.bench.path / "reference", last.run)


@pytest.mark.parametrize("decomposition", ["channel", "spatial"])
def test_everything_that_looks_at_a_checkpoint_knows_the_form(decomposition, bench):
    method = SVD | {"decomposition": decomposition, "max_aspect": 100.0}
    run = bench.train(model=RESNET, method=method, train={"steps": 8, "ema": 0.5}, checkpoint={"every": 4})
    done = hpclr("verify", run)
    assert (done.code, done.out.count(": good, ")) == (0, 3), done
    score = hpclr("evaluate", run)
    assert score.code == 0, score.err
    assert f"{summary(run)['test']['accuracy']:.2%}" in score.out
    shown = hpclr("inspect", run)
    assert shown.code == 0, shown.err
    ranks = records(run, "check")[0]["ranks"]
    for name, rank in ranks.items():
        assert re.search(rf"{re.escape(name)} .*\b{rank}\b", shown.out), name
    assert len(ranks) >= 19
    assert hpclr("summary", run).code == 0
    sizes = summary(run)["sizes"]
    assert sizes["trainable"] == sizes["stored"]
    assert 0 < sizes["flops"] != sizes["dense_flops"]
    tree = last_tree(run)
    assert any(layer["spatial"] for layer in tree["/layers"].values()) == (decomposition == "spatial")
    assert {
        key.rsplit(".", 1)[1] for key in tree if key.startswith("/optimizer/state/") for key in [key.rsplit("/", 1)[0]]
    } >= {"u", "s", "vh"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prune_at": 13}, "method: prune_at is 13 but the run has 13 steps"),
        ({"regularize_at": 0.6}, "method: regularize_at must come before prune_at, found 0.6 and 0.5"),
        ({"decomposition": "tucker"}, "method.decomposition must be one of channel, spatial, found 'tucker'"),
        ({"energy": 1.0}, "method.energy must be a number >= 0 and < 1, found 1.0"),
        ({"cutoff": 0.1}, "method.cutoff is not a key of method with name: svd_training"),
        ({"exclude": ["layers.*", "head"]}, "method: the model has no layer that SVD training can convert"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(changes, said, bench):
    done = hpclr("train", bench.write(method=SVD | changes))
    assert done.code == 2
    assert said in " ".join(done.err.split())
    assert not bench.run.exists()


def test_the_example_of_the_jobs_trains(bench, digits):
    job = Path(__file__).parents[2] / "jobs" / "svd-training.yaml"
    done = hpclr("train", job, f"data.path={json.dumps(str(digits))}", "train.epochs=3", "train.threads=1")
    assert done.code == 0, done.err
    (check,) = records(bench.path / "runs" / "digits-svd-training", "check")
    assert sum(check["ranks"].values()) < 0.9 * 16 * 64
