"""`hpclr logs`: what the processes wrote, followed from one attempt to the next."""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from watching_helpers import Questions, attempt_with_log, away_slurm

from hpclr.cluster import logs
from hpclr.cluster.logs import Choice, follow_logs, show_logs
from hpclr.cluster.record import note_jobs
from hpclr.parallel.watch.attempt import attempt_directory, log_path
from hpclr.parallel.watch.heartbeat import Heartbeat
from hpclr.parallel.watch.outcome import Outcome, record_outcome
from hpclr.slurm import client
from hpclr.slurm.script import BatchScript
from hpclr.training.lock import locked

sys.path.append(str(Path(__file__).parents[1] / "training"))
from training_helpers import hpclr, records, run_file

PAUSE = 0.01


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "run" / "submission").mkdir(parents=True)
    return tmp_path / "run"


def ended(log: Path, code: int) -> None:
    record_outcome(log.parent, Outcome(code, f"ended with {code}"))


@contextmanager
def followed(run: Path, choice: Choice = Choice()):  # noqa: B008 - frozen
    """The text that `logs -f` shows while the block lasts, which must bring it to its end."""
    shown: list[str] = []
    thread = threading.Thread(target=follow_logs, args=(run, choice, shown.append, PAUSE), daemon=True)
    thread.start()
    yield shown
    thread.join(20)
    assert not thread.is_alive()


def eventually(shown: list[str], text: str) -> None:
    end = time.monotonic() + 20
    while "".join(shown) != text:
        assert time.monotonic() < end, shown
        time.sleep(PAUSE)


def test_the_newest_attempt_or_the_one_that_is_asked_for(run):
    ended(attempt_with_log(run, "first\n"), 85)
    newest = attempt_with_log(run, "second\nno end of line")
    (newest.parent / "rank-0003.log").write_text("third process\n")
    done = hpclr("logs", run)
    assert (done.code, done.out) == (0, "second\nno end of line\n")
    assert done.err == f"--- {newest}\n"
    assert hpclr("logs", run, "--attempt", 1).out == "first\n"
    assert hpclr("logs", run, "--rank", 3).out == "third process\n"


def test_logs_of_jobs(run):
    (run / "logs").mkdir()
    for name in ("9_0_log.out", "10_0_log.err", "10_0_log.out", "10_submission.sh"):
        (run / "logs" / name).write_text(f"{name}\n")
    done = hpclr("logs", run, "--job")
    assert done.out == "10_0_log.err\n10_0_log.out\n"
    assert "leave out --rank" in hpclr("logs", run, "--job", "--rank", 1).err


def test_what_is_not_there(run):
    assert "there are no such logs yet: the run is new" in hpclr("logs", run).err
    assert hpclr("logs", run, "-f").err.endswith("nothing writes any: the run is new\n")
    (run / "logs").mkdir()
    (run / "logs" / "7_0_log.err").write_text("no such partition\n")
    assert hpclr("logs", run, "-f").err.endswith("the run is failed; --job shows what its job has written\n")
    log = attempt_with_log(run, "text\n")
    Heartbeat(log.with_suffix(".heartbeat"), 0, 4, "n1").write()
    assert "there is no attempt 2; it has 1" in hpclr("logs", run, "--attempt", 2).err
    done = hpclr("logs", run, "--rank", 4)
    assert (done.code, "attempt 1 has no rank 4; it has 4 processes" in done.err) == (2, True)
    done = hpclr("logs", run, "--rank", 3)
    assert (done.code, "there are no such logs yet: the run is killed" in done.err) == (2, True)
    assert hpclr("logs", run.parent / "none").code == 2


def test_text_cannot_drive_the_terminal(run):
    attempt_with_log(run).write_bytes(b"a\tb \x1b]0;title\x07 \xff \xc3\xa9\r\n")
    assert hpclr("logs", run).out == "a       b \\x1b]0;title\\x07 � é\\r\n"


def test_long_logs_are_shown_in_whole_lines(run, monkeypatch):
    monkeypatch.setattr(logs, "_CHUNK", 64)
    text = "".join(f"zeile ä {'x' * (number % 40)}\n" for number in range(200)) + "y" * 300 + "\nend\n"
    attempt_with_log(run, text)
    shown: list[str] = []
    show_logs(run, Choice(), shown.append)
    assert "".join(shown).replace("\n", "") == text.replace("\n", "")
    assert [part for part in shown if "zeile" in part and not part.endswith("\n")] == []


def test_following_goes_from_one_attempt_to_the_next(run, capsys):
    with locked(run), followed(run) as shown:
        first = attempt_with_log(run, "one\n")
        eventually(shown, "one\n")
        with first.open("a") as file:
            file.write("half a li")
            file.flush()
            time.sleep(10 * PAUSE)
            assert "".join(shown) == "one\n"
            file.write("ne\n")
        eventually(shown, "one\nhalf a line\n")
        ended(first, 85)
        second = attempt_with_log(run, "two\nlast words")
        eventually(shown, "one\nhalf a line\ntwo\n")
        ended(second, 0)  # before the directory is free again
    assert "".join(shown) == "one\nhalf a line\ntwo\nlast words\n"
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "attempt-" in line] == [f"--- {first}", f"--- {second}"]
    assert said[0].startswith(f"--- {run}: training (on ")
    assert said[-1] == f"--- {run}: ended with 0"


def test_following_one_attempt_ends_with_it(run):
    first = attempt_with_log(run, "one\n")
    with locked(run), followed(run, Choice(attempt=1)) as shown:
        eventually(shown, "one\n")
        ended(first, 85)
        attempt_with_log(run, "two\n")
    assert "".join(shown) == "one\n"


def test_following_ends_when_nobody_is_left(run, monkeypatch, capsys):
    monkeypatch.setattr(logs, "_OWN_PAUSE", 0.1)
    held = ExitStack()
    held.enter_context(locked(run))
    with followed(run) as shown:
        attempt_with_log(run, "one\n")
        eventually(shown, "one\n")
        held.close()
    assert capsys.readouterr().err.endswith(f"--- {run}: killed\n")


def test_a_run_that_was_done_before_is_followed_when_it_goes_on(run):
    """Its length has been raised."""
    ended(attempt_with_log(run, "done\n"), 0)
    with locked(run), followed(run) as shown:
        eventually(shown, "done\n")
        time.sleep(10 * PAUSE)
        ended(attempt_with_log(run, "more\n"), 0)
    assert "".join(shown) == "done\nmore\n"


def test_following_goes_on_while_nobody_knows_of_the_job(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logs, "_SLURM_PAUSE", 0.1)
    (run / "logs").mkdir()
    note_jobs(run, ("12",), "submit")
    away_slurm(tmp_path, monkeypatch)
    ended(attempt_with_log(run, "one\n"), 85)
    with followed(run) as shown:
        eventually(shown, "one\n")
        time.sleep(1)
        ended(attempt_with_log(run, "two\n"), 0)
    assert "".join(shown) == "one\ntwo\n"
    said = capsys.readouterr().err
    assert said.count("the states of jobs are not known") == 1
    assert said.count("unknown (Slurm does not say; by its files stopped)") == 1


def test_the_log_of_a_run_that_a_sweep_trains_here(run):
    (run / "logs").mkdir()
    (run / "logs" / "local.log").write_text("hpclr: no such data\n")
    assert hpclr("logs", run).out == "hpclr: no such data\n"
    attempt_with_log(run, "one\n")
    assert hpclr("logs", run).out == "one\n"


def test_text_that_nobody_can_take(run):
    attempt_with_log(run, "text\n")
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "hpclr", "logs", run]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=20)
    assert (done.returncode, done.stderr.splitlines()[1:]) == (
        75, ["hpclr: standard output cannot be written: No space left on device"],
    )  # fmt: skip


def test_slurm_is_asked_twice_a_minute(real_slurm, run, tmp_path, monkeypatch, capsys):
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n#SBATCH --output=/dev/null\nsleep 60\n")
    job = client.submit(script, ["--begin=now+1hour"])
    (run / "logs").mkdir()
    note_jobs(run, (job,), "submit", script)
    questions = Questions(tmp_path)
    monkeypatch.setenv("PATH", f"{questions.directory}{os.pathsep}{os.environ['PATH']}")
    with followed(run) as shown:
        time.sleep(1)
        assert len(questions.asked()) == 1
        log = attempt_with_log(run, "begun\n")
        eventually(shown, "begun\n")
        ended(log, 0)
    assert len(questions.asked()) == 1
    assert f"--- {run}: PENDING (BeginTime)\n" in capsys.readouterr().err
    client.cancel([job])


# A job that is asked to save and is requeued, while it is followed

STEADY = """
import time
from torch import nn

class Net(nn.Sequential):
    def forward(self, x):
        time.sleep(0.05 * self.training)
        return super().forward(x)

def make():
    return Net(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 10))
"""


def submit_training(run: Path) -> str:
    place = run / "submission"
    digits = run.parent / "digits.h5"
    assert hpclr("data", "prepare", "digits", digits, "--valid-fraction", "0.1", "--limit", "300").code == 0
    (place / "steady.py").write_text(STEADY)
    sections = {"model": {"target": "steady:make"}, "train": {"steps": 120}, "validation": {"every_steps": 10}}
    (place / "run.yaml").write_text(json.dumps(run_file(digits, **sections)))
    program = ["hpclr", "train", "--runs-dir", str(run.parent), str(place / "run.yaml")]
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(logs.__file__).parents[2])}
    script = BatchScript(
        "run", run, program, "srun", 1, 1, time="10", code=place, python=sys.executable, environment=threads
    )
    (place / "job.sh").write_text(script.text())
    (run / "logs").mkdir()
    job = client.submit(place / "job.sh")
    note_jobs(run, (job,), "submit", place / "job.sh")
    return job


@pytest.mark.slow
def test_a_job_is_followed_over_its_requeue(real_slurm, run, tmp_path, monkeypatch, capsys):
    job = submit_training(run)
    questions = Questions(tmp_path, ["squeue"])
    monkeypatch.setenv("PATH", f"{questions.directory}{os.pathsep}{os.environ['PATH']}")
    began = time.monotonic()
    shown: list[str] = []
    thread = threading.Thread(target=follow_logs, args=(run, Choice(), shown.append))
    thread.start()
    while not (run / "metrics.jsonl").exists() or len(records(run, "train")) < 20:
        assert time.monotonic() < began + 60
        time.sleep(0.1)
    shown_status = hpclr("status", run)
    client.signal(job, "USR1")
    thread.join(90)
    assert not thread.is_alive()
    written = "".join(log_path(attempt_directory(run, number), 0).read_text() for number in (1, 2))
    assert "".join(shown) == written
    said = capsys.readouterr().err
    assert said.startswith(f"--- {run}: PENDING")
    assert said.endswith(f"--- {run}: the run is finished\n")
    assert shown_status.out.splitlines()[1].split()[:4] == ["run", "RUNNING", job, "1"]
    # one is that of `hpclr status`; the script asks with a path of its own
    assert len(questions.asked()) - 1 <= (time.monotonic() - began) / 30 + 1
