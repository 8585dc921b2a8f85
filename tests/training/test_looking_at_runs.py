"""`hpclr evaluate`, `hpclr inspect`, `hpclr summary`: what they say is what the run has written."""

import re

import pytest
import torch
from training_helpers import OIALR, VIT, hpclr, last_tree, records, steps_kept, summary

from hpclr.checkpoint import CheckpointStore, Json
from hpclr.training.evaluation import evaluate_checkpoint
from hpclr.training.table import comparison, read_summaries


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"method": {"name": "dense"}},
        {"train": {"ema": 0.8}},
        {"train": {"ema": 0.8}, "method": {"name": "dense"}},
        {"train": {"precision": "float64"}},
        {"train": {"precision": "bf16"}, "model": VIT},
        {"model": {"name": "resnet20", "width": 2}},
    ],
    ids=str,
)
def test_evaluate_gives_the_score_of_the_summary(sections, bench):
    run = bench.train(**sections)
    score, path = evaluate_checkpoint(run)
    assert {**score.values, "samples": score.samples} == summary(run)["test"]
    assert path.name == "step-00000013.h5"
    valid, _ = evaluate_checkpoint(run, split="valid")
    last = records(run, "valid")[-1]
    assert valid.values == {name: last[name] for name in ("loss", "accuracy")}


def test_averages_are_what_is_judged(bench):
    run = bench.train(train={"ema": 0.9})
    averaged, _ = evaluate_checkpoint(run)
    bench.train("--fresh")
    own, _ = evaluate_checkpoint(bench.run)
    assert averaged.loss != own.loss


def test_evaluate_on_the_command_line(bench):
    run = bench.train(train={"steps": 30}, checkpoint={"every": 10}, optimizer={"name": "sgd", "lr": 0.5})
    found = summary(run)
    done = hpclr("evaluate", "runs/run")
    assert done.code == 0, done.err
    expected = f"accuracy {found['test']['accuracy']:.2%}, loss {found['test']['loss']:.4f}, 300 samples"
    assert done.out == f"runs/run/checkpoints/step-00000030.h5: test {expected}\n"
    best = found["best_validation"]
    done = hpclr("evaluate", "runs/run", "--best", "--split", "valid")
    assert f"step-{best['step']:08d}.h5: valid accuracy {best['accuracy']:.2%}" in done.out
    (bench.path / "moved.h5").write_bytes(bench.digits.read_bytes())
    first = run / "checkpoints" / f"step-{steps_kept(run)[0]:08d}.h5"
    done = hpclr("evaluate", first, "--data", "moved.h5", "--split", "train")
    assert done.out.startswith(f"{first}: train accuracy")
    assert "270 samples" in done.out


def test_evaluate_leaves_no_trace(bench):
    bench.train()
    before = bench.listing()
    for command in ("evaluate", "inspect", "summary"):
        assert hpclr(command, bench.run).code == 0
    assert bench.listing() == before


def test_what_cannot_be_evaluated_is_refused(bench):
    bench.train(checkpoint={"keep_best": False})
    newest = "runs/run/checkpoints/step-00000013.h5"
    other = bench.path / "six.h5"
    hpclr("data", "prepare", "npz", _archive(bench.path), other)
    for arguments, texts in {
        ("nowhere",): ("nowhere: no such checkpoint file or run directory",),
        ("runs",): ("runs holds no checkpoint",),
        ("runs/run", "--best"): ("runs/run/checkpoints holds no best checkpoint",),
        ("runs/run", "--split", "all"): ("has no split 'all'; it has train, valid, test",),
        ("runs/run", "--data", "none.h5"): ("none.h5", "No such file"),
        ("runs/run", "--data", other): ("six.h5 does not fit", "sample_shape [1, 8, 8], this has [6]"),
        ("run.yaml",): ("run.yaml",),
        ("runs/run/summary.json",): ("summary.json",),
    }.items():
        done = hpclr("evaluate", *arguments)
        assert done.code == 2, (arguments, done.err)
        assert "Traceback" not in done.err
        assert all(text in done.err for text in texts), done.err
    with open(newest, "r+b") as file:
        file.seek(-50, 2)
        file.write(b"rust")
    for command in ("evaluate", "inspect"):
        done = hpclr(command, newest)
        assert done.code == 2
        assert "the content has changed since it was saved" in done.err


def _archive(path):
    import numpy as np

    x, y = np.random.default_rng(0).random((20, 6)), np.arange(20) % 2
    np.savez(path / "six.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    return path / "six.npz"


def test_a_checkpoint_of_somebody_elses_is_refused(bench):
    CheckpointStore(bench.path / "own").save(3, {"weights": torch.ones(2), "note": Json("mine")})
    for command in ("evaluate", "inspect"):
        done = hpclr(command, "own")
        assert done.code == 2
        assert "step-00000003.h5 is no checkpoint of `hpclr train`: it holds no data" in done.err


def test_inspect_shows_step_ranks_spectra_sizes_and_origin(bench):
    run = bench.train("optimizer.args={amsgrad: true}", model=VIT, method=OIALR | {"exclude": ["embed"]})
    done = hpclr("inspect", run)
    assert done.code == 0, done.err
    tree = last_tree(run)
    shown = re.sub(r"\s+", " ", done.out)
    assert "step-00000013.h5" in shown
    assert "13 (finished)" in shown
    weights = [value for key, value in tree.items() if key.startswith("/model/")]
    assert f"stored numbers │ {sum(w.numel() for w in weights):,} " in shown
    assert f"bytes of weights │ {sum(w.numel() * 4 for w in weights):,} " in shown
    assert f"torch {torch.__version__}" in shown
    ranks = records(run, "check")[-1]["ranks"]
    assert ranks.keys() == {"blocks.0.attention.qkv", "blocks.0.attention.out", "blocks.0.mlp.0", "blocks.0.mlp.3"}
    for name, rank in ranks.items():
        sigma = torch.linalg.svdvals(tree[f"/model/{name}.sigma"])
        row = next(line for line in done.out.splitlines() if name in line)
        assert f" {rank} " in row
        assert f"{float(sigma[0]):.4g}" in row
        assert row.count("█") >= 1


def test_inspect_shows_brackets_as_they_are(bench, monkeypatch):
    """Rich would take them for its markup: a command line is full of them."""
    monkeypatch.setattr("sys.argv", ["hpclr", "train", "method.exclude=[head]", "[/x]"])
    bench.train(train={"steps": 2})
    assert "method.exclude=[head] [/x]" in hpclr("inspect", bench.run).out


def test_inspect_of_a_dense_run_and_of_an_early_checkpoint(bench):
    bench.train(method={"name": "dense"}, checkpoint={"keep": 10})
    done = hpclr("inspect", bench.run / "checkpoints" / "step-00000005.h5")
    assert done.code == 0, done.err
    assert "finished" not in done.out


def test_summary_is_a_table_of_runs(bench, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    bench.train().rename(bench.path / "runs" / "low")
    bench.train("name=dense", "method.name=dense")
    done = hpclr("summary", "runs/low", "runs/dense")
    assert done.code == 0, done.err
    rows = {cells[0].strip(): [c.strip() for c in cells[1:-1]] for cells in _rows(done.out)}
    low, dense = (summary(bench.path / "runs" / name) for name in ("low", "dense"))
    assert rows["test accuracy"] == [f"{run['test']['accuracy']:.2%}" for run in (low, dense)]
    assert rows["trainable parameters"] == [f"{run['sizes']['trainable']:,}" for run in (low, dense)]
    assert rows["stored parameters"] == [f"{run['sizes']['stored']:,}" for run in (low, dense)]
    assert rows["dense parameters"] == [f"{dense['sizes']['dense']:,}"] * 2
    assert rows["bytes of optimiser state"] == [f"{run['sizes']['optimizer_bytes']:,}" for run in (low, dense)]
    assert low["sizes"]["optimizer_bytes"] < dense["sizes"]["optimizer_bytes"]
    rank = next(layer["rank"] for layer in low["layers"] if layer["name"] == "layers.1")
    assert rows["layers.1"] == [f"{rank} of 32 (32×64)", "dense (32×64)"]


def _rows(text: str):
    return [re.split(r"[│┃]", line)[1:] for line in text.splitlines() if "│" in line]


def test_the_mean_over_seeds(bench, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    for seed in (1, 2):
        bench.train(f"name=s{seed}", f"train.seed={seed}")
    done = hpclr("summary", "--mean", "runs/s1", "runs/s2")
    assert done.code == 0, done.err
    accuracies = [summary(bench.path / "runs" / f"s{seed}")["test"]["accuracy"] for seed in (1, 2)]
    assert f"{sum(accuracies) / 2:.2%}" in done.out
    assert "oialr (2 runs)" in done.out


def test_runs_of_one_name_stand_under_their_directories(bench, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    bench.train(train={"steps": 8})
    bench.train("--runs-dir", "runs2", train={"steps": 9})
    done = hpclr("summary", "runs/run", "runs2/run")
    assert done.code == 0, done.err
    rows = {cells[0].strip(): [c.strip() for c in cells[1:-1]] for cells in _rows(done.out)}
    assert rows["steps"] == ["8", "9"]
    assert "runs/run" in done.out
    assert "runs2/run" in done.out


def test_summary_of_what_is_no_finished_run(bench):
    bench.train(train={"steps": 2})
    (bench.run / "summary.json").unlink()
    done = hpclr("summary", "runs/run")
    assert done.code == 2
    assert "the run in runs/run has not finished" in done.err
    done = hpclr("summary", "runs")
    assert done.code == 2
    assert "runs is not the directory of a run (it has no run.yaml)" in done.err


def test_operations_that_were_not_counted_are_no_fault(bench):
    bench.train(train={"steps": 2})
    (found,) = read_summaries([bench.run])
    found["sizes"] |= {"flops": 0, "dense_flops": 0}
    comparison([found])
    found["sizes"] |= {"flops": None, "dense_flops": None}
    comparison([found])
