"""A sink has all records; one that fails, hangs or is slow harms nobody."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from track_helpers import eventually, train, write

from hpclr.track import follower
from hpclr.track.follower import followed
from hpclr.track.records import Record


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    for name, seconds in (("_INTERVAL", 0.01), ("_FIRST_PAUSE", 0.01), ("_REST", 0.0)):
        monkeypatch.setattr(follower, name, seconds)


class Kept:
    """Keeps what it is given; fails where it is told to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.steps: list[int] = []
        self.closed = False
        self._fail_at = fail_at

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            if record["step"] == self._fail_at:
                raise OSError("the disk is full")
            self.steps.append(record["step"])

    def close(self) -> None:
        self.closed = True


def test_all_records_in_order_also_the_last(tmp_path):
    path, kept = tmp_path / "metrics.jsonl", Kept()
    write(path, *map(train, range(1, 301)))
    with followed(path, {"it": lambda: kept}):
        eventually(lambda: len(kept.steps) == 300)
        write(path, train(301))
        eventually(lambda: len(kept.steps) == 301)
        write(path, train(302))
    assert kept.steps == list(range(1, 303))
    assert kept.closed


def test_a_sink_that_fails_is_opened_anew_and_spoken_of_once(tmp_path, capsys):
    path = write(tmp_path / "metrics.jsonl", *map(train, range(1, 10)))
    opened: list[Kept] = []

    def make() -> Kept:
        if len(opened) == 1:
            opened.append(Kept())
            raise ImportError("broken package")
        opened.append(Kept(fail_at=5 if not opened else None))
        return opened[-1]

    with followed(path, {"TensorBoard": make}):
        eventually(lambda: len(opened) == 3 and len(opened[2].steps) == 9)
    assert opened[0].steps == [1, 2, 3, 4]
    assert opened[0].closed
    assert opened[2].steps == list(range(1, 10))
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert "TensorBoard: OSError: the disk is full. Training goes on" in said


def test_a_sink_that_hangs_holds_up_the_end_for_a_moment_only(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(follower, "LAST_WAIT", 0.2)
    path, kept, hang = write(tmp_path / "metrics.jsonl", train(1)), Kept(), threading.Event()

    class Hanging(Kept):
        def write(self, records: Sequence[Record]) -> None:
            hang.wait(20)

    began = time.monotonic()
    with followed(path, {"MLflow": Hanging, "other": lambda: kept}):
        pass
    assert time.monotonic() - began < 5
    assert kept.steps == [1]
    said = capsys.readouterr().err
    assert "MLflow: it does not take the last records in time" in said
    assert "other" not in said
    hang.set()


def test_one_that_fails_to_the_end(tmp_path, capsys):
    with followed(write(tmp_path / "metrics.jsonl", train(1)), {"it": lambda: Kept(fail_at=1)}):
        time.sleep(0.1)
    assert capsys.readouterr().err.count("warning") == 1


def test_what_is_caught_up_on_leaves_time_for_others(tmp_path, monkeypatch):
    monkeypatch.setattr(follower, "_REST", 4.0)
    path, kept = write(tmp_path / "metrics.jsonl", *map(train, range(1, 201))), Kept()
    written: list[float] = []

    class Slow(Kept):
        def write(self, records: Sequence[Record]) -> None:
            kept.write(records)
            written.append(time.monotonic())
            end = time.thread_time() + 0.1
            while time.thread_time() < end:
                pass

    with followed(path, {"it": Slow}):
        eventually(lambda: len(written) == 2)
    assert written[1] - written[0] >= 0.5


def test_waiting_for_a_server_is_no_work_to_rest_from(tmp_path, monkeypatch):
    monkeypatch.setattr(follower, "_REST", 100.0)
    path, written = write(tmp_path / "metrics.jsonl", *map(train, range(1, 401))), []

    class Waiting(Kept):
        def write(self, records: Sequence[Record]) -> None:
            time.sleep(0.1)
            written.append(time.monotonic())

    with followed(path, {"it": Waiting}):
        eventually(lambda: len(written) == 4)
    assert written[-1] - written[0] < 5


def test_a_finished_run_has_time_for_what_is_missed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(follower, "LAST_WAIT", 0.05)
    path = write(tmp_path / "metrics.jsonl", train(1))

    class Slow(Kept):
        def write(self, records: Sequence[Record]) -> None:
            time.sleep(0.5)
            super().write(records)

    kept = Slow()
    with followed(path, {"it": lambda: kept}):
        pass
    assert "Starting the run again gives it what it lacks" in capsys.readouterr().err
    kept = Slow()
    with followed(path, {"it": lambda: kept}, finished=True):
        pass
    assert kept.steps == [1]
    assert kept.closed
    assert capsys.readouterr().err == ""


def test_no_sinks_no_threads(tmp_path: Path):
    before = threading.active_count()
    with followed(tmp_path / "metrics.jsonl", {}):
        assert threading.active_count() == before
