"""The file in which a process says what it is doing, and the log that it writes meanwhile."""

import operator
import os
import subprocess
import sys
import threading
import time
import warnings

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hpclr import output
from hpclr.parallel.watch.heartbeat import Heartbeat, pid_namespace, process_state, read_heartbeat
from hpclr.parallel.watch.logs import logged
from hpclr.parallel.watch.record import SIZE, fixed_size

# also long ones
ANY_TEXT = st.builds(operator.mul, st.text(st.characters(), max_size=9), st.sampled_from([1, 9, 99]))


@pytest.fixture
def beat(tmp_path):
    return Heartbeat(tmp_path / "rank-0003.heartbeat", 3, 8, "node7")


def test_a_heartbeat_says_who_where_and_what(beat, tmp_path):
    beat.phase("reading data", 12)
    beat.phase("reducing gradients", waiting=True)
    beat.write()
    beat.write()
    record = read_heartbeat(tmp_path / "rank-0003.heartbeat")
    assert (record.rank, record.world_size, record.host, record.pid) == (3, 8, "node7", os.getpid())
    assert (record.beat, record.progress, record.step, record.waiting) == (2, 2, 12, True)
    assert record.doing == "reducing gradients at step 12"
    assert record.who == f"rank 3 on node7 (pid {os.getpid()})"
    assert 0 <= record.seconds < 5


def test_a_phase_costs_next_to_nothing(beat):
    began = time.thread_time()
    for step in range(100_000):
        beat.phase("reading data", step)
    assert (time.thread_time() - began) / 100_000 < 3e-6


@pytest.mark.parametrize("text", ["é" * 1000, "\x00\x1b[31m" * 300, '"\\' * 500, "😀" * 400])
def test_the_file_has_one_size_whatever_is_said(beat, tmp_path, text):
    beat.phase(text)
    beat.last_word("failed", 1, text)
    path = tmp_path / "rank-0003.heartbeat"
    assert path.stat().st_size == SIZE
    assert read_heartbeat(path).ending == "failed"
    beat.last_word("failed", 1, "short")
    assert read_heartbeat(path).message == "short"


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b" " * SIZE, b"\xff\xfe", b"{}", b'{"rank": 1', b'{"rank": "1"}', b"null"),
        *(b'{"host": "\xff"}', b'{"other": "\xff"}', b'{"other": ' + b"[" * 100_000),
    ],
)
def test_what_is_no_heartbeat_counts_as_none(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    assert read_heartbeat(tmp_path / "file") is None


def test_a_pipe_is_no_heartbeat_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "file")
    assert read_heartbeat(tmp_path / "file") is None


class Texts(msgspec.Struct):
    one: str
    other: str
    fixed: str = ""


@given(ANY_TEXT, ANY_TEXT)
@example("\udcff", "")
def test_a_record_has_one_size_and_says_what_it_has_come_to(one, other):
    record = Texts(one, other)
    content = fixed_size(record, ("one", "other"))
    assert len(content) == SIZE
    assert msgspec.json.decode(content, type=Texts) == record
    assert len(content.strip()) > SIZE / 2 or (len(record.one) >= len(one) and len(record.other) >= len(other))


def test_a_short_record_is_not_cut():
    record = Texts("one", "é", "x" * 400)
    fixed_size(record, ("one", "other"))
    assert record == Texts("one", "é", "x" * 400)


@given(ANY_TEXT)
def test_a_record_that_cannot_be_cut_to_its_size_is_refused(text):
    record = Texts(text, text, "x" * SIZE)
    with pytest.raises(ValueError, match=r"a record of Texts takes 5[0-9]+ bytes without its texts"):
        fixed_size(record, ("one", "other"))


def test_a_torn_record_counts_as_none(beat, tmp_path):
    beat.write()
    path = tmp_path / "rank-0003.heartbeat"
    path.write_bytes(path.read_bytes().replace(b'"beat":1,', b'"beat":2,'))
    assert read_heartbeat(path) is None


def test_records_are_read_while_they_are_written(beat, tmp_path):
    over = threading.Event()

    def write():
        while not over.is_set():
            beat.phase("x" * (beat.now.progress % 200))
            beat.write()

    beat.write()
    writer = threading.Thread(target=write)
    writer.start()
    try:
        found = [read_heartbeat(tmp_path / "rank-0003.heartbeat") for _ in range(300)]
    finally:
        over.set()
        writer.join()
    assert sum(record is None for record in found) < 10


def test_a_disk_that_takes_nothing_does_not_matter(tmp_path):
    beat = Heartbeat(tmp_path / "missing" / "file", 0, 1, "here")
    beat.write()
    beat.last_word("done")


def test_processes_that_are_gone_or_stopped_are_known():
    assert pid_namespace()
    assert process_state(os.getpid()) in "RS"
    with subprocess.Popen(["sleep", "100"]) as child:
        child.send_signal(19)
        deadline = time.monotonic() + 5
        while process_state(child.pid) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process_state(child.pid) == "T"
        child.kill()
        while process_state(child.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process_state(child.pid) == ""  # although nobody has waited for it yet
    assert process_state(child.pid) == ""


WRITER = """
import os, subprocess, sys, warnings
from pathlib import Path
from hpclr.output import say
from hpclr.parallel.watch.logs import logged
print("before")
with logged(Path(sys.argv[1]), console=sys.argv[2] == "first") as log:
    print("printed")
    say("said")
    warnings.warn("beware")
    os.write(2, b"native\\n")
    subprocess.run(["echo", "child"])
    log.speak("spoken")
print("after")
say("said after")
"""


@pytest.mark.parametrize("which", ["first", "other"])
def test_where_text_goes(tmp_path, which):
    done = subprocess.run([sys.executable, "-c", WRITER, tmp_path / "log", which], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "log").read_text()
    first = which == "first"
    assert done.stdout.split() == (["before", "printed", "child", "after"] if first else ["before", "after"])
    assert "spoken" in done.stderr
    assert done.stderr.endswith("said after\n")
    assert ("native" in done.stderr) is first
    assert ("beware" in done.stderr) is first
    assert ("said\n" in done.stderr) is first
    assert "said\n" in log
    assert "beware" in log
    assert all((word in log) is not first for word in ("printed", "native", "child"))
    assert "after" not in log


def test_a_log_is_continued_and_a_silenced_process_stays_silent(tmp_path):
    program = WRITER.replace('log.speak("spoken")', "log.silence()")
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program, tmp_path / "log", "first"], capture_output=True, text=True
        )
        assert "after" not in done.stdout + done.stderr
    assert (tmp_path / "log").read_text().count("said after") == 2


def test_what_a_display_shows_in_its_own_way_is_said_in_the_log_only(tmp_path, capsys):
    shown = warnings.showwarning
    with logged(tmp_path / "log", console=True):
        output.say_in_log("step 3")
    output.say_in_log("step 4")
    assert (tmp_path / "log").read_text() == "step 3\n"
    assert capsys.readouterr().err == ""
    assert warnings.showwarning is shown
