"""`hpclr watch`, on real terminals of several sizes."""

import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from track_helpers import attempt, check, eventually, train, write
from training_helpers import hpclr

from hpclr.training.lock import locked

pyte = pytest.importorskip("pyte")


@pytest.fixture
def run(tmp_path) -> Path:
    """The directory of a run of 100 steps, in which nobody trains."""
    directory = tmp_path / "digits"
    (directory / "logs" / "attempt-01").mkdir(parents=True)
    write(directory / "metrics.jsonl", attempt(0), check(10, a=8, b=8), check(25, a=4, b=8), train(32))
    return directory


class Terminal:
    """A terminal in which a command runs."""

    def __init__(self, *command: object, columns: int = 80, rows: int = 24, kind: str = "xterm-256color") -> None:
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""
        self._ours, theirs = pty.openpty()
        self.resize(columns, rows)
        environment = os.environ | {"TERM": kind}
        environment = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hpclr", *map(str, command)],
            stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._screen.resize(rows, columns)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # nobody is there any more
            while content := os.read(self._ours, 65536):
                self.raw += content
                self._stream.feed(content)

    def lines(self) -> list[str]:
        """What is to be seen, without empty lines."""
        return [line.rstrip() for line in list(self._screen.display) if line.strip()]

    def wait(self) -> int:
        code = self.process.wait(30)
        self._reader.join(10)
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal():
    opened = []

    def make(*command, **size):
        opened.append(Terminal(*command, **size))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def test_once(run):
    done = hpclr("watch", run, "--once")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == "digits · killed · attempt 1 · 4 processes · cpu"
    assert lines[1].endswith(" 32/100  32%")
    assert lines[-1] == "ranks 75% ▅█"
    assert "\x1b" not in done.out


def test_nothing_is_written(run):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")}
    run.chmod(0o555)
    assert hpclr("watch", run, "--once").code == 0
    assert hpclr("watch", run).code == 0
    run.chmod(0o755)
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")}


def test_what_is_no_run(tmp_path):
    done = hpclr("watch", tmp_path / "nothing")
    assert done.code == 2
    assert "there is no run" in done.err


def test_a_run_of_before_there_were_times(bench):
    """Records as earlier versions wrote them; steps from the record of the attempt."""
    run = bench.train(train={"steps": 5})
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    old = [{key: value for key, value in r.items() if key != "time"} for r in found if r["kind"] != "attempt"]
    write(run / "metrics.jsonl", *[r for r in old if r["kind"] != "pace"], more=False)
    lines = hpclr("watch", run, "--once").out.splitlines()
    assert lines[0] == "run · finished"
    assert lines[1].endswith("5/5  100%")


def test_damaged_metrics(run):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'\x00\xff{"kind":"train","st\n[]\n{"kind":"train","step":40,"loss":"\\u001b[2J"}\n{"kind":"tr')
    lines = hpclr("watch", run, "--once").out.splitlines()
    assert lines[1].endswith("40/100  40%")
    assert lines[2] == "loss –"


def a_loop(path):
    path.symlink_to(path.name)


UNREADABLE = {
    "a directory": (Path.mkdir, "cannot be read: ", "it is no regular file"),
    "a pipe": (os.mkfifo, "cannot be read: ", "it is no regular file"),
    "a link to itself": (a_loop, "cannot be read: ", "Too many levels of symbolic links"),
    "binary": (lambda path: path.write_bytes(bytes(range(256)) * 40), "holds no records", ""),
}


@pytest.mark.parametrize(("make", "said", "why"), UNREADABLE.values(), ids=UNREADABLE)
def test_metrics_that_cannot_be_read_are_told_of(run, make, said, why):
    (run / "metrics.jsonl").unlink()
    make(run / "metrics.jsonl")
    for done in (hpclr("watch", run, "--once"), hpclr("watch", run)):
        assert done.code == 0
        assert f"metrics.jsonl {said}" in done.out
        assert why in done.out.replace("\n", " ")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is kept from root")
def test_metrics_that_may_not_be_read_are_told_of(run):
    (run / "metrics.jsonl").chmod(0)
    assert "metrics.jsonl cannot be read: Permission denied" in hpclr("watch", run, "--once").out


def test_lines_where_there_is_no_terminal(run):
    with locked(run):
        command = [sys.executable, "-m", "hpclr", "watch", str(run), "--interval", "0.1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline().startswith("training (on ")
        write(run / "metrics.jsonl", train(33))
        assert "step 33/100  loss 0.0303" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stdout.read() == ""


def test_lines_on_a_terminal_that_cannot_go_back(run, terminal):
    with locked(run):
        shown = terminal("watch", run, "--interval", "0.1", kind="dumb")
        eventually(lambda: any("step 32/100" in line for line in shown.lines()))
    assert shown.wait() == 0
    assert b"\x1b" not in shown.raw


@pytest.mark.parametrize("options", [[], ["--once"]], ids=["to its end", "once"])
def test_a_run_that_has_failed_says_why(run, options):
    outcome = {
        "code": 1,
        "outcome": "failed",
        "message": "the loss of step 33 is nan",
        "rank": 0,
        "host": "a",
        "step": 32,
    }
    (run / "logs" / "attempt-01" / "exit.json").write_text(json.dumps(outcome))
    done = hpclr("watch", run, *options)
    assert done.code == 0
    assert done.out.splitlines()[-1] == "the loss of step 33 is nan"


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (40, 10), (20, 4)])
def test_a_run_that_goes_on(run, terminal, columns, rows):
    with locked(run):
        shown = terminal("watch", run, "--interval", "0.1", columns=columns, rows=rows)
        eventually(lambda: any("32/100" in line for line in shown.lines()))
        write(run / "metrics.jsonl", train(57))
        eventually(lambda: any("57/100" in line for line in shown.lines()))
        assert not any("32/100" in line for line in shown.lines())
        shown.process.send_signal(signal.SIGINT)
        assert shown.wait() == 130
    assert b"Traceback" not in shown.raw
    assert shown.raw.rstrip().endswith(b"\x1b[0m") or shown.raw.count(b"\x1b[?1049h") == shown.raw.count(b"\x1b[?1049l")
    assert b"\x1b[?25h" in shown.raw[shown.raw.rfind(b"\x1b[?25l") :]  # the cursor is back


def test_a_terminal_that_changes_its_size_keeps_no_remains(run, terminal):
    with locked(run):
        shown = terminal("watch", run, "--interval", "0.1", columns=100)
        eventually(lambda: len(shown.lines()) == 6)
        for columns in (50, 30, 90):
            shown.resize(columns, 24)
            time.sleep(0.6)
            write(run / "metrics.jsonl", train(30 + columns))
            eventually(lambda step=30 + columns: any(f"{step}/100" in line for line in shown.lines()))
            assert sum("ranks" in line for line in shown.lines()) == 1
            assert all(len(line) < columns for line in shown.lines())


def test_a_run_that_is_rewound_and_ends(run, terminal):
    with locked(run):
        shown = terminal("watch", run, "--interval", "0.1")
        eventually(lambda: any("32/100" in line for line in shown.lines()))
        os.replace(write(run / "other", attempt(0), attempt(20, attempt=2), train(21)), run / "metrics.jsonl")
        eventually(lambda: any("21/100" in line for line in shown.lines()))
        assert not any("ranks" in line for line in shown.lines())
        assert "attempt 2" in shown.lines()[0]
    assert shown.wait() == 0
    assert "21/100" in shown.raw.rpartition(b"\x1b[?1049l")[2].decode()  # stays on the terminal


def test_training_on_a_terminal(bench, terminal):
    file = bench.write(train={"epochs": 6}, name="digits")
    shown = terminal("train", file, columns=70)
    assert shown.wait() == 0
    lines = shown.lines()
    at = next(number for number, line in enumerate(lines) if line.startswith("digits · attempt 1"))
    assert "30/30  100%" in lines[at + 1]
    assert sum("30/30" in line for line in lines) == 1  # nothing of the views before is left
    assert any(line.startswith("check at step") for line in lines[:at])
    assert lines[-1] == "runs/digits"
    again = terminal("watch", bench.path / "runs" / "digits")
    assert again.wait() == 0
    assert "finished" in "".join(again.lines())


def test_help_needs_no_torch(tmp_path, run):
    code = (
        "import sys\nfrom hpclr.cli import main\ntry:\n main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, "watch", str(run), "--once"], check=True, capture_output=True)
