"""How an attempt ended, and whose fault it was: exit.json and what is read from heartbeats."""

import errno
import json
import os
import subprocess
import sys
import threading

import pytest

from hpclr.errors import HpclrError, RetryableError, StopRequestedError, UsageError, error_of
from hpclr.parallel.watch.attempt import (
    LAUNCH_VARIABLE,
    attempt_directory,
    attempt_of_launch,
    attempts,
    heartbeat_path,
    launch_directory,
    next_attempt,
)
from hpclr.parallel.watch.diagnosis import diagnose, explain, is_of_peers, post_mortem
from hpclr.parallel.watch.heartbeat import Heartbeat
from hpclr.parallel.watch.outcome import Outcome, outcome_of, read_outcome, record_outcome

CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")


@pytest.fixture
def directory(tmp_path):
    return attempt_directory(tmp_path, next_attempt(tmp_path))


def beat_of(directory, rank, size=2, **changes):
    """The heartbeat of a rank that lives in this process; `changes` makes it another's."""
    beat = Heartbeat(heartbeat_path(directory, rank), rank, size, f"n{rank}")
    for name, value in changes.items():
        setattr(beat, name, value)
    return beat


def of_the_dead(directory, rank, monkeypatch, size=2):
    """The last record of a process of this machine that is gone."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    beat = beat_of(directory, rank, size)
    beat.phase("reading data", 7)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: gone.pid)
        beat.write()
    return gone.pid


def test_attempts_are_numbered_on(tmp_path):
    assert attempts(tmp_path) == []
    assert [next_attempt(tmp_path) for _ in range(2)] == [1, 2]
    (tmp_path / "logs" / "attempt-99").mkdir()
    (tmp_path / "logs" / "attempt-old").mkdir()
    assert next_attempt(tmp_path) == 100
    assert attempts(tmp_path) == [1, 2, 99, 100]
    assert sorted(p.name for p in (tmp_path / "logs").iterdir())[:2] == ["attempt-01", "attempt-02"]


def test_a_launch_is_told_of_its_attempt(tmp_path, monkeypatch):
    place = tmp_path / "place"
    place.mkdir()
    assert launch_directory() is None
    assert attempt_of_launch(place) is None
    monkeypatch.setenv(LAUNCH_VARIABLE, str(place))
    number = next_attempt(tmp_path / "a run")
    assert attempt_of_launch(place) == attempt_directory(tmp_path / "a run", number)
    monkeypatch.setenv(LAUNCH_VARIABLE, str(tmp_path / "gone"))
    assert launch_directory() is None


def test_an_outcome_is_written_and_read(directory):
    outcome = Outcome(75, "rank 1 died", 1, "n1", 7)
    assert record_outcome(directory, outcome)
    assert read_outcome(directory) == outcome
    record = json.loads((directory / "exit.json").read_text())
    assert record.pop("time").endswith("+00:00")
    assert record == {
        "code": 75, "outcome": "retry", "message": "rank 1 died", "rank": 1, "host": "n1", "step": 7, "attempt": 1,
    }  # fmt: skip
    assert os.listdir(directory) == ["exit.json"]


@pytest.mark.parametrize("links", [True, False])
def test_of_many_one_is_first(directory, monkeypatch, links):
    if not links:

        def link(*names):
            raise OSError(errno.ENOTSUP, "no links here")

        monkeypatch.setattr(os, "link", link)
    won = []
    start = threading.Barrier(8)

    def record(rank):
        start.wait()
        if record_outcome(directory, Outcome(1, "mine", rank)):
            won.append(rank)

    threads = [threading.Thread(target=record, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [read_outcome(directory).rank] == won
    assert os.listdir(directory) == ["exit.json"]


def test_an_outcome_that_cannot_be_written_is_spoken_of(tmp_path):
    assert record_outcome(tmp_path / "missing", Outcome(1, "a bug"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"code": "1", "message": ""}', b"\xff"])
def test_a_damaged_record_counts_for_nothing(directory, content):
    assert read_outcome(directory) is None
    (directory / "exit.json").write_bytes(content)
    with pytest.warns(UserWarning, match=r"exit\.json cannot be read"):
        assert read_outcome(directory) is None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), 2),
        (RetryableError("x"), 75),
        (ValueError("x"), 1),
        (OSError(errno.EIO, "x"), 75),
        (OSError(errno.ENOSPC, "x"), 75),
        (OSError("HDF5 cannot read"), 75),
        (FileNotFoundError(errno.ENOENT, "x"), 1),
        (PermissionError(errno.EACCES, "x"), 1),
        (KeyboardInterrupt(), 1),
    ],
)
def test_codes_of_errors(error, code):
    assert outcome_of(error).code == code


@pytest.mark.parametrize("kind", [HpclrError, UsageError, RetryableError, StopRequestedError])
def test_an_error_is_known_again_by_its_code(kind):
    found = error_of(kind("no").exit_code, "no")
    assert (type(found), str(found)) == (kind, "no")


def test_errors_that_come_of_other_processes():
    assert is_of_peers(CLOSED)
    assert is_of_peers(RuntimeError("[gloo] Timed out waiting 3000ms for recv operation to complete"))
    assert is_of_peers(ConnectionResetError())
    assert not is_of_peers(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_of_peers(ValueError("timed out"))
    assert not is_of_peers(UsageError("connection closed"))


def test_a_broken_connection_is_explained_by_the_record_of_another(directory):
    beat_of(directory, 0).write()
    beat_of(directory, 1).write()
    threading.Timer(0.2, record_outcome, (directory, Outcome(1, "a bug", 1))).start()
    assert explain(CLOSED, directory, 0, 2, 0.1) == Outcome(1, "a bug", 1)


def test_a_broken_connection_is_explained_by_a_death(directory, monkeypatch):
    beat_of(directory, 0).write()
    pid = of_the_dead(directory, 1, monkeypatch)
    outcome = explain(CLOSED, directory, 0, 2, 0.1)
    assert (outcome.code, outcome.rank, outcome.host, outcome.step) == (75, 1, "n1", 7)
    assert outcome.message.startswith(
        f"rank 1 on n1 (pid {pid}) died without a word: it was last seen reading data at step 7 (killed"
    )


def test_own_errors_need_no_explanation(directory):
    assert explain(ValueError("x"), directory, 0, 2, 0.1) == Outcome(1, "unexpected ValueError: x")
    assert explain(CLOSED, directory, 0, 1, 0.1).code == 1


def test_the_culprit_is_told_from_those_who_wait(directory):
    beats = [beat_of(directory, rank, 4) for rank in range(4)]
    for beat in beats:
        beat.phase("reducing gradients", 8, waiting=True)
    beats[2].phase("reading data", 8)

    def all_beat():
        for beat in beats:
            beat.write()

    found = diagnose(directory, 4, 0.05, all_beat)
    assert (found.state, found.rank) == ("hanging", 2)
    beats[2].phase("reducing gradients", 7, waiting=True)
    found = diagnose(directory, 4, 0.05, all_beat)
    assert (found.state, found.rank) == ("waiting", 2)
    assert "rank 2 on n2" in found.message
    beats[1].last_word("failed", 2, "rank 1: no such thing")
    assert diagnose(directory, 4, 0.05, all_beat).outcome() == Outcome(2, "rank 1: no such thing", 1, "n1", 8)


def test_a_process_that_does_not_beat_is_named_before_one_that_hangs(directory):
    beats = [beat_of(directory, rank, 3, _pid_namespace="elsewhere") for rank in range(3)]
    beats[0].phase("computing", 8)
    beats[1].phase("reading data", 8)
    for beat in beats:
        beat.write()
    found = diagnose(directory, 3, 0.05, lambda: [beats[rank].write() for rank in (0, 2)])
    assert (found.state, found.rank) == ("silent", 1)
    assert "does not answer: it was last seen reading data at step 8" in found.message
    assert "or its node is gone" in found.message


def test_a_process_that_never_started_is_named(directory):
    beat = beat_of(directory, 0)
    found = diagnose(directory, 2, 0.05, beat.write)
    assert (found.state, found.rank) == ("missing", 1)
    assert str(directory) in found.message


def test_those_who_left_because_of_others_are_not_to_blame(directory):
    beat_of(directory, 0).last_word("left", 75, "rank 1 died")
    beat = beat_of(directory, 1)
    beat.phase("reading data", 3)
    beat.write()
    outcome = post_mortem(directory)
    assert (outcome.code, outcome.rank, outcome.step) == (75, 1, 3)
    assert read_outcome(directory) == outcome


@pytest.mark.parametrize(("ending", "code"), [("done", 0), ("saved", 85)])
def test_a_good_end_that_could_not_be_recorded_is_read_from_the_heartbeats(directory, ending, code):
    for rank in range(2):
        beat_of(directory, rank).last_word(ending, code, "well")
    assert (post_mortem(directory).code, post_mortem(directory).message) == (code, "well")


def test_nothing_at_all_is_worth_another_try(directory):
    assert post_mortem(directory).code == 75


def test_none_of_this_needs_torch():
    program = "import hpclr.parallel.watch.participation, hpclr.parallel.launch, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
