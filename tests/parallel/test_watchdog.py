"""Processes that die, stop, hang or raise: all others end in time and say who it was."""

import signal
import subprocess
import sys
import time

import pytest
from attempt_helpers import PROGRAM, team

from hpclr.parallel.watch.attempt import heartbeat_path
from hpclr.parallel.watch.diagnosis import post_mortem
from hpclr.parallel.watch.heartbeat import process_state, read_heartbeat


@pytest.mark.parametrize("size", [2, 4])
def test_a_killed_process_is_named_long_before_the_timeout(tmp_path, size):
    with team(tmp_path, size, "kill", timeout=6) as members:
        others = range(size - 1)
        assert members.codes(*others) == [75] * (size - 1)
        assert time.monotonic() - members.began < 5
        record = members.exit_file()
        assert (record["code"], record["outcome"], record["rank"], record["step"]) == (75, "retry", size - 1, 3)
        pid = members.processes[-1].pid
        assert (
            f"rank {size - 1} on here (pid {pid}) died without a word: it was last seen reading data at step 3"
            in str(record["message"])
        )
        assert sum("died without a word" in members.console(rank) for rank in others) == 1
        for rank in others:
            assert str(record["message"]) in members.log(rank)
            assert "in meet" in members.log(rank)  # the stack of the main thread


def test_a_stopped_process_is_named_by_the_others(tmp_path):
    with team(tmp_path, 3, "stop", timeout=2) as members:
        assert members.codes(0, 1) == [75, 75]
        message = str(members.exit_file()["message"])
        assert message.endswith("does not answer: it was last seen reading data at step 3 (stopped by a signal)")
        assert message.startswith("rank 2 on here")
        stopped = members.processes[2]
        stopped.send_signal(signal.SIGCONT)
        assert stopped.wait(10) == 1 or stopped.returncode == 75  # it goes on, meets nobody, and does not stay


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_hanging_process_ends_the_job_within_the_timeout(tmp_path, size):
    with team(tmp_path, size, "hang", timeout=2) as members:
        assert members.codes() == [75] * size
        record = members.exit_file()
        assert record["rank"] == size - 1
        assert "has made no progress for" in str(record["message"])
        assert "it is reading data at step 3" in str(record["message"])
        assert "in trouble" in members.log(size - 1)
        assert all("in meet" in members.log(rank) for rank in range(size - 1))


@pytest.mark.parametrize(("fault", "code"), [("bug", 1), ("input", 75), ("usage", 2)])
def test_an_error_of_one_process_is_the_error_of_all(tmp_path, fault, code):
    with team(tmp_path, 2, fault) as members:
        assert members.codes() == [code, code]
        record = members.exit_file()
        assert (record["code"], record["rank"], record["host"], record["step"]) == (code, 1, "here", 3)
        assert "rank 1 on here" in str(record["message"])
        assert ", reading data at step 3: " in str(record["message"])
        assert "in trouble" in members.log(1)
        assert str(record["message"]) in members.console(1)
        assert "Traceback" not in members.console(1)
        assert members.console(0) == ""


@pytest.mark.parametrize("fault", ["kill", "bug"])
def test_a_broken_collective_is_blamed_on_the_process_that_broke_it(tmp_path, fault):
    with team(tmp_path, 2, fault, timeout=20, meeting="gloo") as members:
        assert members.codes()[0] == {"kill": 75, "bug": 1}[fault]
        record = members.exit_file()
        assert record["rank"] == 1
        assert ("died without a word" if fault == "kill" else "a bug") in str(record["message"])
        assert ("died" in members.console(0)) is (fault == "kill")  # the dead cannot speak


def test_a_process_that_is_blocked_in_a_collective_ends_when_another_hangs(tmp_path):
    with team(tmp_path, 2, "hang", timeout=2, meeting="gloo") as members:
        assert members.codes() == [75, 75]
        assert "rank 1 on here" in str(members.exit_file()["message"])
        assert "barrier" in members.log(0)


def test_a_crash_leaves_its_stack_in_the_log(tmp_path):
    with team(tmp_path, 2, "crash") as members:
        assert members.codes() == [75, -signal.SIGSEGV]
        assert "string_at" in members.log(1)


def test_where_all_are_gone_the_heartbeats_tell_what_happened(tmp_path):
    with team(tmp_path, 2, "stop", timeout=60) as members:
        log = members.directory / "rank-0001.log"
        while not (log.exists() and "was here" in log.read_text()):
            time.sleep(0.05)
        time.sleep(2.0)  # until a beat tells of it
        for process in members.processes:
            process.kill()
        members.codes()
        assert not (members.directory / "exit.json").exists()
        outcome = post_mortem(members.directory)
        assert (outcome.code, outcome.rank, outcome.step) == (75, 1, 3)
        assert members.exit_file()["message"] == outcome.message
        assert "2 in all: ranks 0, 1" in outcome.message
        assert post_mortem(members.directory) == outcome


@pytest.mark.parametrize(("fault", "code", "name"), [("none", 0, "done"), ("asked", 85, "saved")])
def test_a_good_end_is_recorded_by_the_first_process(tmp_path, fault, code, name):
    with team(tmp_path, 2, fault) as members:
        assert members.codes() == [code, code]
        record = members.exit_file()
        assert (record["code"], record["outcome"], record["rank"]) == (code, name, 0)
        assert ("saved at step 5" in members.console(0)) is (fault == "asked")
        assert "was here" in members.log(1)
        assert members.console(1) == ""


LAUNCHER = """
import subprocess, sys
for line in sys.argv[1:]:
    subprocess.Popen(eval(line))
sys.stdin.read()
"""


def test_processes_whose_launcher_is_gone_end(tmp_path):
    directory = tmp_path / "logs" / "attempt-01"
    directory.mkdir(parents=True)
    lines = [[sys.executable, "-c", PROGRAM, str(directory), str(r), "2", "60", "hang", "files"] for r in range(2)]
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *map(repr, lines)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as launcher:
        log = directory / "rank-0001.log"
        while not (log.exists() and "was here" in log.read_text()):
            time.sleep(0.05)
        launcher.kill()
        pids = [members.pid for rank in range(2) if (members := read_heartbeat(heartbeat_path(directory, rank)))]
    deadline = time.monotonic() + 10
    while any(map(process_state, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2
    assert not any(map(process_state, pids))
    assert "has lost its launcher" in (directory / "exit.json").read_text()
