"""Saving while training goes on, by steps and by the clock; disks that are full, gone or read-only for a while."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bad_input import refused
from training_helpers import Bench, assert_same_run, hpclr, last_tree, records, steps_kept

from hpclr.checkpoint import CheckpointStore, load_file
from hpclr.config.schema import Checkpoint
from hpclr.errors import RetryableError, TrainingDivergedError
from hpclr.parallel.group import Group
from hpclr.training import loop, metrics, saving
from hpclr.training.metrics import MetricsFile
from hpclr.training.scores import Score
from hpclr.training.state import Position

# A model that runs what the environment's AT says before the forward pass of a training step: {"3": "statement"}.
ACTING = """
import json, os, shutil, threading, time
import torch
from torch import nn

gate = threading.Event()

def fill():
    with open("runs/ballast", "wb", buffering=0) as file:
        try:
            file.write(bytes(shutil.disk_usage("runs").free))
        except OSError:  # a save under way was quicker
            pass

class Net(nn.Sequential):
    steps = 0

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            self.steps += 1
            exec(json.loads(os.environ["AT"]).get(str(self.steps), ""))
        return super().forward(x)

def make():
    return Net(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10))
"""
EVERY_OTHER = {"every": 2, "keep": 8}


@pytest.fixture
def acting(bench, monkeypatch):
    """Trains the model that does something at some steps; returns how the command ended."""
    (bench.path / "acting.py").write_text(ACTING)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(bench.path)

    def train(at: dict[int, str], *arguments: object, **sections: Any):
        monkeypatch.setenv("AT", json.dumps(at))
        sections = {"model": {"target": "acting:make"}, "checkpoint": EVERY_OTHER} | sections
        return hpclr("train", bench.write(**sections), *arguments)

    yield train
    sys.modules.pop("acting", None)


@pytest.fixture
def impatient(monkeypatch):
    """Another save is tried soon after one has failed."""
    monkeypatch.setattr(saving, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(saving, "_LONGEST_PAUSE", 0.001)
    monkeypatch.setattr(loop, "LAST_PAUSES", (0.01, 0.01))


@pytest.fixture
def small_disk(bench):
    """Runs live on a file system of 4 MiB, which needs root."""
    disk = bench.path / "runs"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


FILL = "fill()"
FREE = "os.unlink('runs/ballast')"
QUOTA = "os.environ['HPCLR_FAILPOINT'] = 'after_data:EDQUOT'"
RAISED = "del os.environ['HPCLR_FAILPOINT']"
TROUBLES = pytest.mark.parametrize(("broken", "mended"), [(FILL, FREE), (QUOTA, RAISED)], ids=["full", "quota"])


@pytest.mark.parametrize("background", [True, False])
@TROUBLES
def test_a_disk_that_fails_for_a_while(broken, mended, background, acting, impatient, small_disk, bench):
    done = acting({4: broken, 9: mended}, checkpoint=EVERY_OTHER | {"background": background})
    assert done.code == 0, done.err
    assert re.search("of step [24] could not be saved", done.err)  # that of step 2 may still have been under way
    assert "Training goes on; another save is tried" in done.err
    assert [record["step"] for record in records(bench.run, "train")] == list(range(1, 14))
    assert {0, 10, 12, 13} <= set(steps_kept(bench.run))
    shutil.move(bench.run, bench.path / "troubled")
    acting({})
    assert_same_run(bench.path / "troubled", bench.run)


@TROUBLES
def test_a_disk_that_stays_so(broken, mended, acting, impatient, small_disk, bench):
    done = acting({6: broken})
    assert done.code == 75, done.err
    assert "Trying again" in done.err
    assert done.err.rstrip().splitlines()[-1].startswith("hpclr: ")
    assert "of step 13 could not be saved" in done.err.rstrip().splitlines()[-1]
    last = max(steps_kept(bench.run))
    assert last in (2, 4)
    exec(mended, {"os": os})
    done = acting({})
    assert done.code == 0, done.err
    assert f"continuing from step {last}" in done.err
    shutil.move(bench.run, bench.path / "troubled")
    acting({})
    assert_same_run(bench.path / "troubled", bench.run)


def test_a_run_directory_that_goes_away(acting, impatient, bench):
    done = acting({6: "os.rename('runs/run', 'runs/elsewhere')"})
    assert done.code == 75, done.err
    assert "of step 13 could not be saved" in done.err
    assert not bench.run.exists()
    assert steps_kept(bench.path / "runs" / "elsewhere")[:2] == [0, 2]


def test_a_disk_that_is_full_from_the_start(acting, small_disk, bench):
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 40_000))
    done = acting({1: "raise AssertionError('trained')"})
    assert done.code == 75, done.err
    assert "step 0 could not be saved" in done.err


def test_a_stop_right_after_a_save_that_fails(acting, impatient, small_disk, bench):
    """What is said to be saved is saved: a save in the background of the last step is waited for, and made again."""
    stop = "import signal; os.kill(os.getpid(), signal.SIGTERM)"
    done = acting({4: f"{FILL}; {stop}"}, checkpoint=EVERY_OTHER | {"every": 1})
    assert done.code == 75, done.err
    assert "of step 4 could not be saved" in done.err
    (small_disk / "ballast").unlink()
    done = acting({2: stop}, checkpoint=EVERY_OTHER | {"every": 1})
    assert done.code == 85, done.err
    step = int(re.search(r"the run is saved at step (\d+)", done.err)[1])
    assert step in steps_kept(bench.run)
    assert step in [record["step"] for record in records(bench.run, "save")]


def test_of_faults_that_do_not_pass_the_first_is_told(tmp_path):
    """The state of step 1 is bad, and that of step 2 is so too before anybody has heard of the first."""

    def check(tree):
        raise TrainingDivergedError(f"step {tree['step'].item()} is bad")

    def nothing(*arguments, **more):
        pass

    store = CheckpointStore(tmp_path)
    hooks = dict.fromkeys(("note", "record", "own", "doing"), nothing)
    saves = saving.Saving(store, Checkpoint(), Group(), check=check, **hooks)
    for step in (1, 2):
        saves.save(step, {"step": torch.tensor(step)})
    saves.wait()
    saves.hear(torch.tensor(saves.signals(), dtype=torch.float32))
    with pytest.raises(TrainingDivergedError, match="step 1 is bad"):
        saves.settle()


def test_no_memory_for_a_copy(acting, impatient, bench, monkeypatch):
    """The run is told to save without one; its first and its last save need none."""

    def take(self, tree):
        raise MemoryError("no memory for a copy of shape (9,)")

    monkeypatch.setattr("hpclr.checkpoint.background.HostCopy.take", take)
    done = acting({})
    assert done.code == 0, done.err
    assert "checkpoint.background=false" in done.err
    assert steps_kept(bench.run) == [0, 13]


def test_a_checkpoint_of_another_run(bench):
    bench.train(train={"steps": 5})
    for path in (bench.run / "checkpoints").glob("step-00000005.h5*"):
        shutil.copy(path, bench.path)
    bench.train("--fresh", train={"steps": 2, "seed": 1})
    for path in bench.path.glob("step-00000005.h5*"):
        shutil.copy(path, bench.run / "checkpoints")
    done = hpclr("train", bench.write(train={"steps": 8, "seed": 1}))
    assert done.code == 2, done.err
    assert "is of a run of another run file. What differs: train.seed: 0 in the run, 1 now" in done.err


def test_weights_alone_are_no_checkpoint_to_go_on_from(bench):
    bench.train(train={"steps": 2})
    hpclr("export", bench.run, bench.path / "w.h5")
    for suffix in ("", ".sha256"):
        content = (
            (bench.path / f"w.h5{suffix}").read_bytes().replace(b"w.h5", b"step-00000002.h5" if suffix else b"w.h5")
        )
        (bench.run / "checkpoints" / f"step-00000002.h5{suffix}").write_bytes(content)
    done = hpclr("train", bench.write(train={"steps": 4}))
    assert done.code == 2, done.err
    assert "is no checkpoint as `hpclr train` writes it" in done.err


def test_training_goes_on_while_a_save_is_written(acting, bench, monkeypatch):
    """The save of step 4 is held up until step 6 is being trained; what was copied is what it saves."""
    save, met = CheckpointStore.save, []

    def held_up(self, step, *rest, **more):
        if step == 4:
            met.append(sys.modules["acting"].gate.wait(20))
        return save(self, step, *rest, **more)

    monkeypatch.setattr(CheckpointStore, "save", held_up)
    assert acting({6: "gate.set()"}).code == 0
    assert met == [True]
    monkeypatch.setattr(CheckpointStore, "save", save)
    shutil.move(bench.run, bench.path / "background")
    assert acting({}, checkpoint=EVERY_OTHER | {"background": False}).code == 0
    assert_same_run(bench.path / "background", bench.run)
    name = "checkpoints/step-00000004.h5"
    one, other = (load_file(run / name).tree["model"] for run in (bench.path / "background", bench.run))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_saves_by_the_clock(bench):
    bench.train(checkpoint={"every": None, "minutes": 1e-9, "keep": 20})
    assert len(steps_kept(bench.run)) > 4
    for record in records(bench.run, "save"):
        assert record["bytes"] == (bench.run / "checkpoints" / f"step-{record['step']:08d}.h5").stat().st_size
        assert 0 <= record["blocked"] <= record["seconds"]


def test_minutes_that_do_not_pass(bench):
    bench.train(checkpoint={"every": None, "minutes": 60, "keep": 20, "keep_best": False})
    assert steps_kept(bench.run) == [0, 13]


def test_neither_steps_nor_minutes(bench):
    refused(bench, texts=("at least one of every and minutes",), checkpoint={"every": None})


@pytest.mark.parametrize(
    ("metric", "scores", "best"),
    [
        ("accuracy", [(1.0, 0.5), (0.5, 0.4), (2.0, 0.6), (3.0, 0.6)], 3),
        ("loss", [(1.0, 0.5), (0.5, 0.4), (2.0, 0.6), (0.5, 0.9)], 2),
        ("loss", [(float("nan"), 0.5), (1.0, 0.4)], 2),
        ("accuracy", [(1.0, 0.5), (float("inf"), 0.6)], 2),
    ],
)
def test_what_counts_as_better(metric, scores, best):
    position = Position()
    for step, (loss, accuracy) in enumerate(scores, start=1):
        position.step = step
        position.judge(Score(loss, {"accuracy": accuracy}, 10), metric)
    assert position.best_step == best
    assert position.best(metric) == (scores[best - 1][0] if metric == "loss" else scores[best - 1][1])
    assert position.validations_since_best == len(scores) - best
    assert all(map(math.isfinite, position.best_scores.values()))  # a checkpoint holds no others


def test_the_best_by_loss_is_kept(bench):
    bench.train(validation={"every_steps": 2, "metric": "loss"}, checkpoint={"every": 20})
    valid = records(bench.run, "valid")
    best = min(valid, key=lambda record: record["loss"])["step"]
    noted = json.loads((bench.run / "checkpoints" / "best.json").read_text())
    assert noted["step"] == best == last_tree(bench.run)["/position"]["best_step"]
    assert noted["metric"] == min(record["loss"] for record in valid)


# Records


def full(path: Path) -> MetricsFile:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/full")
    return MetricsFile(path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_wait_for_a_disk_that_takes_them(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    file = full(path)
    for step in (1, 2, 3):
        file.append("train", step)
    with pytest.raises(RetryableError, match=r"No space left on device.*the same command goes on"):
        file.settle()
    assert capsys.readouterr().err.count("cannot be written") == 1
    path.unlink()
    file.append("train", 4)
    file.settle()
    assert [record["step"] for record in lines(path)] == [1, 2, 3, 4]


def test_records_do_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_MOST_WAITING", 10)
    path = tmp_path / "metrics.jsonl"
    file = full(path)
    for step in range(30):
        file.append("train", step)
    path.unlink()
    file.append("train", 30)
    gap, *rest = lines(path)
    assert gap["kind"] == "gap"
    assert [record["step"] for record in rest] == list(range(31 - len(rest), 31))
    assert gap["lost"] + len(rest) == 31
    assert len(rest) <= 11
    assert rest


def test_a_record_is_written_whole_or_not_at_all(tmp_path, small_disk, bench: Bench):
    path = small_disk / "metrics.jsonl"
    file = MetricsFile(path)
    file.append("train", 1)
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    for step in range(2, 300):
        file.append("train", step, text="x" * 100)
    for record in lines(path):
        assert record["kind"] == "train"
    (small_disk / "ballast").unlink()
    file.append("train", 300)
    assert [record["step"] for record in lines(path)] == list(range(1, 301))
