"""metrics.jsonl of whoever's making: what is wrong is named, the rest is read, in bounded time and memory."""

import json
import os
import random
import re
import time

import pytest
from report_helpers import BEGAN, make_run, records, summary

from hpclr.report.page import page_of
from hpclr.report.records import read_records
from hpclr.report.runs import read_runs
from hpclr.report.thinning import thinned

GOOD = {"kind": "train", "step": 1, "loss": 0.5, "lr": 0.1}
BAD = {
    "no JSON": "{",
    "not an object": "[1]",
    "text in place of a number": '{"kind":"train","step":1,"loss":"<script>"}',
    "a step that is none": '{"kind":"train","step":-1,"loss":1}',
    "a step beyond all steps": '{"kind":"train","step":1' + "0" * 400 + "}",
    "a number beyond all numbers": '{"kind":"train","step":1,"loss":1e999}',
    "depth": '{"kind":"valid","step":1,"more":' + "[" * 100_000 + "]" * 100_000 + "}",
    "no kind": '{"step":1}',
    "NaN, which JSON does not have": '{"kind":"train","step":1,"loss":NaN}',
    "a loss without room on an axis": '{"kind":"train","step":1,"loss":1e308}',
    "a time without room on an axis": '{"kind":"pace","step":1,"steps":1,"seconds":1e299}',
    "an integer beyond all numbers": '{"kind":"pace","step":1,"seconds":1' + "0" * 400 + "}",
    "a rank without room on an axis": '{"kind":"check","step":1,"ranks":{"head":-1e200}}',
}


@pytest.mark.parametrize("line", BAD.values(), ids=BAD)
def test_a_line_that_is_no_record_is_named_and_the_rest_is_read(tmp_path, line):
    found = read_records(make_run(tmp_path, "run", [GOOD, line, GOOD | {"step": 2}]) / "metrics.jsonl")
    assert list(found.tables["train"]["step"]) == [1, 2]
    assert found.faulty == 1
    assert found.faults[0].startswith("line 2: ")


EXTREME = [1e308, -1e308, 1e299, -1e299, 1e-299, 1e100, -1e100, 1e99, -1e99, 1e-99, 5e-324, 0, 1, -1, 2**53, 10**400]


def shaken(value, draw):
    """A record with some of its numbers replaced by extreme ones."""
    if isinstance(value, dict):
        return {key: inner if key == "step" else shaken(inner, draw) for key, inner in value.items()}
    if isinstance(value, list):
        return [shaken(inner, draw) for inner in value]
    return draw.choice(EXTREME) if not isinstance(value, str) and draw.random() < 0.2 else value


@pytest.mark.parametrize("seed", range(30))
def test_a_page_is_made_of_numbers_as_large_and_small_as_they_come(tmp_path, seed):
    """Those that have no place on an axis are left out, and that is said."""
    draw = random.Random(seed)
    runs = [
        make_run(
            tmp_path, name, [shaken(one, draw) for one in records(steps=100, restart=49)],
            summary=shaken(summary(), draw) if seed % 2 else None,
        )
        for name in ("a", "b")
    ]  # fmt: skip
    found = read_runs(runs, spectra=False)
    content = page_of(found).decode()
    assert not re.search(r'[ "M,](nan|inf)\b', content)
    assert all(run.records.faulty and f"{run.records.faulty} of {run.records.lines} lines" in content for run in found)


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind":"tr\xff","step":1}\n' + json.dumps(GOOD).encode() + b"\n")
    found = read_records(path)
    assert (found.faulty, len(found.tables["train"])) == (1, 1)


def test_a_line_that_is_being_written_is_said_to_be_cut_short(tmp_path):
    path = make_run(tmp_path, "run", [GOOD]) / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind":"train","st')
    assert read_records(path).faults[0].startswith("line 2, which is cut short: ")


def test_records_of_a_later_version_are_no_fault(tmp_path):
    lines = [{"kind": "weather", "step": 1, "loss": 1.0}, GOOD | {"more": {"than": "now"}}]
    found = read_records(make_run(tmp_path, "run", lines) / "metrics.jsonl")
    assert (found.faulty, len(found.tables["train"])) == (0, 1)


def test_losses_that_are_not_finite_are_counted_and_left_out(tmp_path):
    found = read_records(make_run(tmp_path, "run", [GOOD, GOOD | {"loss": None, "step": 2}]) / "metrics.jsonl")
    assert found.not_finite == 1
    assert found.tables["train"].points("step", "loss") == [(1, 0.5)]


def test_a_line_without_end_is_read_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("hpclr.report.records._LONGEST_LINE", 1000)
    lines = [{"kind": "train", "step": 1, "loss": 1.0, "lr": "x" * 5000}, GOOD]
    found = read_records(make_run(tmp_path, "run", lines) / "metrics.jsonl")
    assert found.faulty >= 1
    assert len(found.tables["train"]) == 1


def test_of_many_faults_twenty_are_named(tmp_path):
    run = make_run(tmp_path, "run", ["{"] * 1000 + [GOOD])
    (found,) = read_runs([run], spectra=False)
    assert found.faults[0].count("line ") == 20
    assert "1,000 of 1,001 lines" in found.faults[0]
    assert "and 980 more" in found.faults[0]


def test_records_lost_to_a_full_disk_are_told(tmp_path):
    (found,) = read_runs([make_run(tmp_path, "run", [GOOD, {"kind": "gap", "step": 5, "lost": 7}])], spectra=False)
    assert "7 records were lost" in found.faults[0]


def test_a_pipe_does_not_hold_up_whoever_looks(tmp_path):
    from hpclr.errors import UsageError

    run = make_run(tmp_path, "run")
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(UsageError, match="cannot be read"):
        read_runs([run], spectra=False)


def test_time_is_that_of_the_records_with_the_pause_between_attempts(tmp_path):
    (run,) = read_runs([make_run(tmp_path, "run", records(pause=1000.0))], spectra=False)
    points = run.clock.points(run.table("train"), "loss")
    assert (points[0][0], points[-1][0]) == (1, 1400)
    assert [(one.number, one.step, one.seconds) for one in run.attempts] == [(1, 0, 0), (2, 200, 1200)]


def test_older_records_take_their_time_from_checks_and_validations(tmp_path):
    lines = [{"kind": "train", "step": step, "loss": 1.0} for step in range(1, 41)]
    lines += [{"kind": "valid", "step": 20, "seconds": 10.0}, {"kind": "valid", "step": 40, "seconds": 50.0}]
    (run,) = read_runs([make_run(tmp_path, "run", lines)], spectra=False)
    seconds = dict(zip(range(1, 41), (x for x, _ in run.clock.points(run.table("train"), "loss")), strict=True))
    assert (seconds[10], seconds[20], seconds[30], seconds[40]) == (5, 10, 30, 50)


def test_records_out_of_order_are_put_in_order(tmp_path):
    lines = [GOOD | {"step": step, "time": BEGAN - step} for step in (3, 1, 2)]
    (run,) = read_runs([make_run(tmp_path, "run", lines)], spectra=False)
    assert [x for x, _ in run.table("train").points("step", "loss")] == [1, 2, 3]
    assert [x for x, _ in run.clock.points(run.table("train"), "loss")] == [0, 1, 2]


@pytest.mark.slow
def test_a_million_records_make_a_page_of_few_megabytes_in_seconds(tmp_path):
    run = make_run(tmp_path, "run", ())
    line = '{"kind":"train","step":%d,"loss":%.9f,"epoch":0,"lr":0.001,"time":%.3f}\n'
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 1_000_001):
            loss = 1000.0 if step == 777_777 else 1 + step % 7 / 10
            file.write(line % (step, loss, BEGAN + step))
            if step % 2000 == 0:
                file.write(
                    json.dumps({"kind": "check", "step": step, "ranks": {f"layer{n}": 9 for n in range(50)}}) + "\n"
                )
    before = time.process_time()
    page = page_of(read_runs([run], spectra=False))
    assert time.process_time() - before < 30
    assert len(page) < 4e6
    assert b"777777,1000" not in page  # the numbers are in base64
    points = thinned(read_runs([run], spectra=False)[0].table("train").points("step", "loss"), 360)
    assert (777_777, 1000.0) in points
