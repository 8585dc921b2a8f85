"""`hpclr evaluate` and `hpclr export` with `--rank-fraction` and `--calibrate`."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import hpclr, summary

from hpclr.lowrank import load_state_dict
from hpclr.models import MLP

NESTED = {"name": "nested", "delay": 0.3, "keep_last": False}
SHORT = {"train": {"steps": 40}, "checkpoint": {"every": 100}, "validation": {"every_steps": 40}}
FRACTIONS = "1,.5,.25"


def points(run, *options):
    done = hpclr("evaluate", run, "--rank-fraction", FRACTIONS, "--json", *options)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    return found["points"]


def test_the_table_of_a_nested_run(bench):
    run = bench.train(method=NESTED, **SHORT)
    done = hpclr("evaluate", run, "--rank-fraction", FRACTIONS)
    assert done.code == 0, done.err
    rows = [re.split(r"\s*│\s*", line)[1:-1] for line in done.out.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["1", "0.5", "0.25"]
    found, full = points(run), summary(run)
    assert rows[0][1] == f"{full['test']['accuracy']:.2%}"  # all directions: the score of the run
    for row, point in zip(rows, found, strict=True):
        assert row[1] == f"{point['score']['accuracy']:.2%}"
        assert row[3] == f"{point['sizes']['stored']:,}"
    assert found[0]["sizes"]["stored"] == found[0]["sizes"]["dense"] == full["sizes"]["dense"]
    shapes = [layer["shape"] for layer in full["layers"]]
    for point in found[1:]:
        ranks = {layer["name"]: math.ceil(point["fraction"] * min(layer["shape"])) for layer in full["layers"]}
        kept = {name: k for (name, k), (m, n) in zip(ranks.items(), shapes, strict=True) if k * (m + n + 1) < m * n}
        assert point["sizes"]["ranks"] == kept
        assert point["sizes"]["flops"] < point["sizes"]["dense_flops"]


@pytest.mark.parametrize("method", ["nested", "dense", "oialr"])
@pytest.mark.parametrize("calibrate", [(), ("--calibrate", 200)])
def test_what_is_exported_is_what_was_scored(method, calibrate, bench):
    sections = {"nested": {"method": NESTED}, "dense": {"method": {"name": "dense"}}, "oialr": {}}[method]
    run = bench.train(**sections, **SHORT | {"train": {"steps": 40, "ema": 0.9}})
    scored = points(run, *calibrate)[2]
    files = [bench.path / name for name in ("dense.safetensors", "factored.safetensors")]
    for file, options in zip(files, ((), ("--factored",)), strict=True):
        done = hpclr("export", run, file, "--rank-fraction", 0.25, *calibrate, *options)
        assert done.code == 0, done.err
        assert "at 0.25 of full rank" in done.out
    dense, factored = map(load_file, files)
    assert sum(value.numel() for value in factored.values()) == scored["sizes"]["stored"]
    assert sum(value.numel() for value in dense.values()) == scored["sizes"]["dense"]
    model, small = MLP((1, 8, 8), 10, hidden=(32, 24)), MLP((1, 8, 8), 10, hidden=(32, 24))
    model.load_state_dict(dense)
    load_state_dict(small, factored)
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model(x), small(x), atol=1e-5)
    again = bench.path / "again.safetensors"
    assert hpclr("export", run, again, "--rank-fraction", 0.25, *calibrate).code == 0
    assert all(torch.equal(value, dense[name]) for name, value in load_file(again).items())  # samples by the seed


def test_directions_of_a_nested_run_are_those_that_training_has_put_first(bench):
    run = bench.train(method=NESTED, **SHORT)
    whole, part = bench.path / "whole.pt", bench.path / "part.pt"
    assert hpclr("export", run, whole, "--factored").code == 0
    assert hpclr("export", run, part, "--factored", "--rank-fraction", 0.25).code == 0
    whole, part = (torch.load(file, weights_only=True)["state_dict"] for file in (whole, part))
    cut = [name for name in part if name.endswith(".u")]
    assert cut
    for name in cut:
        assert torch.equal(part[name], whole[name][:, : part[name].shape[1]])


def test_batch_norms_are_calibrated_too(bench):
    model = {"name": "resnet20", "width": 4}
    sections = {"train": {"steps": 4}, "data": {"batch_size": 32}, "checkpoint": {"every": 100}}
    run = bench.train(model=model, method={"name": "dense"}, **sections)
    plain, calibrated = points(run), points(run, "--calibrate", 128)
    assert plain[0]["score"] == pytest.approx(calibrated[0]["score"], rel=1e-3)  # nothing is cut
    assert plain[2]["score"]["loss"] != pytest.approx(calibrated[2]["score"]["loss"], rel=1e-2)
    states = []
    for options in ((), ("--calibrate", 128)):
        file = bench.path / f"{len(options)}.safetensors"
        assert hpclr("export", run, file, "--rank-fraction", 0.25, *options).code == 0
        states.append(load_file(file))
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0] if "running_var" in name)


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("evaluate", ("--rank-fraction", "1,2"), "'2' is no share of full rank: a number above 0 and at most 1"),
        ("evaluate", ("--rank-fraction", "half"), "'half' is no share of full rank"),
        ("evaluate", ("--calibrate", "9"), "--calibrate orders what --rank-fraction cuts: give both"),
        ("evaluate", ("--json",), "--json goes with --rank-fraction"),
        ("evaluate", ("--rank-fraction", "1", "--calibrate", "9999"), "9,999 training samples are asked for, it has"),
        ("export", ("--rank-fraction", "0"), "'0' is no share of full rank"),
        ("export", ("--rank-fraction", "1", "--adapter"), "--adapter goes with none of --format, --trust,"),
        ("export", ("--calibrate", "9"), "--calibrate orders what --rank-fraction cuts: give both"),
    ],
)
def test_what_makes_no_sense_is_refused(command, options, said, bench):
    run = bench.train(method={"name": "dense"}, train={"steps": 2})
    out = bench.path / "out.safetensors"
    done = hpclr(command, run, *([out] if command == "export" else []), *options)
    assert done.code == 2
    assert said in " ".join(done.err.split())
    assert not out.exists()


def test_a_model_without_layers_to_cut_is_refused(bench):
    run = bench.train(model={"name": "mlp", "hidden": []}, method={"name": "dense"}, train={"steps": 2})
    done = hpclr("evaluate", run, "--rank-fraction", "1")
    assert (done.code, "no layer that could be cut" in " ".join(done.err.split())) == (2, True), done.err
