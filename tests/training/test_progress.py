"""What a person sees: plain lines in a log, a live view on a terminal."""

import contextlib
import io
import os
import pty
import re
import sys

import pytest
from training_helpers import hpclr

from hpclr.training import progress
from hpclr.training.progress import Lines, Live, display


def test_lines_are_plain_text_in_a_log(bench):
    err = hpclr("train", bench.write()).err
    assert "\x1b" not in err
    assert "\r" not in err
    lines = err.splitlines()
    assert all(line.startswith("run: ") for line in lines), err
    assert re.fullmatch(r"run: step 13/13  loss \d\.\d{4}  \d+\.\d steps/s", lines[-2])
    assert "run: check at step 6: trainable" in err
    assert re.search(r"run: step 4: validation accuracy \d+\.\d\d%, loss", err)


def test_continuing_says_from_where(bench):
    bench.train(train={"steps": 5})
    err = hpclr("train", bench.write(train={"steps": 8})).err
    assert err.startswith("run: continuing from step 5 (step-00000005.h5)\n")


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 4), (1000.0, 1)])
def test_lines_come_now_and_then_and_at_the_end(seconds, lines, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", seconds)
    with Lines("a", 4, 0) as shown:
        for step in range(1, 5):
            shown.record({"kind": "train", "step": step, "loss": 0.5})
            shown.record({"kind": "check", "step": step})
    assert len(capsys.readouterr().err.splitlines()) == lines


def everything(terminal: int) -> str:
    """What has been written to a pseudo-terminal; one read gives a part of it."""
    os.set_blocking(terminal, False)
    parts = []
    with contextlib.suppress(BlockingIOError):
        while part := os.read(terminal, 4096):
            parts.append(part)
    return b"".join(parts).decode()


def test_a_view_on_a_terminal(tmp_path, monkeypatch):
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        earlier = tmp_path / "metrics.jsonl"
        earlier.write_text('{"kind":"attempt","step":0,"steps":3}\n{"kind":"train","step":1,"loss":0.5}\n')
        shown = display("digits", 3, 1, earlier)
        assert isinstance(shown, Live)
        with shown:
            for step in (2, 3):
                shown.record({"kind": "train", "step": step, "loss": 0.25})
                shown.note("check [1/2] at step 2 :smile:")
        terminal.flush()
        seen = everything(ours)
    os.close(ours)
    assert "digits" in seen
    assert "1/3" in seen
    assert "3/3" in seen
    assert "loss 0.2500" in seen
    assert "check [1/2] at step 2 :smile:" in seen


def test_no_terminal_no_view(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(display("a", 1, 0, tmp_path / "metrics.jsonl"), Lines)


def test_a_whole_run_on_a_terminal(bench, monkeypatch):
    from hpclr.cli import main

    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with pytest.raises(SystemExit) as caught:
            main(["train", str(bench.write(train={"steps": 4}))])
        terminal.flush()
        seen = everything(ours)
    os.close(ours)
    assert caught.value.code == 0
    assert "4/4" in seen
