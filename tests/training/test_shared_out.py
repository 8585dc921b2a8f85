"""Runs whose weights are shared out: the same training, on other numbers of processes, after damage."""

import hashlib
from pathlib import Path

import pytest
from process_helpers import (  # noqa: F401 - the_tasks and the_team are fixtures
    FLOAT64,
    assert_same_result,
    own_model,
    the_tasks,
    the_team,
)
from training_helpers import hpclr, records, steps_kept, summary

from hpclr.checkpoint import CheckpointStore
from hpclr.errors import UsageError

STEPS = 15
SHARED, WHOLE = "parallel.shard=true", "parallel.shard=false"


def sections(team, **more):
    """Batches that each number of processes here can share; OIALR converts at step 5 and cuts from step 7 on."""
    return {
        "model": own_model(team.bench),
        "data": {"batch_size": 68},
        "train": FLOAT64 | {"steps": STEPS},
        "parallel": {"timeout": 30},
        "checkpoint": {"every": 4},
    } | more


def attempts(team, plan: list[tuple[int, str, int]], **more) -> Path:
    """A run of several attempts: (processes, whether shared out, step of this attempt after which to stop)."""
    total = 0
    for number, (size, how, steps) in enumerate(plan):
        total += steps
        last = number + 1 == len(plan)
        asked = {} if last else {"TROUBLE": f"SIGTERM:{size - 1}:{steps - 1}"}
        started = team.srun(size, how, variables=asked, **sections(team, **more))
        assert started.ended() == [0 if last else 85] * size, started.console
        assert max(steps_kept(started.run)) == total
    return started.run


@pytest.fixture
def alone(team):
    """The same run on one process."""
    return attempts(team, [(1, WHOLE, STEPS)]).rename(team.bench.path / "alone")


def test_the_same_training_and_accounts(team, alone):
    shared = attempts(team, [(2, SHARED, STEPS)])
    assert_same_result(alone, shared)
    one, many = summary(alone), summary(shared)
    assert one["sizes"] == many["sizes"]
    assert one["layers"] == many["layers"]
    assert one["cost"]["optimizer_bytes_peak"] == many["cost"]["optimizer_bytes_peak"]
    assert one["test"] == pytest.approx(many["test"])
    assert len(parts_of(shared, STEPS)) == 2


@pytest.mark.parametrize(
    "plan",
    [
        [(2, SHARED, 6), (4, SHARED, 3), (2, WHOLE, 2), (2, SHARED, 4)],
        pytest.param([(1, WHOLE, 3), (4, SHARED, 5), (1, SHARED, 7)], marks=pytest.mark.slow),
    ],
)
def test_it_goes_on_with_other_processes_whole_or_shared_out(plan, team, alone):
    assert_same_result(alone, attempts(team, plan))


def test_resuming_is_exact(team):
    kept = attempts(team, [(2, SHARED, STEPS)]).rename(team.bench.path / "kept")
    resumed = attempts(team, [(2, SHARED, 9), (2, SHARED, STEPS - 9)])
    losses = [[(r["step"], r["loss"]) for r in records(run, "train", "valid")] for run in (kept, resumed)]
    assert losses[0] == losses[1]
    assert summary(kept)["test"] == summary(resumed)["test"]


def test_all_make_equally_many_passes(team):
    """Of 64 pictures, and of 14 in an epoch's last batch, four processes have parts of which some take a pass more."""
    pieces = {"train": FLOAT64 | {"steps": 22, "micro_batch": 3}, "data": {"batch_size": 64}}
    alone = attempts(team, [(1, WHOLE, 22)], **pieces).rename(team.bench.path / "alone")
    shared = attempts(team, [(4, SHARED, 22)], **pieces)
    assert_same_result(alone, shared)
    assert all(0 < save["blocked"] == save["seconds"] for save in records(shared, "save"))


def test_a_checkpoint_of_the_first_format_is_left_where_it_is(tmp_path):
    stored = Path(__file__).parents[1] / "checkpoint" / "version-1.h5"
    digest = hashlib.sha256(stored.read_bytes()).hexdigest()
    path = tmp_path / "step-00000003.h5"
    path.write_bytes(stored.read_bytes())
    path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n")
    with pytest.raises(UsageError, match="on one process"):
        CheckpointStore(tmp_path).open_newest()
    assert path.exists()


def test_a_damaged_part_is_found_and_the_checkpoint_before_is_used(team, alone):
    run = attempts(team, [(2, SHARED, STEPS)])
    (run / "summary.json").unlink()
    damaged = parts_of(run, STEPS)[1]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)

    again = team.srun(2, SHARED, **sections(team))
    assert again.ended() == [0, 0], again.console
    assert "continuing from step 12" in again.console
    assert (run / "checkpoints" / f"step-{STEPS:08d}.h5.bad").exists()
    assert_same_result(alone, run)


def test_what_does_not_go_with_it_is_refused(bench):
    for change, found in (
        ("method={name: fixed_rank, rank: 0.5}", "method.name: fixed_rank"),
        ("train.ema=0.9", "train.ema: 0.9"),
        ("train.precision=fp16", "train.precision: fp16"),
        ("optimizer.name=galore_adamw", "optimizer.name: galore_adamw"),
        ("method.svd=heat", "method.svd: heat"),
        ("method={name: oialr, auto: true}", "method.auto: true"),
        ("method.order=output", "method.order: output"),
        ("method.tied=true", "method.tied: true"),
        ("optimizer.name=adafactor", "optimizer.name: adafactor"),
        ("parallel.sync_batchnorm=true", "parallel.sync_batchnorm: true"),
        ("parallel.unused_parameters=true", "parallel.unused_parameters: true"),
    ):
        done = hpclr("train", bench.write(), SHARED, change)
        assert done.code == 2, done.err
        assert found in done.err


def test_a_save_that_fails_does_not_end_the_run(team, alone):
    attempts_so_far = team.srun(2, SHARED, variables={"TROUBLE": "SIGTERM:0:2"}, **sections(team))
    assert attempts_so_far.ended() == [85, 85]
    in_the_way = attempts_so_far.run / "checkpoints" / "step-00000004.parts"
    in_the_way.write_text("no directory")

    started = team.srun(2, SHARED, **sections(team))
    assert started.ended() == [0, 0], started.console
    assert "Training goes on" in started.console
    assert in_the_way.read_text() == "no directory"
    assert 4 not in [record["step"] for record in records(started.run, "save")]
    assert_same_result(alone, started.run)


def parts_of(run: Path, step: int) -> list[Path]:
    return sorted((run / "checkpoints" / f"step-{step:08d}.parts").glob("*.h5"))
