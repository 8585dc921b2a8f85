"""Reading metrics.jsonl while it grows, is cut, or is replaced; what is worth a curve."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from track_helpers import check, train, write

from hpclr.track import records
from hpclr.track.records import Tail, record_of, without_most_steps
from hpclr.track.scalars import scalars


def steps(tail: Tail) -> list[int]:
    found = map(record_of, tail.read())
    return [record["step"] for record in found if record is not None]


def test_what_comes_is_read_once_and_in_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    write(path, train(1), train(2))
    with path.open("a") as file:
        file.write(json.dumps(train(3))[:20])
    assert steps(tail) == [1, 2]
    assert steps(tail) == []
    with path.open("a") as file:
        file.write(json.dumps(train(3))[20:] + "\n")
    assert steps(tail) == [3]
    assert tail.restarts == 0


def test_a_file_that_is_replaced_or_cut_is_read_anew(tmp_path):
    path = write(tmp_path / "metrics.jsonl", train(1), train(2))
    tail = Tail(path)
    assert steps(tail) == [1, 2]
    os.replace(write(tmp_path / "other", train(1), train(12), train(13)), path)
    assert steps(tail) == [1, 12, 13]
    write(path, train(1), more=False)
    assert steps(tail) == [1]
    assert tail.restarts == 2


def test_a_pipe_holds_up_nobody(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert Tail(tmp_path / "metrics.jsonl").read() == []


def test_a_line_longer_than_is_read_at_once_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_CHUNK", 200)
    path = write(tmp_path / "metrics.jsonl", train(1), train(2, text="x" * 1000), train(3))
    tail, found = Tail(path), []
    while lines := tail.read():
        found += [record["step"] for record in map(record_of, lines) if record is not None]
    assert found == [1, 3]


@given(st.one_of(st.binary(max_size=60), st.sampled_from([b"[" * 100_000, b'{"kind":"a","step":%s}' % (b"9" * 5000)])))
def test_no_line_does_harm(line):
    assert record_of(line) is None


@pytest.mark.parametrize("record", [{"kind": "a", "step": -1}, {"kind": "a", "step": 2**70}, {"kind": 1, "step": 1}])
def test_what_is_no_record(record):
    assert record_of(json.dumps(record).encode()) is None


def test_of_steps_the_last():
    lines = [json.dumps(record, separators=(",", ":")).encode() for record in (train(1), check(1), train(2), train(3))]
    assert without_most_steps(lines) == [lines[1], lines[3]]
    assert without_most_steps([]) == []


def test_the_numbers_of_records():
    assert scalars(train(2)) == {"train/loss": 0.5, "train/learning_rate": 0.1}
    assert scalars(check(1)) == {
        "parameters/trained": 0.25,
        "parameters/stored": 1.2,
        "communication/gradient_bytes": 100,
    }
    pace = {"kind": "pace", "step": 9, "steps": 4, "seconds": 2.0, "data": 0.5, "check": 0.0, "memory": 10}
    expected = {"pace/steps_per_second": 2.0, "pace/data": 0.25, "pace/check": 0.0, "memory/bytes": 10}
    assert scalars(pace) == expected
    assert scalars({"kind": "valid", "step": 1, "loss": 0.5, "accuracy": 1, "seconds": 3, "flops": 2}) == {
        "valid/loss": 0.5,
        "valid/accuracy": 1.0,
    }
    assert scalars({"kind": "final", "step": 1, "test": {"loss": 1, "samples": 10}}) == {"test/loss": 1}


@pytest.mark.parametrize("loss", [None, "1", True, float("nan"), float("inf"), 10**400, [1], {}])
def test_what_is_no_number_is_left_out(loss):
    assert scalars(train(1, loss=loss, lr=loss)) == {}
    assert scalars({"kind": "check", "step": 1, "trainable": loss, "dense": loss}) == {}
    assert scalars({"kind": "final", "step": 1, "test": loss}) == {}
