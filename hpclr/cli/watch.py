"""`hpclr watch`."""

import sys
import time
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

    from hpclr.cluster.status import Status

_SLURM_PAUSE, _OWN_PAUSE = 30.0, 5.0  # seconds from one look at how a run is to the next, with a job and without


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--once", is_flag=True, help="Show it once, as it is now.")
@click.option(
    "--interval", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Seconds between looks."
)
def watch(run: Path, once: bool, interval: float) -> None:
    """Show live how the run in the directory RUN does: step, loss, speed, ranks, what comes next.

    From its files, which are only read: also of a run on the cluster, or of somebody else. Ends with the run; Ctrl-C
    leaves.
    """
    from rich.console import Console

    if not isfinite(interval):
        raise click.BadParameter("it must be a number of seconds", param_hint="--interval")
    watched = _Watched(run)
    console = Console(highlight=False, emoji=False)
    if once:
        watched.look()
        console.print(watched.view)
        watched.complain()
        return
    try:
        _follow(watched, console, interval)
    except KeyboardInterrupt:  # how one leaves; the run goes on
        raise SystemExit(130) from None
    watched.complain()


class _Watched:
    """A run directory, looked at again and again."""

    def __init__(self, run: Path) -> None:
        from hpclr.track.records import Tail
        from hpclr.track.view import View

        self._run, self._until, self._warned = run, 0.0, False
        self._status = self._asked()
        self._tail = Tail(run / "metrics.jsonl")
        self.view: View = View(run.resolve().name, self._status.progress.steps)

    def look(self) -> bool:
        """Reads what is new; whether the run may still change."""
        self._look_at_state()
        while self.view.read(self._tail):
            pass
        return self.view.going

    def complain(self) -> None:
        """Prints why the run has failed, if it has."""
        from hpclr.output import on_one_line

        if self._status.complaint is not None:
            click.echo(on_one_line(self._status.complaint))

    def _look_at_state(self) -> None:
        if time.monotonic() >= self._until:
            self._status = self._asked()
        self.view.state, self.view.going = self._status.summary, self._status.live is not False

    def _asked(self) -> "Status":
        from hpclr.cluster.status import statuses

        (status,) = statuses([self._run], self._warn)
        self._until = time.monotonic() + (_OWN_PAUSE if status.job is None else _SLURM_PAUSE)
        return status

    def _warn(self, text: str) -> None:
        from hpclr.output import say

        if not self._warned:
            say(text)
        self._warned = True


def _follow(watched: _Watched, console: "Console", interval: float) -> None:
    """Until nothing is at work on the run any more; what was there last stays on the terminal."""
    from hpclr.track.screen import can_renew, live

    if not can_renew(console):
        _print_lines(watched, interval)
        return
    watched.look()
    shown = live(watched.view, console, whole_screen=True)
    try:
        shown.start(refresh=True)
        while watched.look():
            time.sleep(interval)
    finally:
        shown.stop()
        console.print(watched.view)


def _print_lines(watched: _Watched, interval: float) -> None:
    """A line for every look at which something has changed."""
    from hpclr.output import on_one_line

    shown, going = "", True
    while going:
        going = watched.look()
        line = f"{on_one_line(watched.view.state)}  {watched.view.line()}"
        if line != shown:
            click.echo(line)
            sys.stdout.flush()
        shown = line
        if going:
            time.sleep(interval)
