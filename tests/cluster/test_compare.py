"""`hpclr compare` with real runs: here, stopped and continued, with equal budgets, as a job array."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compare_helpers import SHORT, cells, make_comparisons
from training_helpers import summary

from hpclr.cluster.comparison.budgets import as_sweep, check_budgets, trials, what_follows
from hpclr.cluster.comparison.files import Wanted, with_budget
from hpclr.cluster.record import submitted
from hpclr.config import load_run_file
from hpclr.data import open_dataset
from hpclr.errors import UsageError
from hpclr.slurm import client

WORDS = ("--methods", "dense,oialr", "--seeds", 2)
RUNS = {f"run-{method}-seed-{seed}" for method in ("dense", "oialr") for seed in (0, 1)}


@pytest.fixture
def comparisons(few_digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("HPCLR_RUNS", raising=False)
    return make_comparisons(tmp_path, few_digits)


def attempts(run: Path) -> int:
    return len(json.loads((run / "environment.json").read_text())["attempts"])


def test_a_comparison_is_trained_once_and_shown(comparisons):
    """First the plan, then all of it, then nothing any more."""
    done = comparisons.compare(*WORDS, base=SHORT)
    assert (done.code, comparisons.runs.exists()) == (0, False)
    assert "run: 4 runs in runs, of which 4 are to be started" in done.out
    assert "Nothing has been started" in done.out

    done = comparisons.compare(*WORDS, "--local", 2, "--csv", "mine.csv", base=SHORT)
    assert done.code == 0, done.err
    assert comparisons.finished() == RUNS
    kept = comparisons.runs / "run.compare"
    assert Path("mine.csv").read_bytes() == (kept / "results.csv").read_bytes()
    with open("mine.csv") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert rows.keys() == RUNS
    for name, row in rows.items():
        assert float(row["test_accuracy"]) == summary(comparisons.runs / name)["test"]["accuracy"]
        with open_dataset("digits.h5") as dataset:
            assert summary(comparisons.runs / name)["data"] == {"digest": dataset.digest}
    picture = (kept / "results.svg").read_bytes()
    assert picture.startswith(b"<?xml")
    assert cells(done.out)["finished runs"] == ["2 of 2", "2 of 2"]

    before = comparisons.stamps()
    done = comparisons.compare(*WORDS, "--local", 2, base=SHORT)
    assert (done.code, comparisons.stamps()) == (0, before)
    assert (kept / "results.svg").read_bytes() == picture


def test_a_run_of_another_run_file_is_refused(comparisons):
    comparisons.invent(comparisons.found(Wanted(("dense",))).entries["dense"][0])
    done = comparisons.compare(*WORDS, "--local", 1, "model.hidden=[8]")
    assert (done.code, "holds a run of another run file" in done.err) == (2, True)
    assert "give the comparison another name, with name=…" in done.err


@pytest.mark.parametrize("equal", ["steps", "time"])
def test_a_run_of_another_length_is_refused(comparisons, equal):
    """Training on is another schedule than training as long from the first step."""
    words = ("--methods", "dense,oialr", "--seeds", 1, "--equal", equal)
    dense, low = comparisons.found(Wanted(("dense", "oialr"), 1)).entries.values()
    comparisons.invent(dense[0], seconds=10.0, test={"accuracy": 0.5})
    if equal == "steps":
        done = comparisons.compare(*words, "train.steps=26")
        assert "run-dense-seed-0 holds a run of another run file" in done.err
        assert "What differs: train.steps: 13 in the run, 26 now" in done.err
    else:
        comparisons.invent(low[0], seconds=5.0, test={"accuracy": 0.5})
        comparisons.invent(with_budget(low[0], "run", "time", 20), test={"accuracy": 0.5})
        done = comparisons.compare(*words)
        assert "run-oialr-time-seed-0 holds a run of another run file" in done.err
        assert "train.steps: 20 in the run, 26 now" in done.err
    assert (done.code, "name=…" in done.err) == (2, True)


@pytest.mark.parametrize("length", [{"steps": 10}, {"epochs": 1}])
def test_methods_that_begin_too_late_are_found_before_any_trains(comparisons, length):
    methods = {"dense": {}, "late": {"name": "truncate", "at": 1000}, "cuttlefish": {}}
    done = comparisons.compare("--local", 1, base={"train": length}, methods=methods, seeds=1)
    steps = length.get("steps") or -(-open_dataset("digits.h5").sizes["train"] // 64)
    assert done.code == 2
    assert f"compare-late-seed-0: method: at is 1000 but the run has {steps} steps" in done.err
    assert "compare-cuttlefish-seed-0: method: window" in done.err
    assert not comparisons.runs.exists()


def test_one_that_fails_does_not_hold_up_the_others(comparisons):
    methods = {"dense": {}, "wild": {"name": "dense", "set": {"optimizer.name": "sgd", "optimizer.lr": 1e30}}}
    done = comparisons.compare("--local", 2, base=SHORT, methods=methods, seeds=1)
    assert (done.code, comparisons.finished()) == (1, {"compare-dense-seed-0"})
    assert "compare-wild-seed-0: failed (exit code 1): hpclr: the loss of step" in done.err
    assert cells(done.out)["finished runs"] == ["1 of 1", "0 of 1"]


@pytest.mark.slow
def test_stopped_and_continued(comparisons):
    """A signal lets the runs save; the same command goes on where they are. One seed more is two runs more."""
    file = comparisons.file({"train": {"steps": 300}, "checkpoint": {"every": 100}})
    command = [sys.executable, "-m", "hpclr", "compare", str(file), *map(str, WORDS), "--local", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    runs = [comparisons.runs / f"run-dense-seed-{seed}" for seed in (0, 1)]
    end = time.monotonic() + 60
    while not all((run / "metrics.jsonl").exists() for run in runs):
        assert (process.poll(), time.monotonic() < end) == (None, True)
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 85, said
    assert not (comparisons.runs / "run-oialr-seed-0").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert comparisons.finished() == RUNS
    assert [attempts(run) for run in runs] == [2, 2]
    assert attempts(comparisons.runs / "run-oialr-seed-0") == 1
    before = comparisons.stamps()
    assert subprocess.run([*command, "--seeds", "3"], timeout=120).returncode == 0
    assert comparisons.finished() - RUNS == {"run-dense-seed-2", "run-oialr-seed-2"}
    assert comparisons.stamps().items() > before.items()


def test_equal_flops_takes_two_phases(comparisons):
    """At this rank factors cost more than dense weights, so that OIALR has fewer steps; trained once only."""
    words = ("--methods", "dense,oialr", "--seeds", 1, "--equal", "flops")
    base = SHORT | {"train": {"steps": 20}, "model": {"name": "mlp", "hidden": [64, 64]}}
    done = comparisons.compare(*words, base=base)
    assert "1 more runs follow when those of equal steps are finished" in done.out
    done = comparisons.compare(*words, "--local", 1, base=base)
    assert done.code == 0, done.err
    name = "run-oialr-flops-seed-0"
    assert comparisons.finished() == {"run-dense-seed-0", "run-oialr-seed-0", name}
    spent = {run: summary(comparisons.runs / run)["cost"]["training_flops"] for run in comparisons.finished()}
    steps = round(20 * spent["run-dense-seed-0"] / spent["run-oialr-seed-0"])
    assert steps < 18
    assert load_run_file(comparisons.runs / name / "run.yaml").train.steps == steps
    assert spent[name] == pytest.approx(spent["run-dense-seed-0"], rel=0.1)
    assert cells(done.out)["steps"] == ["20", str(steps)]
    before = comparisons.stamps()
    done = comparisons.compare(*words, "--local", 1, base=base)
    assert (done.code, comparisons.stamps()) == (0, before)
    assert "3 runs in runs, of which 0 are to be started" in done.err


def invented_costs(comparisons, costs):
    """Of each label its seconds, one seed; None: not finished."""
    found = comparisons.found(
        base={"train": {"steps": 100}}, methods={label: {"name": "dense"} for label in costs}, seeds=1, equal="time"
    )
    for label, seconds in costs.items():
        if seconds is not None:
            comparisons.invent(found.entries[label][0], steps=100, seconds=seconds, test={"accuracy": 0.5})
    return found, trials(found, comparisons.runs)


def test_the_steps_follow_from_the_costs(comparisons):
    """Those within two per cent are not repeated; fractions of the schedule scale, absolute numbers stay."""
    found, known = invented_costs(comparisons, {"dense": 10.0, "near": 10.2, "fast": 4.0, "slow": 30.0, "waits": None})
    counts = {trial.label: trial.counts for trial in known}
    assert {label: point and point.name for label, point in counts.items()} == {
        "dense": "compare-dense-seed-0",
        "near": "compare-near-seed-0",
        "fast": "compare-fast-time-seed-0",
        "slow": "compare-slow-time-seed-0",
        "waits": None,
    }
    assert (counts["fast"].run.train.steps, counts["slow"].run.train.steps) == (250, 33)
    assert "1 more runs follow" in what_follows(found, known)
    assert len(as_sweep(found, known).points) == 7
    check_budgets(known)


def test_costs_that_nobody_has_noted_are_said_to_be_missing(comparisons):
    found, known = invented_costs(comparisons, {"dense": 10.0, "other": 0.0})
    assert what_follows(found, known) is None
    with pytest.raises(UsageError, match=r"compare-other-seed-0/summary.json does not say how many seconds"):
        check_budgets(known)
    methods = {"dense": {}, "other": {"name": "dense"}}
    done = comparisons.compare("--table", base={"train": {"steps": 100}}, methods=methods, seeds=1, equal="time")
    assert (done.code, "Compare by equal steps, or by flops" in done.err) == (2, True)
    assert cells(done.out)["finished runs"] == ["1 of 1", "0 of 1"]


@pytest.mark.parametrize("words", [("--dry-run",), ("--at-once", 2), ("--local", 1, "--dry-run")])
@pytest.mark.parametrize("command", ["compare", "sweep"])
def test_options_of_jobs_without_jobs_are_refused(comparisons, command, words):
    if command == "compare":
        done = comparisons.compare("--methods", "dense", "--seeds", 1, *words)
    else:
        done = comparisons.sweep(*words, grid={"train.seed": [0]})
    option = "--at-once" if "--at-once" in words else "--dry-run"
    assert (done.code, f"{option} is of --submit" in done.err) == (2, True)
    assert not comparisons.runs.exists()


def test_without_slurm_a_dry_run_shows_one_array(comparisons):
    done = comparisons.compare(
        *WORDS, "--submit", "--dry-run", "--time", "00:10:00", "--ntasks-per-node", 1, base=SHORT
    )
    assert done.code == 0, done.err
    assert "#SBATCH --array=0-3\n" in done.out
    assert not comparisons.runs.exists()


@pytest.mark.slow
def test_a_comparison_as_one_array(real_slurm, few_digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster.yaml").write_text('tried: true\nenvironment: {OMP_NUM_THREADS: "1"}\n')
    comparisons = make_comparisons(tmp_path, few_digits)
    words = (*WORDS, "--submit", "--ntasks-per-node", 1, "--time", "00:10:00", "--profile", "./cluster.yaml")
    try:
        done = comparisons.compare(*words, base=SHORT)
        assert done.code == 0, done.err
        job = done.out.splitlines()[0].removeprefix("job ")
        end = time.monotonic() + 240
        while comparisons.finished() != RUNS:
            assert time.monotonic() < end
            time.sleep(0.5)
        (entry,) = submitted(comparisons.runs / "run-oialr-seed-1")
        assert (entry.jobs, entry.by) == ((f"{job}_3",), "compare")
    finally:
        client.cancel([job.id for job in client.queue() if job.state in ("RUNNING", "PENDING")])
    done = comparisons.compare(*WORDS, "--table", base=SHORT)
    assert cells(done.out)["finished runs"] == ["2 of 2", "2 of 2"]
    assert (comparisons.runs / "run.compare" / "results.svg").exists()
