"""A run on a terminal: how far it is, how it does, what comes next. Made of its records alone."""

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.text import Text

from hpclr.output import on_one_line
from hpclr.track.records import Tail, record_of, without_most_steps
from hpclr.track.scalars import PACE_PARTS, is_number, ratio, scores, time_of

_BARS, _DIGITS = "▁▂▃▄▅▆▇█", "0123456789"
_PART_NAMES = dict(zip(PACE_PARTS, ("data", "checks", "saving", "validation"), strict=True))
_NARROWEST_BAR = 10
_LONGEST = 1e12  # from which on a number is written with an exponent, and counts nothing


class View:
    """What the records of a run tell, as some lines of text that fit the terminal.

    Args:
        name: of the run.
        steps: that the run is to have, for records that do not tell.

    Attributes:
        state: how the run is, in a few words; "" if whoever looks sees that anyway.
        going: whether it goes on, so that something comes next.
    """

    def __init__(self, name: str, steps: int | None = None) -> None:
        self._name, self._steps = on_one_line(name), steps
        self.state, self.going = "", True
        self.forget()

    def forget(self) -> None:
        """As if no record had been taken."""
        self._last: dict[str, Mapping[str, Any]] = {}  # kind → its last record
        self._full: dict[str, float] = {}  # layer → its highest rank so far
        self._fault, self._has_lines = "", False  # of the file of the records

    def take(self, record: Mapping[str, Any]) -> None:
        """Takes the next record; older ones of its kind are forgotten."""
        if record["kind"] == "attempt":
            self._last.pop("pace", None)  # of other machines, perhaps
        if record["kind"] == "check":
            for layer, rank in _ranks(record).items():
                self._full[layer] = max(rank, self._full.get(layer, 0.0))
        self._last = self._last | {record["kind"]: record}  # whoever renders in another thread has the one before

    def catch_up(self, metrics: Path) -> None:
        """Takes the records of a file as it is."""
        tail = Tail(metrics)
        while self.read(tail):
            pass

    def read(self, tail: Tail) -> bool:
        """Takes what a file has more by now; whether there was anything."""
        before, lines = tail.restarts, tail.read()
        if tail.restarts > before:
            self.forget()
        for record in filter(None, map(record_of, without_most_steps(lines))):
            self.take(record)
        self._fault, self._has_lines = tail.fault, self._has_lines or bool(lines)
        return bool(lines)

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return max((int(record["step"]) for kind, record in self._last.items() if kind != "save"), default=0)

    def line(self) -> str:
        """The most important in one line, for a log."""
        loss = _number(self._of("train", "loss"), ".4f")
        speed = _number(self._speed(), ".1f", " steps/s")
        known = (speed if speed != "–" else "", self._trouble())
        return "  ".join([f"step {self.step}/{self._total() or '?'}", f"loss {loss}", *filter(None, known)])

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        heading = " · ".join(filter(None, [self._name, on_one_line(self.state), *self._attempt()]))
        yield _row(heading, options, "bold")
        yield from self._progress(console, options)
        rows = (self._trouble(), self._numbers(), self._validation(), self._spent(), self._next(), self._sizes())
        for row in filter(None, rows):
            yield _row(row, options)
        yield from self._rank_bars(options)

    def _of(self, kind: str, key: str) -> Any:
        return self._last.get(kind, {}).get(key)

    def _total(self) -> int | None:
        return _count(self._of("attempt", "steps")) or self._steps

    def _trouble(self) -> str:
        if self._fault:
            return f"metrics.jsonl cannot be read: {on_one_line(self._fault)}"
        return "metrics.jsonl holds no records" if self._has_lines and not self._last else ""

    def _attempt(self) -> Iterator[str]:
        if number := _count(self._of("attempt", "attempt")):
            yield f"attempt {number}"
        if size := _count(self._of("attempt", "world_size")):
            yield f"{size} processes" if size > 1 else "1 process"
        if isinstance(device := self._of("attempt", "device"), str):
            yield on_one_line(device)

    def _progress(self, console: Console, options: ConsoleOptions) -> Iterator[Text | Segment]:
        total, step = self._total(), self.step
        if total is None:
            yield _row(f"step {step}", options)
            return
        left = self._seconds_for(total - step) if self.going else None
        words = f" {step}/{total}  {min(1.0, step / total):.0%}" + ("" if left is None else f"  {duration(left)} left")
        if (room := _width(options) - len(words)) >= _NARROWEST_BAR:
            bar = ProgressBar(total=total, completed=min(step, total), width=room)
            yield from console.render(bar, options.update(width=room))
        yield _row(words, options)

    def _numbers(self) -> str:
        found = {
            "loss": _number(self._of("train", "loss"), ".4f"),
            "lr": _number(self._of("train", "lr"), ".3g"),
            "speed": _number(self._speed(), ".1f", " steps/s"),
            "memory": _number(_in_gigabytes(self._of("pace", "memory")), ".2f", " GB"),
        }
        return "  ".join(f"{name} {value}" for name, value in found.items() if value != "–" or name == "loss")

    def _validation(self) -> str:
        record = self._last.get("valid")
        if record is None:
            return ""
        values = {name: value for name, value in scores(dict(record)).items() if is_number(value)}
        words = [
            f"{on_one_line(name)} {_shown(value, '.2%' if name == 'accuracy' else '.4g')}"
            for name, value in values.items()
        ]
        return f"validation {', '.join(sorted(words))} (step {record['step']})"

    def _spent(self) -> str:
        seconds = self._of("pace", "seconds")
        shares = {name: ratio(self._of("pace", part), seconds) for part, name in _PART_NAMES.items()}
        words = [f"{name} {_shown(share, '.0%')}" for name, share in shares.items() if share is not None]
        return f"time {'  '.join(words)}" if words else ""

    def _next(self) -> str:
        if not self.going:
            return ""
        found = {"check": self._to_check(), "save": self._to_save()}
        words = [f"next {what} in {steps} steps{self._in_time(steps)}" for what, steps in found.items() if steps]
        minutes = self._of("attempt", "save_minutes")
        if is_number(minutes):
            since = max(time_of(self._last[kind]) for kind in ("attempt", "save") if kind in self._last)
            words.append(f"next save within {duration(max(0.0, since + 60 * minutes - time.time()))}")
        return "  ".join(words)

    def _to_check(self) -> int | None:
        checks = self._of("attempt", "checks")
        delay, every = map(checks.get, ("delay", "every")) if isinstance(checks, dict) else (None, None)
        apart = _count(every)
        if not is_number(delay) or apart is None:
            return None
        return self._before_end((int(delay) - self.step - 1) % apart + 1)

    def _to_save(self) -> int | None:
        every = _count(self._of("attempt", "save_every"))
        return None if every is None else self._before_end(every - self.step % every)

    def _before_end(self, steps: int) -> int | None:
        total = self._total()
        return None if total is not None and self.step + steps > total else steps

    def _in_time(self, steps: int) -> str:
        seconds = self._seconds_for(steps)
        return "" if seconds is None else f" ({duration(seconds)})"

    def _seconds_for(self, steps: int) -> float | None:
        speed = self._speed()
        return max(0, steps) / speed if speed else None

    def _speed(self) -> float | None:
        """Steps a second lately; before that is measured, since the attempt began."""
        lately = ratio(self._of("pace", "steps"), self._of("pace", "seconds"))
        if lately is not None or "train" not in self._last:
            return lately
        began, now = self._of("attempt", "time"), self._of("train", "time")
        if not is_number(began) or not is_number(now) or now <= began:
            return None
        return ratio(self._of("train", "step") - self._of("attempt", "step"), now - began)

    def _sizes(self) -> str:
        dense = self._of("check", "dense")
        shares = {name: ratio(self._of("check", key), dense) for name, key in _SIZES.items()}
        words = [f"{name} {_shown(share, '.1%')}" for name, share in shares.items() if share is not None]
        return f"{', '.join(words)} of dense" if words else ""

    def _rank_bars(self, options: ConsoleOptions) -> Iterator[Text]:
        """A bar a layer, in the layers' order; of more layers than fit one for several that follow each other."""
        ranks = _ranks(self._last.get("check", {}))
        shares = [max(0.0, rank / (self._full.get(layer) or math.inf)) for layer, rank in ranks.items()]
        if not shares:
            return
        words, levels = f"ranks {sum(shares) / len(shares):.0%} ", _BARS if _knows_unicode(options) else _DIGITS
        size = math.ceil(len(shares) / max(1, _width(options) - len(words)))
        groups = [shares[first : first + size] for first in range(0, len(shares), size)]
        heights = [round(sum(group) / len(group) * (len(levels) - 1)) for group in groups]
        yield _row(words + "".join(levels[height] for height in heights), options)


_SIZES = {"trained": "trainable", "stored": "stored"}


def duration(seconds: float) -> str:
    """As a clock shows it: `0:45`, `12:30`, `3:05:00`; days before that."""
    minutes, second = divmod(round(min(seconds, 1e9)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02d}"
    return (f"{days} d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


def _row(text: str, options: ConsoleOptions, style: str = "") -> Text:
    """A line that fits; a terminal that knows only ASCII gets no more."""
    if not _knows_unicode(options):
        text = text.replace(" · ", ", ").replace("–", "-").encode("ascii", "replace").decode()
    row = Text(text, style=style, no_wrap=True)
    row.truncate(_width(options), overflow="ellipsis" if _knows_unicode(options) else "crop")
    return row


def _width(options: ConsoleOptions) -> int:
    """Columns to use: a full last one makes some terminals begin a new line."""
    return max(1, options.max_width - 1)


def _knows_unicode(options: ConsoleOptions) -> bool:
    return options.encoding.startswith("utf")


def _ranks(record: Mapping[str, Any]) -> dict[str, float]:
    found = record.get("ranks")
    return {layer: rank for layer, rank in found.items() if is_number(rank)} if isinstance(found, dict) else {}


def _number(value: object, form: str, unit: str = "") -> str:
    return f"{_shown(value, form)}{unit}" if is_number(value) else "–"


def _shown(value: float, form: str) -> str:
    return f"{value:{form}}" if abs(value) < _LONGEST else f"{value:.3g}"


def _count(value: object) -> int | None:
    """A number of something, of which there is one at least; None if it is none."""
    return int(value) if is_number(value) and 1 <= value < _LONGEST else None


def _in_gigabytes(size: object) -> float | None:
    return size / 1e9 if is_number(size) else None
