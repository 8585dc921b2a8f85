"""What a person sees while a run trains: a live view on a terminal, a line now and then in a log."""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from hpclr.output import Unfailing, say, say_in_log

if TYPE_CHECKING:
    from rich.console import Console

    from hpclr.track.view import View

SECONDS_BETWEEN_LINES = 10.0


class Display(ABC):
    """Shows a run's progress on standard error."""

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *exception: object) -> None:  # noqa: B027 - most displays have nothing to close
        """Closes the display."""

    @abstractmethod
    def record(self, record: Mapping[str, Any]) -> None:
        """Takes what is recorded in metrics.jsonl, after every optimiser step and in between."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Something worth a line of its own."""


class Live(Display):
    """A view that renews itself, with notes above it.

    Args:
        view: what is known of the run so far.
        console: on standard error.
    """

    def __init__(self, view: "View", console: "Console") -> None:
        from hpclr.track.screen import live

        self._view = view
        self._live = live(view, console)

    def __enter__(self) -> "Live":
        self._live.start(refresh=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def record(self, record: Mapping[str, Any]) -> None:
        """Changes what the next renewal shows."""
        self._view.take(record)

    def note(self, text: str) -> None:
        """Prints above the view."""
        self._live.console.print(text, markup=False)
        say_in_log(text)


class Lines(Display):
    """A line every ten seconds, for logs."""

    def __init__(self, name: str, total: int, start: int) -> None:
        self._name, self._total, self._start = name, total, start
        self._began = self._last = time.monotonic()

    def record(self, record: Mapping[str, Any]) -> None:
        """Prints a line of a step if the last one is some time ago, and at the end."""
        if record["kind"] != "train":
            return
        now, step = time.monotonic(), record["step"]
        if now - self._last < SECONDS_BETWEEN_LINES and step < self._total:
            return
        self._last = now
        speed = (step - self._start) / max(now - self._began, 1e-9)
        self.note(f"step {step}/{self._total}  loss {record['loss']:.4f}  {speed:.1f} steps/s")

    def note(self, text: str) -> None:
        """Prints a line."""
        say(f"{self._name}: {text}")


class Nothing(Display):
    """For the processes that do not speak."""

    def record(self, record: Mapping[str, Any]) -> None:
        """Shows nothing."""

    def note(self, text: str) -> None:
        """Shows nothing."""


def display(name: str, total: int, start: int, metrics: Path) -> Display:
    """The display that fits where standard error goes.

    Args:
        name: of the run.
        total: optimiser steps of the run.
        start: those done.
        metrics: the records so far; they may not be there yet.
    """
    if not Unfailing(sys.stderr).isatty():
        return Lines(name, total, start)
    from rich.console import Console

    from hpclr.track.screen import can_renew
    from hpclr.track.view import View

    console = Console(file=cast(TextIO, Unfailing(sys.stderr)), highlight=False, emoji=False)
    if not can_renew(console):
        return Lines(name, total, start)
    view = View(name)
    view.catch_up(metrics)
    return Live(view, console)
