"""Runs with `method: {name: truncate|fixed_rank|cuttlefish|nested}`: resumed to the bit, on two processes, seen."""

import re

import pytest
import torch
from process_helpers import FLOAT64, assert_same_result, the_tasks, the_team  # noqa: F401 - fixtures
from training_helpers import VIT, as_killed_after, assert_same_run, hpclr, last_tree, records, summary

STRICT = {"timeout": 30, "verify_every": 1}
# of 13 steps: the conversion after 6, or before the first
TRUNCATE = {"name": "truncate", "at": 0.5, "rank": 0.3}
FIXED = {"name": "fixed_rank", "rank": 0.3, "frobenius_decay": 0.001}
CUTTLEFISH = {"name": "cuttlefish", "every": 2, "delay": 6, "window": 3, "frobenius_decay": 0.001}
NESTED = {"name": "nested", "fractions": [0.6, 0.3, 0.1], "delay": 4}
METHODS = {"truncate": TRUNCATE, "fixed_rank": FIXED, "cuttlefish": CUTTLEFISH, "nested": NESTED}
DECAYING = {"name": "adamw", "lr": 0.02, "weight_decay": 0.1}
CASES = {
    "truncate by a rule, average": (
        {"method": TRUNCATE | {"rank": {"rule": "energy", "share": 0.7}}, "train": {"ema": 0.8}},
        (0, 5, 6, 7, 12),
    ),
    "random, vit, accumulation, bf16": (
        {
            "model": VIT,
            "method": FIXED | {"init": "random", "max_aspect": 20.0},
            "train": {"micro_batch": 24, "clip_norm": 0.5, "precision": "bf16"},
        },
        (0, 4),
    ),
    "nested by layers, accumulation, average": (
        {
            "method": NESTED | {"draw": "layer", "nesting": "sequential"},
            "optimizer": DECAYING,
            "train": {"micro_batch": 24, "ema": 0.8},
        },
        (0, 3, 4, 7),
    ),
    "cuttlefish, Frobenius decay, average": (
        {
            "method": CUTTLEFISH,
            "optimizer": DECAYING | {"name": "nadam"},
            "train": {"ema": 0.8},
        },
        (1, 4, 6, 9),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_killed_anywhere_and_continued_to_the_bit(case, bench):
    sections, steps = CASES[case]
    reference = bench.train(checkpoint={"every": 1, "keep": 100}, **sections).rename(bench.path / "reference")
    layers = [layer for layer in summary(reference)["layers"] if layer["converted"]]
    assert layers
    assert all(layer["rank"] < min(layer["shape"]) for layer in layers)
    for step in steps:
        as_killed_after(reference, step, bench.run)
        assert_same_run(reference, bench.train(checkpoint={"every": 1000}, **sections))
        bench.run.rename(bench.path / f"continued-{step}")


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_give_the_result_of_one(name, team):
    sections = {
        "train": FLOAT64 | {"ema": 0.9, "micro_batch": 24},
        "parallel": STRICT,
        "method": METHODS[name],
        "optimizer": DECAYING,
    }
    one = team.srun(1, **sections)
    assert one.ended() == [0], one.console
    one.run.rename(team.bench.path / "one")
    two = team.srun(2, **sections)
    assert two.ended() == [0, 0], two.console
    assert_same_result(team.bench.path / "one", two.run)
    a, b = (last_tree(run) for run in (team.bench.path / "one", two.run))
    weights = [key for key in a if key.startswith(("/model/", "/ema/averages/"))]
    assert sum(key.endswith(("/u", ".u")) for key in weights) >= 2
    assert all(torch.allclose(a[key], b[key], atol=1e-8) for key in weights)
    assert summary(two.run)["sizes"]["ranks"] == summary(team.bench.path / "one")["sizes"]["ranks"]


@pytest.mark.parametrize("name", METHODS)
def test_everything_that_looks_at_a_checkpoint_knows_the_form(name, bench):
    run = bench.train(method=METHODS[name], optimizer=DECAYING, train={"ema": 0.5}, checkpoint={"every": 4})
    done = hpclr("verify", run)
    assert (done.code, "not good" in done.out) == (0, False), done
    score = hpclr("evaluate", run)
    assert score.code == 0, score.err
    assert f"{summary(run)['test']['accuracy']:.2%}" in score.out
    tree, sizes = last_tree(run), summary(run)["sizes"]
    assert sizes["ranks"]
    assert sizes["stored"] - sizes["trainable"] == sum(sizes["ranks"].values())
    assert sizes["dense_gradient_bytes"] == 4 * sizes["dense"]
    groups = [name for group in tree["/optimizer/groups"] for name in group["params"]]
    shown = hpclr("inspect", run)
    for layer, rank in sizes["ranks"].items():
        u, s, vh = (tree[f"/model/{layer}.{factor}"] for factor in ("u", "s", "vh"))
        assert torch.equal(s, torch.ones(rank))
        assert f"{layer}.s" not in groups
        assert {f"{layer}.u", f"{layer}.vh"} <= set(groups)
        first = torch.linalg.matrix_norm(u.double() @ vh.double(), 2).item()
        assert re.search(rf"{re.escape(layer)} .*\b{rank}\b.* {first:.4g} ", shown.out), shown.out
    dense = bench.path / "dense.pt"
    assert hpclr("export", run, dense).code == 0
    layer = next(iter(sizes["ranks"]))
    averages = (tree[f"/ema/averages/{layer}.{factor}"] for factor in ("u", "vh"))
    left, right = (factor.double() for factor in averages)
    exported = torch.load(dense, weights_only=True)[f"{layer}.weight"]
    assert torch.allclose(exported.double(), left @ right, atol=1e-6)


def test_the_checks_are_recorded(bench):
    run = bench.train(method=CUTTLEFISH, optimizer=DECAYING)
    found = records(run, "check")
    assert [check["step"] for check in found] == [2, 4, 6]
    assert [bool(check["ranks"]) for check in found] == [True] * 3
    assert found[-1]["stored"] < found[0]["stored"]
    (check,) = records(bench.train("--fresh", method=TRUNCATE), "check")
    assert (check["step"], check["failures"]) == (6, 0)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (TRUNCATE | {"at": 13}, "method: at is 13 but the run has 13 steps"),
        (CUTTLEFISH | {"delay": 20}, "method: delay is 20 but the run has 13 steps"),
        (CUTTLEFISH | {"window": 4}, "method: window·every is 4·2 = 8 steps, but delay 6: only 3 of"),
        (TRUNCATE | {"rank": 1.5}, "method.rank must be a number > 0 and <= 1, or a section with rule"),
        (TRUNCATE | {"rank": {"rule": "energy"}}, "method.rank.share is missing"),
        (FIXED | {"rank": {"rule": "energy", "share": 0.5}}, "method.rank must be a number > 0 and <= 1"),
        (FIXED | {"frobenius_decay": -1}, "method.frobenius_decay must be a number >= 0 or null, found -1"),
        (CUTTLEFISH | {"at": 3}, "method.at is not a key of method with name: cuttlefish"),
        (FIXED | {"exclude": ["layers.*", "head"]}, "method: the model has no layer that fixed rank can convert"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(method, said, bench):
    done = hpclr("train", bench.write(method=method))
    assert done.code == 2
    assert said in " ".join(done.err.split())
    assert not bench.run.exists()
