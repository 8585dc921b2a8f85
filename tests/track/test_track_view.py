"""What a view says at every width, of any records."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from track_helpers import attempt, check, train, write

from hpclr.track.records import Tail, record_of
from hpclr.track.view import View, duration


def seen(view: View, width: int = 80, encoding: str = "utf-8") -> list[str]:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=out, width=width, highlight=False, emoji=False).print(view)
    out.seek(0)
    return out.read().splitlines()


def fed(*records, **options) -> View:
    view = View("digits", **options)
    for record in records:
        view.take(record)
    return view


PACE = {"kind": "pace", "step": 32, "steps": 20, "seconds": 10.0, "data": 1, "check": 2, "save": 0, "valid": 0.5}


def test_everything_that_is_known():
    valid = {"kind": "valid", "step": 30, "loss": 0.5, "accuracy": 0.75, "seconds": 9, "flops": 1}
    ranks = check(25, a=8, b=4), check(30, a=8, b=1)
    lines = seen(fed(attempt(0), *ranks, valid, PACE | {"memory": 2_500_000_000}, train(32)))
    assert lines[0] == "digits · attempt 1 · 4 processes · cpu"
    assert lines[1].endswith(" 32/100  32%  0:34 left")
    assert lines[2:] == [
        "loss 0.0312  lr 0.1  speed 2.0 steps/s  memory 2.50 GB",
        "validation accuracy 75.00%, loss 0.5 (step 30)",
        "time data 10%  checks 20%  saving 0%  validation 5%",
        "next check in 8 steps (0:04)  next save in 8 steps (0:04)",
        "trained 25.0%, stored 120.0% of dense",
        "ranks 62% █▃",
    ]


def test_what_is_not_known_is_left_out():
    assert seen(fed()) == ["digits", "step 0", "loss –"]
    assert seen(fed(train(3), steps=4))[1].endswith(" 3/4  75%")


def test_the_speed_before_it_is_measured_and_of_another_attempt():
    begun = attempt(10, time=1e9)
    assert "speed 2.0 steps/s" in "".join(seen(fed(begun, train(30, time=1e9 + 10))))
    assert "speed" not in "".join(seen(fed(PACE, attempt(10, time=1e9))))


def test_no_check_and_no_save_after_the_end():
    assert "next" not in "".join(seen(fed(attempt(0, steps=90), train(89))))


def test_of_a_run_that_is_over_nothing_comes_next():
    view = fed(attempt(0), train(32), PACE)
    view.going = False
    assert not any("next" in line or "left" in line for line in seen(view))


def test_saves_by_the_clock():
    lines = seen(fed(attempt(0, save_every=None, save_minutes=10, checks=None), train(1)))
    assert "next save within 0:00" in lines


@pytest.mark.parametrize("width", [1, 5, 20, 40, 79, 200])
@pytest.mark.parametrize("layers", [1, 60, 1000])
def test_no_line_is_wider_than_the_terminal(width, layers):
    view = fed(attempt(0), check(5, **{f"{n}": n % 7 + 1 for n in range(layers)}), train(50), PACE)
    lines = seen(view, width)
    assert all(cell_len(line) <= max(1, width - 1) for line in lines), lines
    assert len(lines) == 7


def test_a_terminal_without_unicode():
    assert seen(fed(check(1, a=8, b=4), check(2, a=4, b=4)), encoding="ascii")[-1] == "ranks 75% 49"


def test_names_cannot_drive_the_terminal():
    view = View("\x1b[2J[red]\nx")
    view.state = "failed (\x1b]0;owned\x07)"
    view.take(attempt(0, device="\x1b[31m"))
    view.take({"kind": "valid", "step": 1, "\x1b[5m": 1.0})
    text = "\n".join(seen(view, 200))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]\\nx" in text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**200),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=5,
)
KEYS = sorted(set(attempt(0)) | set(check(0)) | set(train(1)) | set(PACE) | {"memory", "accuracy"} - {"kind", "step"})
KINDS = ["train", "check", "pace", "attempt", "valid", "save", "final"]


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 99), st.dictionaries(st.sampled_from(KEYS), VALUES))))
def test_no_record_does_harm(found):
    lines = [json.dumps(values | {"kind": kind, "step": step}).encode() for kind, step, values in found]
    view = fed(*filter(None, map(record_of, lines)))
    seen(view, 60)
    view.line()


@pytest.mark.parametrize("time", ["1", [None], {}, True, 10**400])
def test_a_time_that_is_none_does_no_harm(time):
    view = fed(attempt(0, save_minutes=5), {"kind": "save", "step": 1, "time": time})
    assert any("next save within" in line for line in seen(view))


@pytest.mark.parametrize("huge", [1e299, 10**299, -1e299])
def test_no_number_is_as_long_as_it_is_large(huge):
    facts = {"checks": {"delay": huge, "every": huge}, "steps": huge, "save_every": huge, "world_size": huge}
    begun = attempt(0, attempt=huge, **facts)
    sizes = {"trainable": huge, "stored": huge, "dense": 1.5}
    shaken = {key: value if key in ("kind", "step") else huge for key, value in (PACE | {"memory": huge}).items()}
    valid = {"kind": "valid", "step": 30, "loss": huge, "accuracy": huge, "mse": huge}
    found = begun, check(25, a=huge, b=4) | sizes, valid, shaken, {"kind": "train", "step": 1, "loss": huge, "lr": huge}
    for view in (fed(*found), fed(*found, PACE | {"seconds": 1.5, "steps": huge})):
        assert all(len(line) < 100 for line in seen(view, 10_000) if "━" not in line)
        assert len(view.line()) < 100


def test_a_file_that_can_be_read_again_is_no_trouble_any_more(tmp_path):
    view, tail = View("digits"), Tail(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").mkdir()
    view.read(tail)
    assert "cannot be read" in view.line()
    (tmp_path / "metrics.jsonl").rmdir()
    write(tmp_path / "metrics.jsonl", train(3))
    view.read(tail)
    assert view.line() == "step 3/?  loss 0.3333"


def test_catching_up_with_a_long_file(tmp_path):
    path = write(tmp_path / "metrics.jsonl", attempt(0), *(train(step) for step in range(1, 20_000)))
    view = View("digits")
    view.catch_up(path)
    assert view.step == 19_999
    assert view.line().startswith("step 19999/100  loss 0.0001")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (11100, "3:05:00"), (90061, "1 d 1:01:01")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
