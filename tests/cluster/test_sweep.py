"""`hpclr sweep`: what it would do, training here, the table."""

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from sweep_helpers import make_sweeps
from training_helpers import hpclr, summary
from watching_helpers import attempt_with_log, away_slurm

from hpclr.cluster.record import note_jobs
from hpclr.cluster.sweep import local
from hpclr.config import dump, load_run_file
from hpclr.training.lock import locked

GRID = {"optimizer.lr": [0.001, 0.003], "train.seed": [0, 1]}
OTHER_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
LONG = {"train": {"steps": 100_000}}


@pytest.fixture
def sweeps(few_digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("HPCLR_RUNS", raising=False)
    return make_sweeps(tmp_path, few_digits)


def invented(sweeps, name, accuracy, **more):
    """A run that is finished; its results are made up."""
    (point,) = [point for point in sweeps.load(grid=GRID).points if point.name == name]
    directory = sweeps.runs / name
    directory.mkdir(parents=True)
    (directory / "run.yaml").write_text(dump(point.run))
    sizes = {"trainable": 1000, "stored": 4000, "dense": 3122} | more
    results = {"steps": 13, "seconds": 1.5, "test": {"accuracy": accuracy, "loss": 1 - accuracy}, "sizes": sizes}
    (directory / "summary.json").write_text(json.dumps(results))


def cores():
    return len(os.sched_getaffinity(0))


def rows(done):
    """The cells of the tables."""
    lines = [line.strip("│ \n") for line in done.out.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.split("│")] for line in lines]


def test_a_plan_starts_nothing(sweeps):
    done = sweeps.sweep(grid=GRID)
    assert done.code == 0
    assert [line.split() for line in done.out.splitlines()[:4]] == [[name, "new"] for name in sweeps.names(grid=GRID)]
    assert "4 runs in runs, of which 4 are to be started" in done.out
    assert "Nothing has been started" in done.out
    assert not sweeps.runs.exists()


def test_runs_are_trained_here_and_only_once(sweeps):
    """One of them fails; what is added to the sweep is trained, what is taken out of it is said to be there still."""
    parts = {
        "base": {"train": {"steps": 3, "threads": "auto"}},
        "grid": {"train.seed": [0, 1]},
        "list": [{"data.path": "nothing.h5"}],
    }
    done = sweeps.sweep("--local", 2, "--csv", "results.csv", **parts)
    assert done.code == 2
    assert sweeps.finished() == {"sweep-seed-0", "sweep-seed-1"}
    assert "sweep-path-nothing.h5: failed (exit code 2): hpclr: nothing.h5: the dataset cannot be opened" in done.err
    with open("results.csv") as file:
        table = {row["name"]: row for row in csv.DictReader(file)}
    found = summary(sweeps.runs / "sweep-seed-1")
    assert float(table["sweep-seed-1"]["test_accuracy"]) == found["test"]["accuracy"]
    assert int(table["sweep-seed-1"]["trainable"]) == found["sizes"]["trainable"]
    assert (table["sweep-seed-1"]["train.seed"], table["sweep-seed-1"]["state"]) == ("1", "finished")
    failed = table["sweep-path-nothing.h5"]
    assert failed["test_accuracy"] == ""
    assert failed["state"].startswith("failed: nothing.h5: the dataset cannot be opened")
    assert "\nruns/sweep-path-nothing.h5: nothing.h5: the dataset" in hpclr("status").out
    assert "cannot be opened" in hpclr("logs", "runs/sweep-path-nothing.h5").out
    assert load_run_file(sweeps.runs / "sweep-seed-0" / "run.yaml").train.threads == max(1, cores() // 2)
    assert "runs/sweep-seed-0\n" in (sweeps.runs / "sweep-seed-0" / "logs" / "local.log").read_text()

    before = {name: (sweeps.runs / name / "summary.json").stat().st_mtime_ns for name in sweeps.finished()}
    changed = parts | {"grid": {"train.seed": [1, 2]}, "list": []}
    done = sweeps.sweep("--local", 1, **changed)
    assert done.code == 0, done.err
    assert "not asked for now, and left as they are: sweep-seed-0" in done.err
    assert "3 runs" not in done.err
    assert sweeps.finished() == {"sweep-seed-0", "sweep-seed-1", "sweep-seed-2"}
    after = {name: (sweeps.runs / name / "summary.json").stat().st_mtime_ns for name in before}
    assert after == before


def test_a_run_that_is_to_be_longer_is_not_finished(sweeps):
    invented(sweeps, "sweep-lr-0.001-seed-0", 0.5)
    done = sweeps.sweep(grid=GRID)
    assert "4 runs in runs, of which 3 are to be started" in done.out
    done = sweeps.sweep(grid=GRID, base={"train": {"steps": 14}})
    assert "4 runs in runs, of which 4 are to be started" in done.out
    done = sweeps.sweep("--table", grid=GRID, base={"train": {"steps": 14}})
    best = rows(done)[0]
    assert (best[:4], best[-1]) == (["0.001", "0", "50.00%", "13"], "stopped (at step 13)")
    assert {row[-1] for row in rows(done)[4:]} == {"0 of 2"}


def test_a_damaged_summary_is_named_and_hides_no_other(sweeps):
    for content in ("{", "[]", '{"steps": "x"}', "\udcff"):
        invented(sweeps, "sweep-lr-0.001-seed-0", 0.5)
        invented(sweeps, "sweep-lr-0.001-seed-1", 0.7)
        file = sweeps.runs / "sweep-lr-0.001-seed-0" / "summary.json"
        file.write_text(content, errors="surrogateescape")
        done = sweeps.sweep("--csv", "results.csv", grid=GRID)
        assert done.code == 0, done.err
        with open("results.csv") as table:
            states = {row["name"]: row["state"] for row in csv.DictReader(table)}
        damaged = states.pop(file.parent.name)
        assert damaged.startswith(f"damaged: runs/{file.parent.name}/summary.json cannot be read: ")
        assert sorted(states.values()) == ["finished", "new", "new"]
        assert "of which 2 are to be started" in sweeps.sweep(grid=GRID).out
        shutil.rmtree(sweeps.runs)


def test_runs_whose_jobs_nobody_knows_of_are_not_trained_here(sweeps, monkeypatch):
    parts = {"base": {"train": {"steps": 3}}, "grid": {"train.seed": [0, 1]}}
    run = sweeps.runs / "sweep-seed-0"
    (run / "submission").mkdir(parents=True)
    (run / "logs").mkdir()
    note_jobs(run, ("12_0",), "sweep")
    away_slurm(sweeps.path, monkeypatch)
    done = sweeps.sweep("--local", 1, **parts)
    assert done.code == 75
    assert "not trained here: sweep-seed-0: whether their jobs wait or run is not known" in done.err
    assert sweeps.finished() == {"sweep-seed-1"}


@pytest.mark.parametrize("when", ["before", "at once"])
def test_a_run_that_another_sweep_trains_is_left_to_it(when, sweeps, monkeypatch):
    """Somebody takes its directory after the plan was made: before its turn, or when its process has just started."""
    points = sweeps.load(base={"train": {"steps": 3}}, grid={"train.seed": [0]}).points
    run = sweeps.runs / points[0].name
    if when == "at once":
        look, looks = local._elsewhere, iter([lambda *_: None])
        monkeypatch.setattr(local, "_elsewhere", lambda *about: next(looks, look)(*about))
    run.mkdir(parents=True)
    attempt_with_log(run)
    with locked(run):
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = local.train_here(points, sweeps.runs, sweeps.path, 1, lambda *_: None)
    assert (code, (run / "run.yaml").exists()) == (0, False)
    assert f"{run.name}: is left alone, as it is trained elsewhere: training (on " in said.getvalue()
    assert ("is in use by" in said.getvalue(), (run / "logs" / "local.log").exists()) == (False, when == "at once")


def test_only_what_a_run_has_said_since_its_start_tells_why_it_has_failed(sweeps, monkeypatch):
    (point,) = sweeps.load(grid={"train.seed": [0]}).points
    log = sweeps.runs / point.name / "logs" / "local.log"
    log.parent.mkdir(parents=True)
    log.write_text("hpclr: what was wrong before\n")
    monkeypatch.setattr(local, "_command", lambda runs, file: [sys.executable, "-c", "raise SystemExit(3)"])
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert local.train_here([point], sweeps.runs, sweeps.path, 1, lambda *_: None) == 1
    assert f"{point.name}: failed (exit code 3): it has said nothing [{log}]" in said.getvalue()


def test_the_gpus_are_dealt_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5,")
    assert [local._gpu(place)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["3", "GPU-5", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert local._gpu(0) == {}


@pytest.mark.parametrize("number", [signal.SIGUSR1, *(pytest.param(s, marks=pytest.mark.slow) for s in OTHER_SIGNALS)])
def test_a_signal_saves_the_runs_and_starts_no_other(number, sweeps):
    file = sweeps.write(base=LONG, grid={"train.seed": [0, 1, 2]})
    command = [sys.executable, "-m", "hpclr", "sweep", str(file), "--local", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = [sweeps.runs / f"sweep-seed-{seed}" / "metrics.jsonl" for seed in (0, 1)]
    end = time.monotonic() + 60
    while not all(path.exists() for path in metrics):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 85, said
    for seed in (0, 1):
        assert list((sweeps.runs / f"sweep-seed-{seed}" / "checkpoints").glob("step-*.h5")), said
        assert f"sweep-seed-{seed}: stopped" in said
    assert not (sweeps.runs / "sweep-seed-2").exists()


def test_a_run_of_another_run_file_is_found_before_anything_starts(sweeps):
    for name in ("sweep-lr-0.001-seed-0", "sweep-lr-0.003-seed-1"):
        invented(sweeps, name, 0.5)
    done = sweeps.sweep("--local", 1, grid=GRID, base={"model": {"name": "mlp", "hidden": [8]}})
    assert done.code == 2
    assert done.err.count("holds a run of another run file") == 2
    assert "give the sweep another name, with `name:` in its file" in done.err
    assert ("name=" in done.err, "--fresh" in done.err) == (False, False)
    assert len(list(sweeps.runs.iterdir())) == 2
    shutil.rmtree(sweeps.runs)
    (sweeps.runs / "sweep-lr-0.001-seed-0" / "other").mkdir(parents=True)
    done = sweeps.sweep(grid=GRID)
    assert (done.code, "exists but holds no run" in done.err, "name=" in done.err) == (2, True, False)


def test_the_table_has_the_best_first_and_means_over_seeds(sweeps):
    invented(sweeps, "sweep-lr-0.001-seed-0", 0.5)
    invented(sweeps, "sweep-lr-0.001-seed-1", 0.7, trainable=2000)
    invented(sweeps, "sweep-lr-0.003-seed-0", 0.65)
    done = sweeps.sweep("--table", grid=GRID)
    assert done.code == 0, done.err
    runs, means = rows(done)[:4], rows(done)[4:]
    assert [row[:3] for row in runs] == [
        ["0.001", "1", "70.00%"], ["0.003", "0", "65.00%"], ["0.001", "0", "50.00%"], ["0.003", "1", "–"],
    ]  # fmt: skip
    assert runs[0][3:] == ["13", "1.5", "2,000", "4,000", "3,122", "finished"]
    assert means[0] == ["0.003", "65.00%", "13", "1.5", "1,000", "4,000", "3,122", "1 of 2"]
    assert means[1] == ["0.001", "60.00% ± 14.14%", "13", "1.5", "1,500 ± 707", "4,000", "3,122", "2 of 2"]


def test_a_table_of_losses_has_the_lowest_first(sweeps):
    invented(sweeps, "sweep-lr-0.001-seed-0", 0.5)
    invented(sweeps, "sweep-lr-0.003-seed-0", 0.7)
    parts = {"base": {"validation": {"metric": "loss"}}, "grid": {"optimizer.lr": [0.001, 0.003], "train.seed": [0]}}
    done = sweeps.sweep("--table", **parts)
    assert [row[:3] for row in rows(done)] == [["0.003", "0", "0.3000"], ["0.001", "0", "0.5000"]]


def test_a_csv_file_that_cannot_be_written(sweeps):
    done = sweeps.sweep("--csv", "nowhere/results.csv", grid=GRID)
    assert (done.code, "cannot write nowhere/results.csv: No such file or directory" in done.err) == (2, True)


def test_a_damaged_record_of_earlier_runs(sweeps):
    (sweeps.runs / "sweep.sweep").mkdir(parents=True)
    (sweeps.runs / "sweep.sweep" / "sweep.json").write_text("{")
    done = sweeps.sweep(grid=GRID)
    assert (done.code, "sweep.json: " in done.err) == (2, True)


def test_here_or_as_jobs_but_not_both(sweeps):
    assert sweeps.sweep("--local", 1, "--submit", grid=GRID).code == 2
