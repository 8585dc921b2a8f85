"""A run that dies at any step and is started again equals, to the bit, one that nobody disturbed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from training_helpers import (
    BY_THE_CLOCK,
    OIALR,
    VIT,
    as_killed_after,
    assert_same_run,
    hpclr,
    last_tree,
    records,
    run_file,
)

EVERY_STEP = {"every": 1, "keep": 100}
RESNET = {"name": "resnet20", "width": 4}
STEPS = 13  # an epoch is five; checks after 3, 6 (the conversion), 9 and 12; validations after 4, 8, 12 and 13

# name → sections of the run file
CASES = {
    "dense": {"method": {"name": "dense"}},
    "ema": {"train": {"ema": 0.9}},
    "vit with dropout": {"model": VIT | {"dropout": 0.2}, "train": {"label_smoothing": 0.1}},
    "augmentation and mixup": {"data": {"flip": True, "crop": 1, "mixup": 0.4}},
    "accumulation and clipping": {"train": {"micro_batch": 24, "clip_norm": 0.5}},
    "batch norm": {"model": RESNET, "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True}},
    "fp16": {"train": {"precision": "fp16", "clip_norm": 1.0}},
    "bf16": {"train": {"precision": "bf16", "ema": 0.8}},
    "float64": {"train": {"precision": "float64"}},
    "freeze stable": {"method": OIALR | {"delay": 12, "freeze": "stable", "stability_threshold": 0.5}},
    "convert when it pays": {"method": OIALR | {"delay": 3, "convert": "when_it_pays", "cutoff": 0.6}},
    "noise of the dense weight": {"method": OIALR | {"cutoff": {"rule": "marchenko_pastur"}}},
    "sigma_lr": {"method": OIALR | {"sigma_lr": 3.0}, "schedule": {"name": "one_cycle"}},
    "rmsprop": {"optimizer": {"name": "rmsprop", "lr": 1e-3, "momentum": 0.9, "args": {"centered": True}}},
    "nadam": {"optimizer": {"name": "nadam", "lr": 1e-3}},
}
RARER = {"float64", "sigma_lr", "rmsprop", "nadam", "noise of the dense weight", "accumulation and clipping"}


def check_steps(bench, every: int, steps: Iterable[int], sections) -> None:
    """A reference that saves so often; then, as if killed after each of the steps, trained to the end."""
    reference = bench.path / "reference"
    bench.train(checkpoint={"every": every, "keep": 100}, **sections).rename(reference)
    for step in steps:
        as_killed_after(reference, step, bench.run)
        run = bench.train(checkpoint={"every": 1000}, **sections)
        assert_same_run(reference, run)
        run.rename(bench.path / f"continued-{step}")


def test_after_every_single_step(bench):
    """Mid-epoch, at the epoch's end, at the conversion, at a check, right after a validation: all of them."""
    check_steps(bench, 1, range(STEPS), {})


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in RARER else ()) for case in CASES]
)
def test_whatever_the_run_trains_with(case, bench):
    """Mid-epoch, at the conversion, right after a validation."""
    check_steps(bench, 2, (2, 6, 8) if case != "batch norm" else (6,), CASES[case])
    kinds = {record["kind"] for record in records(bench.path / "reference")}
    assert kinds - BY_THE_CLOCK == {"train", "valid", "final"} | ({"check"} if case != "dense" else set())


def test_cases_do_what_their_names_say(bench):
    """Otherwise the comparisons above would compare less than they claim."""
    for case in ("freeze stable", "convert when it pays"):
        run = bench.train("--fresh", **CASES[case])
        frozen = [sum(record["frozen"].values()) for record in records(run, "check")]
        assert 0 in frozen[:1], case
        assert 1 in frozen[:-1] or 2 in frozen[:-1], (case, frozen)


def test_same_seed_same_run_other_seed_other_run(bench):
    one = bench.train(name="run").rename(bench.path / "one")
    assert_same_run(one, bench.train(name="run").rename(bench.path / "other"))
    third = bench.train(train={"seed": 1})
    assert records(third, "train")[0]["loss"] != records(one, "train")[0]["loss"]
    assert not torch.equal(last_tree(third)["/model/head.weight"], last_tree(one)["/model/head.weight"])


def test_how_often_it_saves_changes_nothing(bench):
    one = bench.train(checkpoint={"every": 1}).rename(bench.path / "one")
    assert_same_run(one, bench.train(checkpoint={"every": 1000}))


def test_a_line_that_was_cut_short_and_what_came_after_the_checkpoint_are_gone(bench):
    reference = bench.train(checkpoint=EVERY_STEP).rename(bench.path / "reference")
    as_killed_after(reference, 7, bench.run)
    with (bench.run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 3, "lo')
    assert_same_run(reference, bench.train(checkpoint=EVERY_STEP))


STOPPING = """
import os, signal
from torch import nn

stop_at, number = None, signal.SIGTERM

class Net(nn.Sequential):
    seen = 0

    def forward(self, x):
        self.seen += self.training
        if stop_at and self.training and self.seen == 1 + stop_at:  # after the look at the smallest piece
            os.kill(os.getpid(), number)
        return super().forward(x)

def make():
    return Net(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.1), nn.ReLU(), nn.Linear(32, 10))
"""


@pytest.mark.parametrize(
    ("step", "name"), [(1, "SIGTERM"), (4, "SIGINT"), (6, "SIGHUP"), (9, "SIGINT"), (12, "SIGTERM")]
)
def test_stopped_by_a_signal_during_a_step(step, name, bench, monkeypatch):
    """The step is finished, saved, and the exit code asks to be requeued."""
    module = f"stopping_{step}"
    (bench.path / f"{module}.py").write_text(STOPPING)
    monkeypatch.syspath_prepend(bench.path)
    sections = {"model": {"target": f"{module}:make"}, "train": {"steps": 12}}
    reference = bench.train(**sections).rename(bench.path / "reference")

    stopping = sys.modules[module]
    stopping.stop_at, stopping.number = step, signal.Signals[name]
    done = hpclr("train", bench.write(**sections))
    stopping.stop_at = None
    if step == 12:  # there is nothing left to requeue for
        assert done.code == 0
    else:
        assert done.code == 85
        assert f"{name} received: the run is saved at step {step} of 12" in done.err
        assert (bench.run / "checkpoints" / f"step-{step:08d}.h5.sha256").exists()
        assert not (bench.run / "summary.json").exists()
        bench.train(**sections)
    assert_same_run(reference, bench.run)


def started(bench, **sections) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hpclr", "train", str(bench.write(**sections))]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_bytes().splitlines()) < step:
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGKILL, -9)])
def test_a_real_process_and_a_real_signal(number, code, bench):
    """Begun by `python -m hpclr`, ended by `hpclr`: the two are the same."""
    sections = {"train": {"steps": 160}, "checkpoint": {"every": 20}, "validation": {"every_steps": 40}}
    sections["method"] = OIALR | {"delay": 60, "every": 20}
    process = started(bench, **sections)
    wait_for_step(bench.run, 30)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    bench.train(**sections).rename(bench.path / "continued")
    assert len(records(bench.path / "continued", "train")) == 160
    assert_same_run(bench.path / "continued", bench.train(**sections))


def test_a_second_process_is_refused_and_changes_nothing(bench):
    sections = {"train": {"steps": 100_000}, "validation": {"every_steps": 100_000}}
    process = started(bench, **sections)
    try:
        wait_for_step(bench.run, 2)
        for arguments in ([], ["--fresh"]):
            done = hpclr("train", "run.yaml", *arguments)
            assert done.code == 2
            assert f"runs/run is in use by process {process.pid}" in done.err
        assert [path.name for path in (bench.path / "runs").iterdir()] == ["run"]
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_a_changed_number_of_threads_is_warned_about(bench):
    reference = bench.train(checkpoint=EVERY_STEP).rename(bench.path / "reference")
    as_killed_after(reference, 7, bench.run)
    with pytest.warns(UserWarning, match="saved with 1 threads and continues with 2"):
        bench.train(train={"threads": 2})


def test_run_files_of_these_tests_are_what_they_say(digits):
    assert run_file(digits, train={"epochs": 2})["train"] == {"epochs": 2, "threads": 1}
