"""The progress of a command that reads or writes for long: a bar on a terminal, in a log a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

_SECONDS_BETWEEN_LINES = 10.0

Progress = Callable[[int, int], None]
"""Is told how much is done, of how much in all."""


@contextmanager
def progress_shown(doing: str, line: Callable[[int, int], str]) -> Iterator[Progress]:
    """Shows what it is told on standard error.

    Args:
        doing: beside the bar, such as "preparing".
        line: the line for a log, of how much is done and how much there is in all.
    """
    if not sys.stderr.isatty():
        yield _now_and_then(line)
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True, markup=False), transient=True) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _now_and_then(line: Callable[[int, int], str]) -> Progress:
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            click.echo(line(done, total), err=True)

    return show
