"""Runs with `method: {name: oialr, auto: true}`: what they say, how they continue, and on several processes."""

import pytest
from process_helpers import FLOAT64, assert_same_result, the_tasks, the_team  # noqa: F401 - the last two are fixtures
from training_helpers import as_killed_after, assert_same_run, hpclr, records, summary

from hpclr.config.schema import OIALR_AUTO

SECTIONS = {
    "method": {"name": "oialr", "auto": True},
    "model": {"name": "mlp", "hidden": [16, 16, 16]},  # four rows of a batch for each input
    "optimizer": {"name": "adamw", "lr": 0.02},
}
CHECKS = {"delay": 8, "every": 1}  # of the 13 steps of these runs


def test_it_says_what_it_decides_and_continues_to_the_bit(bench):
    done = hpclr("train", bench.write(checkpoint={"every": 1, "keep": 100}, **SECTIONS))
    assert "auto: a check every step; each layer becomes factors, of the rank that its outputs need" in done.err
    reference = bench.run.rename(bench.path / "reference")
    found = summary(reference)
    assert records(reference, "attempt")[0]["checks"] == CHECKS
    assert found["auto"].keys() == {*OIALR_AUTO, "frozen_at"}
    assert (found["auto"]["delay"], found["auto"]["cutoff"]["rule"]) == (0.6, "energy")
    frozen = found["auto"]["frozen_at"]
    assert frozen
    assert 0 < min(frozen.values()) <= max(frozen.values()) <= 13
    assert found["sizes"]["stored"] < found["sizes"]["dense"]
    first = min(frozen.values())
    for step in (first - 1, first, first + 1):
        as_killed_after(reference, step, bench.run)
        assert_same_run(reference, bench.train(checkpoint={"every": 1000}, **SECTIONS))
        bench.run.rename(bench.path / f"continued-{step}")


def test_without_it_nothing_is_said_of_it(bench):
    assert "auto:" not in hpclr("train", bench.write()).err
    assert summary(bench.run)["auto"] is None


def test_a_plan_says_so_too(bench):
    done = hpclr("plan", bench.write(**SECTIONS))
    assert done.code == 0, done.err
    assert "settled, or at step 8, as soon as factors pay" in " ".join(done.out.split())


@pytest.mark.slow
@pytest.mark.parametrize("svd", ["rank0", "spread"])
def test_two_processes_give_the_result_of_one(svd, team):
    sections = SECTIONS | {"train": FLOAT64, "parallel": {"timeout": 30, "verify_every": 1}}
    sections["method"] = SECTIONS["method"] | {"svd": svd}
    one = team.srun(1, **sections)
    assert one.ended() == [0], one.console
    one.run.rename(team.bench.path / "one")
    two = team.srun(2, **sections)
    assert two.ended() == [0, 0], two.console
    assert_same_result(team.bench.path / "one", two.run)
    frozen = [summary(run)["auto"]["frozen_at"] for run in (team.bench.path / "one", two.run)]
    assert frozen[0] == frozen[1] != {}
