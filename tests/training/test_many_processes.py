"""Many processes give the result of one, whatever a run trains with, whoever starts them, however it is stopped."""

import os
import signal

import pytest
from process_helpers import (  # noqa: F401 - the_tasks and the_team are fixtures
    FLOAT64,
    LAUNCHERS,
    assert_same_result,
    distance,
    errors,
    own_model,
    ranks,
    the_tasks,
    the_team,
)
from training_helpers import OIALR, VIT, Bench, assert_same_run, records, steps_kept

STRICT = {"timeout": 30, "verify_every": 1}
SPREAD = OIALR | {"svd": "spread"}

# name → sections of the run file. 270 samples in batches of 64: the last of the five in an epoch has 14.
CASES = {
    "adamw": {},
    "sgd, accumulation, clipping, average": {
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True},
        "train": FLOAT64 | {"micro_batch": 10, "clip_norm": 0.5, "ema": 0.9},
    },
    "pictures": {
        "model": VIT,
        "data": {"flip": True, "crop": 1, "mixup": 0.4},
        "train": FLOAT64 | {"label_smoothing": 0.1},
    },
    "settled": {"method": SPREAD | {"delay": 12, "freeze": "stable", "stability_threshold": 0.5}},
    "when it pays": {"method": OIALR | {"delay": 3, "convert": "when_it_pays", "cutoff": 0.6}},
    "average and mixup of the flat": {"train": FLOAT64 | {"ema": 0.8}, "data": {"mixup": 1.0}},
    "dense": {"method": {"name": "dense"}},
    "uneven micro-batches": {"train": FLOAT64 | {"micro_batch": 7}, "method": SPREAD},
}
QUICK = [("sgd, accumulation, clipping, average", 2), ("pictures", 4)]
GRID = [(case, size) for case in CASES for size in (1, 2, 4) if (case, size) not in QUICK]


def strict(**sections):
    return {"train": FLOAT64, "parallel": STRICT} | sections


@pytest.fixture(scope="module")
def plain(digits, tmp_path_factory):
    """One run in one process: the reference of several tests."""
    bench = Bench(tmp_path_factory.mktemp("plain"), digits)
    bench.train("--runs-dir", bench.path / "runs", **strict())
    return bench.run


@pytest.mark.parametrize(("case", "size"), [*QUICK, *(pytest.param(*place, marks=pytest.mark.slow) for place in GRID)])
def test_as_one_process(case, size, team):
    sections = strict(**CASES[case])
    one = team.bench.train(**sections).rename(team.bench.path / "one")
    started = team.srun(size, **sections)
    assert started.ended() == [0] * size, started.console
    assert_same_result(one, started.run)
    assert (len(ranks(one)) > 0) == (case != "dense")
    if size == 1:
        assert_same_run(one, started.run)


def test_spread_over_the_processes_as_on_the_first_to_the_bit(team, plain):
    many = team.srun(4, **strict())
    assert many.ended() == [0] * 4, many.console
    assert_same_result(plain, many.run)
    reference = many.run.rename(team.bench.path / "rank0")
    spread = team.srun(4, **strict(method=SPREAD))
    assert spread.ended() == [0] * 4, spread.console
    assert_same_run(reference, spread.run)


@pytest.mark.parametrize(
    ("launcher", "size"),
    [
        ("torchrun", 2),
        ("mpirun", 2),
        *(
            pytest.param(launcher, size, marks=pytest.mark.slow)
            for launcher in LAUNCHERS
            for size in (1, 2, 4)
            if (launcher, size) not in (("torchrun", 2), ("mpirun", 2))
        ),
    ],
)
def test_whoever_starts_them(launcher, size, team):
    """The result is that of one process; the console has what the first says, and each log what its process says."""
    sections = strict(model=own_model(team.bench))
    one = team.srun(1, **sections)
    assert one.ended() == [0], one.console
    reference = one.run.rename(team.bench.path / "one")
    started = team.launch(launcher, size, **sections, variables={"TROUBLE": f"nothing:{size - 1}:2"})
    done = started.ended()
    assert done.code == 0, done.err
    assert_same_result(reference, started.run)
    assert errors(done.err) == []
    assert started.left() == []
    assert started.outcome()["code"] == 0
    if size == 1:
        return
    assert done.out.split() == ["runs/run"]
    assert [rank for rank in range(size) if "trouble: nothing" in started.log(rank)] == [size - 1]
    checks = [line for line in done.err.splitlines() if "check at step" in line]
    assert len(checks) == 4
    assert all(line in started.log(0) for line in checks)


def test_a_replica_that_differs_ends_the_run(team):
    parallel = {"timeout": 20, "verify_every": 2}
    model = own_model(team.bench)
    started = team.srun(4, model=model, method={"name": "dense"}, parallel=parallel, variables={"TROUBLE": "flip:1:2"})
    assert started.ended() == [1] * 4, started.console
    said = errors(started.console)
    assert len(said) == 1
    assert "parameters are not the same on all 4 processes (ranks 1 differ from the other 3)" in said[0]
    assert started.outcome()["code"] == 1
    assert "parameters" in started.outcome()["message"]
    assert records(started.run, "train")[-1]["step"] == 4


def test_stopped_killed_and_continued_to_the_bit(team):
    """By a signal to one process, by one to the launch, by the end of all of them; each attempt by another launcher.

    Three processes: two numbers have the same sum in any order, three have not.
    """
    sections = {
        "model": own_model(team.bench, dropout=0.2),
        "data": {"batch_size": 66},
        "method": SPREAD | {"delay": 12, "freeze": "stable", "stability_threshold": 0.5},
        "parallel": STRICT,
    }
    reference = team.srun(3, **sections)
    assert reference.ended() == [0] * 3, reference.console
    reference.run.rename(team.bench.path / "reference")

    asked = team.srun(3, **sections, variables={"TROUBLE": "SIGTERM:1:2"})
    assert asked.ended() == [85] * 3, asked.console
    assert asked.outcome()["outcome"] == "saved"
    assert "the run is saved at step 3 of 13" in asked.outcome()["message"]
    assert len(errors(asked.console)) == 1

    launched = team.launch("launch torchrun", 3, **sections, variables={"TROUBLE": "slow:0:1"})
    launched.await_step(6)
    launched.process.send_signal(signal.SIGTERM)
    done = launched.ended()
    assert done.code == 85, done.err
    assert launched.outcome()["code"] == 85
    assert len(errors(done.err)) == 1
    assert launched.left() == []
    stopped_at = max(steps_kept(launched.run))
    assert 6 <= stopped_at < 11

    killed = team.srun(3, **sections, variables={"TROUBLE": "slow:1:1"})
    killed.await_step(stopped_at + 1)
    for pid in killed.pids:
        os.kill(pid, signal.SIGKILL)
    assert killed.ended() == [-9] * 3

    last = team.srun(3, **sections)
    assert last.ended() == [0] * 3, last.console
    assert_same_run(team.bench.path / "reference", last.run)
    assert "continuing from step" in last.console


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["launch mpirun", "launch torchrun"])
@pytest.mark.parametrize("case", ["pictures", "sgd, accumulation, clipping, average"])
def test_stopped_by_the_launch_and_continued_to_the_bit(launcher, case, team):
    sections = {"parallel": STRICT} | CASES[case]
    sections["train"] = sections["train"] | {"precision": "float32"}
    if "model" in sections:
        sections["model"] = VIT | {"dropout": 0.2}
    reference = team.launch(launcher, 4, **sections)
    assert reference.ended().code == 0
    reference.run.rename(team.bench.path / "reference")
    stopped = team.launch(launcher, 4, **sections)
    stopped.await_step(2)
    stopped.process.send_signal(signal.SIGINT)
    done = stopped.ended()
    assert done.code == 85, done.err
    assert stopped.left() == []
    continued = team.launch(launcher, 4, **sections)
    assert continued.ended().code == 0
    assert_same_run(team.bench.path / "reference", continued.run)


def test_finished_is_finished_and_fresh_starts_over_once(team, plain):
    first = team.srun(2, **strict())
    assert first.ended() == [0, 0], first.console
    again = team.srun(2, **strict())
    assert again.ended() == [0, 0], again.console
    assert again.console.count("this run is finished (step 13); --fresh starts it over") == 1
    assert len(list(first.run.glob("logs/attempt-*"))) == 1

    fresh = team.srun(2, "--fresh", **strict())
    assert fresh.ended() == [0, 0], fresh.console
    assert sorted(path.name for path in fresh.run.parent.iterdir()) == ["run", "run.old-1"]
    assert_same_run(fresh.run, fresh.run.parent / "run.old-1")
    assert fresh.console.count("is now in runs/run.old-1") == 1
    assert len(records(fresh.run, "final")) == 1
    assert distance(plain, fresh.run) < 1e-6
