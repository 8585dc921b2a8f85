"""What runs record of time: when, which attempt, where the seconds went."""

import time

import pytest
from training_helpers import as_killed_after, hpclr, records

from hpclr.training import progress
from hpclr.training.pace import Pace

TIMES = ("data", "check", "save", "valid")


def test_every_record_has_its_time(bench):
    before = time.time()
    run = bench.train()
    times = [record["time"] for record in records(run)]
    assert before - 0.001 <= min(times)
    assert max(times) <= time.time()
    assert times == [round(moment, 3) for moment in times]


def test_attempts_are_kept_when_records_are_rewound(bench):
    """The second attempt went on from step 7, and what it recorded is lost with a checkpoint: it has been there."""
    run = bench.train(checkpoint={"every": 1, "keep": 20})
    killed = as_killed_after(run, 7, bench.path / "killed")
    run.rename(bench.path / "uninterrupted")
    killed.rename(run)
    for step in (7, 5):
        for path in (run / "checkpoints").glob("step-*"):
            if int(path.name[5:13]) > step:
                path.unlink()
        (run / "summary.json").unlink(missing_ok=True)
        assert hpclr("train", bench.write(checkpoint={"every": 1, "keep": 20})).code == 0
    found = records(run, "attempt")
    assert [(record["attempt"], record["step"]) for record in found] == [(1, 0), (2, 7), (3, 5)]
    assert {(record["world_size"], record["device"], record["steps"]) for record in found} == {(1, "cpu", 13)}
    assert found[0]["checks"] == {"delay": 6, "every": 3}
    assert (found[0]["save_every"], found[0]["save_minutes"]) == (1, None)
    assert [record["step"] for record in records(run, "train")] == list(range(1, 14))


@pytest.mark.parametrize(("seconds", "count"), [(0.0, 13), (1000.0, 1)])
def test_all_steps_are_in_a_record_of_pace(bench, monkeypatch, seconds, count):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", seconds)
    run = bench.train()
    found = records(run, "pace")
    assert len(found) == count
    assert sum(record["steps"] for record in found) == 13
    assert found[-1]["step"] == 13
    for record in found:
        assert 0 <= sum(record[part] for part in TIMES) <= record["seconds"] + 0.001
        assert record["memory"] > 1e7


def test_a_run_that_stops_records_its_pace(bench):
    run = bench.train(train={"steps": 8})
    (run / "summary.json").unlink()
    (run / "STOP").touch()
    bench.train(train={"steps": 10})
    assert sum(record["steps"] for record in records(run, "pace")) == 10


def test_seconds_are_counted_where_they_are_spent():
    found = []
    pace = Pace(lambda kind, step, **values: found.append((kind, step, values)), lambda: 7, 10)
    pace.settle(10)
    for part in TIMES:
        with getattr(pace, part):
            time.sleep(0.02)
    with pace.data:
        time.sleep(0.04)
    pace.settle(14)
    ((kind, step, values),) = found
    assert (kind, step, values["steps"], values["memory"]) == ("pace", 14, 4, 7)
    assert values["data"] >= 0.06
    assert all(0.02 <= values[part] < values["data"] for part in ("check", "save", "valid"))
    assert values["seconds"] >= 0.12
