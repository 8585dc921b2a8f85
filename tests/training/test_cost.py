"""What a run says it has cost: by hand, over resuming and processes, and where it cannot be known."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from process_helpers import FLOAT64, own_model, the_tasks, the_team  # noqa: F401 - the last two are fixtures
from training_helpers import OIALR, SVD, as_killed_after, assert_same_run, hpclr, last_tree, records, summary

from hpclr.checkpoint import CheckpointStore, Json
from hpclr.training.cost import pieces_of
from hpclr.training.memory import PeakMemory

DENSE = {"name": "dense"}
SAMPLES, BATCH = 270, 64  # of an epoch, of a batch: the last of five has 14
EVERY_STEP = {"every": 1, "keep": 100}


def seen_in(steps: int) -> int:
    """Samples in the first steps of a run."""
    return sum(min(BATCH, SAMPLES - step % 5 * BATCH) for step in range(steps))


def of_a_sample(sizes: tuple[int, ...]) -> int:
    """Forward, and the gradients of weights and inputs, of which the first layer has none."""
    products = [2 * n * m for n, m in pairwise(sizes)]
    return 3 * sum(products) - products[0]


DENSE_SAMPLE = of_a_sample((64, 32, 24, 10))


def test_a_dense_run(bench):
    run = bench.train(method=DENSE)
    cost = summary(run)["cost"]
    assert cost["training_flops"] == cost["dense_training_flops"] == seen_in(13) * DENSE_SAMPLE
    assert cost["gradient_bytes_mean"] == summary(run)["sizes"]["gradient_bytes"] == 4 * 3122
    assert cost["optimizer_bytes_peak"] == summary(run)["sizes"]["optimizer_bytes"]
    valid = records(run, "valid")
    assert [record["flops"] for record in valid] == [seen_in(record["step"]) * DENSE_SAMPLE for record in valid]
    seconds = [record["seconds"] for record in valid]
    assert sorted(seconds) == seconds
    assert seconds[0] > 0
    assert abs(seconds[-1] - summary(run)["seconds"]) < 5


@pytest.mark.parametrize("micro", [24, 64])
def test_accumulation_changes_the_pieces_and_not_the_sum(micro, bench):
    run = bench.train(method=DENSE, train={"micro_batch": micro})
    assert summary(run)["cost"]["training_flops"] == seen_in(13) * DENSE_SAMPLE


def test_a_run_whose_form_changes(bench):
    run = bench.train()
    cost = summary(run)["cost"]
    valid, checks = records(run, "valid"), records(run, "check")
    assert cost["dense_training_flops"] == seen_in(13) * DENSE_SAMPLE
    assert checks[0]["flops"] == checks[0]["dense_flops"] == seen_in(3) * DENSE_SAMPLE
    assert checks[1]["flops"] == seen_in(6) * DENSE_SAMPLE  # the conversion comes after the step
    assert valid[-1]["flops"] == cost["training_flops"] != cost["dense_training_flops"]
    sent = [checks[0]["dense_gradient_bytes"]] * 6 + [checks[1]["gradient_bytes"]] * 3
    sent += [checks[2]["gradient_bytes"]] * 3 + [checks[3]["gradient_bytes"]]
    assert cost["gradient_bytes_mean"] == pytest.approx(sum(sent) / 13)
    assert cost["optimizer_bytes_peak"] == checks[0]["optimizer_bytes"] > checks[-1]["optimizer_bytes"]


def test_a_low_rank_step_costs_what_its_products_take(bench):
    """One layer of rank k in the way through the factors, too small for folding; after a conversion cut at once."""
    method = OIALR | {"delay": 1, "every": 1, "cutoff": 0.9, "layer_fraction": 1.0, "max_cut": 1.0, "keep_last": False}
    run = bench.train(model={"name": "mlp", "hidden": []}, method=method, train={"steps": 3, "micro_batch": 50})
    first, second = (record["ranks"]["head"] for record in records(run, "check")[:2])
    assert (first, second < 5) == (10, True)
    flops = [record["flops"] for record in records(run, "check")]

    def step(k: int) -> int:
        return sum(
            2 * rows * k * 64 + 2 * rows * 10 * k + 2 * k * k * rows + 2 * rows * k * (10 + k) for rows in (50, 14)
        )

    assert flops[2] - flops[1] == step(second)


def test_the_penalty_counts_in_every_piece(bench):
    method, costs = SVD | {"prune_at": 1, "regularize_at": 0, "energy": 0.0}, {}
    for strength in (1.0, 0.0):
        train = {"steps": 2, "micro_batch": 24}  # three pieces
        run = bench.train("--fresh", method=method | {"orthogonality": strength}, train=train)
        costs[strength] = summary(run)["cost"]["training_flops"]
    shapes = [layer["shape"] for layer in summary(run)["layers"] if layer["converted"]]
    assert shapes == [[32, 64], [24, 32]]
    gram = sum(6 * min(shape) ** 2 * sum(shape) for shape in shapes)  # UᵀU and VᵀV, and two products back for each
    assert costs[1.0] - costs[0.0] == 2 * 3 * gram


@pytest.mark.parametrize("method", [OIALR, SVD])
def test_resumed_anywhere(method, bench):
    reference = bench.train(method=method, checkpoint=EVERY_STEP).rename(bench.path / "reference")
    for step in (2, 6, 9):
        as_killed_after(reference, step, bench.run)
        assert_same_run(reference, bench.train(method=method))
        bench.run.rename(bench.path / f"continued-{step}")


def test_many_processes_train_the_same_batch(team):
    sections = {"model": own_model(team.bench), "train": FLOAT64 | {"micro_batch": 24}, "method": SVD}
    found = []
    for size in (1, 2):
        started = team.srun(size, **sections)
        assert started.ended() == [0] * size, started.console
        found.append(summary(started.run)["cost"])
        started.run.rename(team.bench.path / f"of-{size}")
    one, two = found
    assert one["dense_training_flops"] == two["dense_training_flops"]
    assert one["gradient_bytes_mean"] == two["gradient_bytes_mean"]
    assert two["training_flops"] > one["training_flops"]  # more pieces: the penalty once in each


@pytest.mark.parametrize(
    ("batch", "processes", "most", "pieces"),
    [
        (64, 1, None, {64: 1}),
        (64, 1, 24, {24: 2, 16: 1}),
        (64, 1, 100, {64: 1}),
        (17, 4, None, {4: 3, 5: 1}),
        (17, 4, 2, {2: 8, 1: 1}),
        (1, 4, None, {1: 4}),
    ],
)
def test_pieces(batch, processes, most, pieces):
    assert pieces_of(batch, processes, most) == pieces


LOOKS = """
from torch import nn

class Looks(nn.Sequential):
    def forward(self, x):
        return super().forward(x if float(x.sum()) < 1e9 else -x)

def make():
    return Looks(nn.Flatten(), nn.Linear(64, 10))
"""


def test_a_model_that_cannot_be_counted_is_trained_and_warned_about_once(bench):
    (bench.path / "looks.py").write_text(LOOKS)
    sections = {"model": {"target": "looks:make"}, "method": DENSE, "checkpoint": EVERY_STEP}
    with pytest.warns(UserWarning, match="could not be counted") as caught:
        run = bench.train(**sections)
    assert sum("could not be counted" in str(warning.message) for warning in caught) == 1
    cost = summary(run)["cost"]
    assert cost["training_flops"] is cost["dense_training_flops"] is summary(run)["sizes"]["flops"] is None
    assert cost["gradient_bytes_mean"] == 4 * 650
    assert {record["flops"] for record in records(run, "valid")} == {None}
    shown = hpclr("summary", run)
    assert shown.code == 0
    assert re.search("FLOPs of training +│ +– │", shown.out)


RANDOM = """
import random
import numpy, torch
from torch import nn

calls = []

class Draws(nn.Sequential):
    def forward(self, x):
        if x.is_meta:
            calls.append([random.random(), numpy.random.rand(), float(torch.rand(()))])
        return super().forward(x)

def make():
    model = Draws(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.3), nn.Linear(32, 10))
    model[1].register_forward_hook(lambda module, inputs, output: output + 0)
    return model
"""


def test_counting_does_not_change_what_is_trained(bench, monkeypatch):
    (bench.path / "drawing.py").write_text(RANDOM)
    sections = {"model": {"target": "drawing:make"}}
    counted = bench.train(**sections).rename(bench.path / "counted")
    monkeypatch.setattr("hpclr.training.cost.Meter._flops", lambda self, step: (None, None))
    plain = bench.train(**sections)
    a, b = last_tree(counted), last_tree(plain)
    for tree in (a, b):
        tree["/position"].pop("flops"), tree["/position"].pop("dense_flops")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a)


def test_a_checkpoint_that_does_not_know_what_came_before(bench):
    """One of an earlier version of hpclr."""
    reference = bench.train(checkpoint=EVERY_STEP).rename(bench.path / "reference")
    run = as_killed_after(reference, 7, bench.run)
    store = CheckpointStore(run / "checkpoints")
    tree = dict(store.load(7).tree)
    known = ("step", "seconds", "best_scores", "best_step", "validations_since_best", "finished")
    tree["position"] = Json({key: tree["position"].value[key] for key in known})
    store.path(7).with_suffix(".h5.sha256").unlink()
    store.path(7).unlink()
    store.save(7, tree)
    continued = bench.train()
    cost = summary(continued)["cost"]
    assert set(cost.values()) == {None}
    assert records(continued, "valid")[-1]["flops"] is None
    assert summary(continued)["sizes"]["flops"] == summary(reference)["sizes"]["flops"]
    assert hpclr("summary", continued).code == 0


def test_summaries_of_earlier_versions_are_shown(bench):
    run = bench.train()
    found = summary(run)
    del found["cost"]
    (run / "summary.json").write_text(json.dumps(found))
    shown = hpclr("summary", run)
    assert shown.code == 0, shown.err
    assert re.search("FLOPs of training +│ +– │", shown.out)


# Memory


def test_peak_memory_begins_anew_and_is_that_of_the_time_between():
    block = bytearray(64 << 20)
    memory = PeakMemory(torch.device("cpu"))
    if memory.of != "process":
        pytest.skip("the system does not let a peak begin anew")
    before = memory.bytes()
    del block
    again = PeakMemory(torch.device("cpu"))
    assert again.bytes() < before - (32 << 20)
    block = bytearray(96 << 20)
    del block
    assert again.bytes() > before


def test_where_the_peak_cannot_begin_anew(monkeypatch, tmp_path):
    monkeypatch.setattr("hpclr.training.memory._RESET", tmp_path / "missing" / "clear_refs")
    memory = PeakMemory(torch.device("cpu"))
    assert memory.of == "process since its start"
    assert memory.bytes() > 50 << 20


def test_the_peak_is_the_largest_of_all_attempts(bench):
    reference = bench.train(method=DENSE, checkpoint=EVERY_STEP).rename(bench.path / "reference")
    run = as_killed_after(reference, 7, bench.run)
    with_more(CheckpointStore(run / "checkpoints"), 1 << 40)
    cost = summary(bench.train(method=DENSE))["cost"]
    assert cost["peak_memory_bytes"] == 1 << 40
    assert 1 << 20 < summary(reference)["cost"]["peak_memory_bytes"] < 1 << 40
    assert cost["peak_memory_of"] in ("process", "process since its start")


@pytest.mark.parametrize("of", ["cuda", None])
def test_peaks_of_different_memory_are_not_compared(of, bench):
    reference = bench.train(method=DENSE, checkpoint=EVERY_STEP).rename(bench.path / "reference")
    run = as_killed_after(reference, 7, bench.run)
    with_more(CheckpointStore(run / "checkpoints"), 1 << 40, peak_memory_of=of)
    cost = summary(bench.train(method=DENSE))["cost"]
    assert cost["peak_memory_bytes"] is cost["peak_memory_of"] is None
    assert cost["training_flops"] == summary(reference)["cost"]["training_flops"]


def with_more(store: CheckpointStore, peak: int, **others: str | None) -> Path:
    tree = dict(store.load(7).tree)
    tree["position"] = Json(tree["position"].value | {"peak_memory": peak} | others)
    store.path(7).with_suffix(".h5.sha256").unlink()
    store.path(7).unlink()
    return store.save(7, tree)
