"""What a person sees while a run trains: a bar on a terminal, a line now and then in a log."""

import sys
import time
from abc import ABC, abstractmethod
from typing import TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hpclr.output import Unfailing, say, say_in_log

SECONDS_BETWEEN_LINES = 10.0


class Display(ABC):
    """Shows a run's progress on standard error."""

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *exception: object) -> None:  # noqa: B027 - most displays have nothing to close
        """Closes the display."""

    @abstractmethod
    def step(self, step: int, loss: float) -> None:
        """After every optimiser step."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Something worth a line of its own."""


class Bar(Display):
    """A progress bar, with notes above it."""

    def __init__(self, name: str, total: int, start: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(file=cast(TextIO, Unfailing(sys.stderr)), highlight=False, emoji=False),
        )
        self._task = self._progress.add_task(name, total=total, completed=start, loss=float("nan"))

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def step(self, step: int, loss: float) -> None:
        """Moves the bar."""
        self._progress.update(self._task, completed=step, loss=loss)

    def note(self, text: str) -> None:
        """Prints above the bar."""
        self._progress.console.print(text, markup=False)
        say_in_log(text)


class Lines(Display):
    """A line every ten seconds, for logs."""

    def __init__(self, name: str, total: int, start: int) -> None:
        self._name, self._total, self._start = name, total, start
        self._began = self._last = time.monotonic()

    def step(self, step: int, loss: float) -> None:
        """Prints a line if the last one is some time ago, and at the end."""
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES and step < self._total:
            return
        self._last = now
        speed = (step - self._start) / max(now - self._began, 1e-9)
        self.note(f"step {step}/{self._total}  loss {loss:.4f}  {speed:.1f} steps/s")

    def note(self, text: str) -> None:
        """Prints a line."""
        say(f"{self._name}: {text}")


class Nothing(Display):
    """For the processes that do not speak."""

    def step(self, step: int, loss: float) -> None:
        """Shows nothing."""

    def note(self, text: str) -> None:
        """Shows nothing."""


def display(name: str, total: int, start: int) -> Display:
    """The display that fits where standard error goes."""
    return Bar(name, total, start) if Unfailing(sys.stderr).isatty() else Lines(name, total, start)
