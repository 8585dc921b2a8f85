"""Text for people: what cannot be shown is lost, and nothing else with it."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn, TextIO

_copies: list[TextIO] = []


class Unfailing:
    """A text stream that drops what it cannot write: its disk is full, its reader or terminal has gone.

    Args:
        stream: what to write to; None, as in a process without that stream, drops everything.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Writes, or does not."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes, or does not."""
        with contextlib.suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.flush()

    def isatty(self) -> bool:
        """Whether a terminal is there."""
        with contextlib.suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False


def say(text: str) -> None:
    """Prints a line to standard error, and to the log where there is one; never fails."""
    print(text, file=Unfailing(sys.stderr), flush=True)
    say_in_log(text)


def say_in_log(text: str) -> None:
    """Prints a line to the log only: for what a live display shows in its own way."""
    for stream in _copies:
        print(text, file=Unfailing(stream), flush=True)


@contextlib.contextmanager
def copied_to(log: TextIO) -> Iterator[None]:
    """What is said goes to a log as well."""
    _copies.append(log)
    try:
        yield
    finally:
        _copies.remove(log)


def let_go_of_dead_streams() -> None:
    """Before a process ends: text that nobody can take must not change its exit code (Python makes it 120)."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def end_at_once(code: int) -> NoReturn:
    """Ends the process when all is done, without taking Python apart first.

    Threads of gloo, NCCL and MPI that still give something back at that time would abort it, with another exit code.
    """
    let_go_of_dead_streams()
    os._exit(code)


def printable(text: str) -> str:
    """Text from a file for a terminal: control characters, which could drive it, as their escapes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def on_one_line(text: str) -> str:
    """What others have written, in one line that can do nothing to a terminal."""
    return printable(text).replace("\n", "\\n")
