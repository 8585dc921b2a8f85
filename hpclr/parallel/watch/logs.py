"""Where the text of a process goes: each has a log; the console is for the first process, and for the first to fail."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from hpclr.output import copied_to


class Log:
    """A process's log, and the console that it had before.

    Args:
        file: the log, open for appending.
        console: a descriptor of what standard error was.
    """

    def __init__(self, file: TextIO, console: int) -> None:
        self.file, self._console = file, console
        self._silent = False

    def write(self, text: str) -> None:
        """A line for the log only; a full disk does not matter."""
        with contextlib.suppress(OSError, ValueError):
            print(text, file=self.file, flush=True)

    def speak(self, text: str) -> None:
        """A line for the console, even where this process's standard error is its log; never fails."""
        show_cursor = "\x1b[?25h\r" if os.isatty(self._console) else ""  # a progress bar may have hidden it
        with contextlib.suppress(OSError):
            os.write(self._console, f"{show_cursor}{text}\n".encode())

    def silence(self) -> None:
        """From here to its end this process writes to its log only, as another one speaks for all."""
        self._silent = True
        _point(self.file.fileno(), self.file.fileno())

    def restore(self, standard_output: int) -> None:
        """Gives the process its console back, unless it is to stay silent."""
        if not self._silent:
            _point(standard_output, self._console)


@contextlib.contextmanager
def logged(path: Path, *, console: bool) -> Iterator[Log]:
    """Sends a process's text to its log.

    Args:
        path: the log, which is appended to.
        console: keep the console, and write to the log what is said and warned of; else everything that is written
            to standard output and standard error goes to the log only, that of native code included.

    Raises:
        OSError: if the log cannot be opened.
    """
    with _opened(path) as file, _kept() as (out, error):
        log = Log(file, error)
        if not console:
            _point(file.fileno(), file.fileno())
        try:
            with _copying(file) if console else contextlib.nullcontext():
                yield log
        finally:
            log.restore(out)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """A log; what a full disk has not taken in the end is lost, and nothing else with it."""
    file = path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):
            file.close()


@contextlib.contextmanager
def _copying(log: TextIO) -> Iterator[None]:
    """Copies what is said and warned of to a log."""
    shown = warnings.showwarning

    def show_and_copy(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        shown(message, category, filename, lineno, file, line)
        with contextlib.suppress(OSError, ValueError):
            log.write(warnings.formatwarning(message, category, filename, lineno, line))

    warnings.showwarning = show_and_copy
    try:
        with copied_to(log):
            yield
    finally:
        warnings.showwarning = shown


@contextlib.contextmanager
def _kept() -> Iterator[tuple[int, int]]:
    """Copies of the descriptors of standard output and standard error, for as long as they may be needed."""
    copies = _copy(1), _copy(2)
    try:
        yield copies
    finally:
        for descriptor in copies:
            os.close(descriptor)


def _copy(descriptor: int) -> int:
    try:
        return os.dup(descriptor)
    except OSError:  # a process may be without it
        return os.open(os.devnull, os.O_WRONLY)


def _point(standard_output: int, standard_error: int) -> None:
    """Lets descriptors 1 and 2 write to others, so that native code and child processes follow."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.dup2(standard_output, 1)
    os.dup2(standard_error, 2)
