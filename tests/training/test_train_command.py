"""`hpclr train`: what a run leaves behind, how it goes on, starts over, ends early and keeps its checkpoints."""

import json

import h5py
import pytest
from training_helpers import OIALR, hpclr, last_tree, records, steps_kept, summary

from hpclr.config import load_run_file


def test_a_run_directory_is_complete(bench):
    done = hpclr("train", bench.write())
    assert done.code == 0, done.err
    assert done.out == "runs/run\n"
    assert {path.name for path in bench.run.iterdir()} == {
        ".locks",
        "checkpoints",
        "environment.json",
        "logs",
        "metrics.jsonl",
        "run.yaml",
        "summary.json",
    }
    assert load_run_file(bench.run / "run.yaml") == load_run_file(bench.path / "run.yaml")
    with h5py.File(bench.run / "checkpoints" / "step-00000013.h5") as file:
        assert file.attrs["step"] == 13
    (attempt,) = json.loads((bench.run / "environment.json").read_text())["attempts"]
    assert attempt["threads"] == 1
    assert attempt["packages"]["torch"].startswith("2.")


def test_what_the_metrics_hold(bench):
    run = bench.train()
    train = records(run, "train")
    assert [record["step"] for record in train] == list(range(1, 14))
    assert [record["epoch"] for record in train] == [0] * 5 + [1] * 5 + [2] * 3
    assert all(0 < record["loss"] < 5 and record["lr"] == 0.003 for record in train)
    assert [record["step"] for record in records(run, "valid")] == [4, 8, 12, 13]
    checks = records(run, "check")
    assert [record["step"] for record in checks] == [3, 6, 9, 12]
    assert checks[0]["ranks"].keys() == {"layers.1", "layers.4"}
    assert not any(checks[0]["frozen"].values())
    assert all(checks[1]["frozen"].values())
    assert checks[-1]["trainable"] < checks[0]["trainable"] == checks[0]["dense"]
    assert checks[-1]["optimizer_bytes"] < checks[0]["optimizer_bytes"]
    (final,) = records(run, "final")
    assert {**summary(run), "kind": "final", "step": 13, "time": final["time"]} == final


def test_what_the_summary_holds(bench):
    found = summary(bench.train())
    assert found["name"], found["method"] == ("run", "oialr")
    assert found["steps"] == 13
    assert found["test"]["samples"] == 300
    best = max(records(bench.run, "valid"), key=lambda record: record["accuracy"])
    assert found["best_validation"] == {name: best[name] for name in ("accuracy", "loss", "step")}
    dense = 64 * 32 + 32 + 32 * 24 + 24 + 24 * 10 + 10
    assert found["sizes"]["dense"] == dense
    ranks = {layer["name"]: layer["rank"] for layer in found["layers"] if layer["converted"]}
    biases_and_head = 32 + 24 + 24 * 10 + 10
    assert found["sizes"]["trainable"] == sum(rank**2 for rank in ranks.values()) + biases_and_head


def test_it_learns(bench):
    run = bench.train(train={"steps": 60}, optimizer={"name": "adamw", "lr": 0.01})
    assert summary(run)["test"]["accuracy"] > 0.8


def test_runs_live_where_one_says(bench, monkeypatch):
    file = bench.write(train={"steps": 2})
    assert hpclr("train", file, "--runs-dir", "a/b").out == "a/b/run\n"
    monkeypatch.setenv("HPCLR_RUNS", str(bench.path / "elsewhere"))
    assert hpclr("train", file).out == f"{bench.path}/elsewhere/run\n"
    assert hpclr("train", file, "--runs-dir", "c", "name=other").out == "c/other\n"
    assert not (bench.path / "runs").exists()


def test_overrides_change_the_run(bench):
    run = bench.train("method.name=dense", "train.steps=2", "name=short")
    assert not run.exists()
    assert summary(run.with_name("short"))["method"] == "dense"
    assert summary(run.with_name("short"))["steps"] == 2


def test_a_finished_run_says_so(bench):
    bench.train()
    before = bench.listing()
    done = hpclr("train", bench.write())
    assert done.code == 0
    assert "runs/run: this run is finished (step 13); --fresh starts it over" in done.err
    assert bench.listing() == before


def test_a_summary_that_is_missing_is_made_good(bench):
    bench.train()
    before = summary(bench.run)
    (bench.run / "summary.json").unlink()
    bench.train()
    assert summary(bench.run) == before
    assert len(records(bench.run, "final")) == 1


def test_more_epochs_continue(bench):
    """Under a constant learning rate the longer run is the one that was asked for at once."""
    method = OIALR | {"delay": 6, "every": 3}
    bench.train(train={"epochs": 2}, method=method)
    assert records(bench.run)[-1]["kind"] == "final"
    bench.train(train={"epochs": 3}, method=method)
    assert [record["step"] for record in records(bench.run, "train")] == list(range(1, 16))
    assert summary(bench.run)["steps"] == 15
    assert len(json.loads((bench.run / "environment.json").read_text())["attempts"]) == 2
    assert load_run_file(bench.run / "run.yaml").train.epochs == 3
    weights = last_tree(bench.run)
    bench.train("--fresh", train={"epochs": 3}, method=method)
    assert all((weights[key] == value).all() for key, value in last_tree(bench.run).items() if "/model/" in key)


def test_a_run_that_is_being_made_longer_has_no_old_summary(bench):
    """Else a run killed on the way would pass as finished."""
    (bench.path / "failing.py").write_text(FAILING)
    sections = {"model": {"target": "failing:Net"}, "method": {"name": "dense"}}
    bench.train(train={"steps": 5}, **sections)
    assert (bench.run / "summary.json").exists()
    bench.train(train={"steps": 30}, **sections, code=1)
    assert not (bench.run / "summary.json").exists()
    done = hpclr("summary", bench.run)
    assert done.code == 2
    assert "has not finished" in done.err


FAILING = """
from torch import nn

class Net(nn.Linear):
    seen = 0

    def __init__(self):
        super().__init__(64, 10)

    def forward(self, x):
        self.seen += self.training
        if self.seen > 6:  # five steps, after the look at the smallest piece
            raise RuntimeError("out of memory, let us say")
        return super().forward(x.flatten(1))
"""


@pytest.mark.parametrize(
    ("sections", "listed"),
    [
        ({"train": {"seed": 5}}, ["train.seed: 0 in the run, 5 now"]),
        ({"train": {"steps": 12}}, ["train.steps: 13 in the run, 12 now"]),
        (
            {"method": OIALR | {"cutoff": 0.5}, "data": {"batch_size": 32}},
            ["method.cutoff: 0.3 in the run, 0.5 now", "data.batch_size: 64 in the run, 32 now"],
        ),
        ({"method": {"name": "dense"}}, ["method: 'oialr' in the run, 'dense' now"]),
    ],
)
def test_another_run_file_is_refused_with_the_differences(sections, listed, bench):
    bench.train()
    before = bench.listing()
    done = hpclr("train", bench.write(**sections))
    assert done.code == 2
    for text in ["runs/run holds a run of another run file", *listed, "--fresh"]:
        assert text in done.err
    bench.write()
    assert bench.listing() == before


def test_fresh_sets_the_old_run_aside(bench):
    bench.train()
    old = (bench.run / "metrics.jsonl").read_bytes()
    for number in (1, 2):
        done = hpclr("train", bench.write(train={"seed": number}), "--fresh")
        assert done.code == 0
        assert f"the run that was in runs/run is now in runs/run.old-{number}" in done.err
    assert (bench.run.with_name("run.old-1") / "metrics.jsonl").read_bytes() == old
    assert {path.name for path in (bench.path / "runs").iterdir()} == {"run", "run.old-1", "run.old-2"}


def test_fresh_where_there_is_nothing_just_trains(bench):
    bench.train("--fresh", train={"steps": 2})
    assert [path.name for path in (bench.path / "runs").iterdir()] == ["run"]


def test_fresh_with_a_fault_leaves_the_old_run_where_it_is(bench):
    bench.train(train={"steps": 2})
    before = bench.listing()
    assert hpclr("train", bench.write(train={"steps": 2}), "--fresh", "data.batch_size=1000000").code == 2
    assert bench.listing() == before


def test_a_start_that_was_killed_at_once_is_in_nobodys_way(bench):
    bench.run.mkdir(parents=True)
    (bench.run / ".locks").mkdir()
    for name in (".locks/.tmp-0123456789abcdef", ".tmp-run.yaml-x", ".meeting-0123.json", ".nonce-0123"):
        (bench.run / name).write_text("half")
    bench.train(train={"steps": 2})
    assert summary(bench.run)["steps"] == 2


@pytest.mark.parametrize("keep", [2, 4])
def test_the_newest_are_kept_and_the_best(keep, bench):
    run = bench.train(checkpoint={"every": 2, "keep": keep}, train={"steps": 30}, validation={"every_steps": 6})
    saved = {*range(2, 31, 2)}
    best = summary(run)["best_validation"]["step"]
    assert json.loads((run / "checkpoints" / "best.json").read_text())["step"] == best
    assert steps_kept(run) == sorted({*sorted(saved)[-keep:], best})


def test_without_keep_best_only_the_newest_are_kept(bench):
    run = bench.train(checkpoint={"every": 2, "keep": 2, "keep_best": False}, train={"steps": 12})
    assert steps_kept(run) == [10, 12]


def test_the_very_first_state_and_the_last_are_saved(bench):
    run = bench.train(checkpoint={"every": 1000, "keep": 5, "keep_best": False}, train={"steps": 7})
    assert steps_kept(run) == [0, 7]


STALE = {"optimizer": {"name": "sgd", "lr": 1e-12}, "validation": {"every_steps": 2, "patience": 3}}


def test_early_stopping_after_validations_without_improvement(bench):
    """With a learning rate of nothing the first validation stays the best."""
    run = bench.train(train={"steps": 40}, **STALE)
    assert [record["step"] for record in records(run, "valid")] == [2, 4, 6, 8]
    assert summary(run)["steps"] == 8
    assert summary(run)["best_validation"]["step"] == 2
    assert steps_kept(run)[-1] == 8
    assert "this run is finished (step 8)" in hpclr("train", bench.write(train={"steps": 40}, **STALE)).err


def test_a_run_that_stopped_early_goes_on_with_more_patience(bench):
    bench.train(train={"steps": 40}, **STALE)
    run = bench.train(train={"steps": 40}, **STALE | {"validation": {"every_steps": 2, "patience": 5}})
    assert summary(run)["steps"] == 12


def test_a_run_with_patience_that_was_not_needed_can_be_made_longer(bench):
    patient = {"validation": {"every_steps": 2, "patience": 50}}
    bench.train(train={"steps": 6}, **patient)
    assert summary(bench.train(train={"steps": 9}, **patient))["steps"] == 9


@pytest.mark.parametrize(
    ("validation", "steps"),
    [({"every_steps": 3}, [3, 6, 9, 12, 13]), ({"every_epochs": 0.4}, [2, 4, 6, 8, 10, 12, 13]), ({}, [5, 10, 13])],
)
def test_when_it_validates(validation, steps, bench):
    file = bench.write()
    run = json.loads(file.read_text())
    run["validation"] = validation
    file.write_text(json.dumps(run))
    assert hpclr("train", file).code == 0
    assert [record["step"] for record in records(bench.run, "valid")] == steps


def test_other_data_under_the_same_name_is_refused(bench):
    bench.train(train={"steps": 3})
    other = bench.path / "other.h5"
    hpclr("data", "prepare", "digits", other, "--limit", "300", "--seed", "1", "--valid-fraction", "0.1")
    before = bench.listing()
    done = hpclr("train", bench.write(train={"steps": 4}, data={"path": str(other)}))
    assert done.code == 2
    assert "was trained on data with digest" in done.err
    assert set(bench.listing()) == set(before)


def test_the_same_data_elsewhere_is_the_same_data(bench):
    bench.train(train={"steps": 3})
    (bench.path / "moved.h5").write_bytes(bench.digits.read_bytes())
    run = bench.train(train={"steps": 4}, data={"path": "moved.h5"})
    assert summary(run)["steps"] == 4


def test_a_damaged_newest_checkpoint_is_set_aside(bench):
    run = bench.train(checkpoint={"every": 5})
    expected = last_tree(run)
    (run / "summary.json").unlink()
    newest = run / "checkpoints" / "step-00000013.h5"
    newest.write_bytes(newest.read_bytes()[:-100])
    bench.train(checkpoint={"every": 5})
    assert newest.with_name("step-00000013.h5.bad").exists()
    assert last_tree(run).keys() == expected.keys()
    assert [record["step"] for record in records(run, "train")] == list(range(1, 14))
