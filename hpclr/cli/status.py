"""`hpclr status`."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from hpclr.cluster.status import Status

_HEADINGS = ("run", "state", "job", "attempt", "step", "loss", "rank", "trained", "saved", "left", "ends")


@click.command()
@click.argument("runs", nargs=-1, metavar="[RUN]...", type=click.Path(path_type=Path))
@click.option("--runs-dir", type=click.Path(path_type=Path), help="Where runs live [HPCLR_RUNS, else ./runs].")
@click.option("--json", "as_json", is_flag=True, help="Everything that is known, for programs.")
def status(runs: tuple[Path, ...], runs_dir: Path | None, as_json: bool) -> None:
    """Show how runs are: those in the directories RUN, or all.

    What Slurm knows of their jobs, how far they have come, when they were last saved, and when they will be done at
    the speed that they have.
    """
    from hpclr.cluster.status import runs_in, statuses
    from hpclr.training.run_directory import runs_directory

    place = runs_directory(runs_dir)
    found = statuses(runs or runs_in(place))
    if as_json:
        click.echo(_json(found))
    elif found:
        _show(found)
    else:
        click.echo(f"no runs in {place}", err=True)


def _json(found: "Sequence[Status]") -> str:
    import msgspec

    return msgspec.json.format(msgspec.json.encode([_plain(status) for status in found]), indent=2).decode()


def _plain(status: "Status") -> dict[str, Any]:
    """Durations in seconds; times with the offset of this machine's time zone."""
    import dataclasses

    numbers = dataclasses.asdict(status.progress)
    return {
        "run": str(status.run),
        "state": status.state,
        "reason": status.reason,
        "live": status.live,
        "job": status.job,
        "starts": _with_zone(status.starts),
        "time_left": status.time_left,
        "ends": _with_zone(status.ends),
    } | numbers


def _with_zone(when: datetime | None) -> str | None:
    return None if when is None else when.astimezone().isoformat(timespec="seconds")


def _show(found: "Sequence[Status]") -> None:
    from rich.cells import cell_len

    from hpclr.output import on_one_line

    rows = [_HEADINGS, *([on_one_line(cell) for cell in _cells(status)] for status in found)]
    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    for row in rows:
        padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(padded).rstrip())
    for status in found:
        if status.complaint is not None:
            click.echo(on_one_line(f"{status.run}: {status.complaint}"))


def _cells(status: "Status") -> list[str]:
    """A row; a dash stands for what is not known, or does not apply."""
    run = status.progress
    cells = (
        status.run.name or str(status.run),
        status.summary if status.starts is None else f"{status.summary}, from {_clock(status.starts)}",
        status.job,
        None if run.attempt is None else str(run.attempt),
        None if run.step is None else f"{run.step}/{run.steps or '?'}",
        None if run.loss is None else f"{run.loss:.4g}",
        None if run.rank_share is None else f"{run.rank_share:.1%}",
        None if run.trained_share is None else f"{run.trained_share:.1%}",
        None if run.save_age is None else f"{_duration(run.save_age)} ago",
        None if status.time_left is None else _duration(status.time_left),
        None if status.ends is None else _clock(status.ends),
    )
    return [cell or "–" for cell in cells]


def _duration(seconds: float) -> str:
    """Two digits' worth: `45 s`, `12 min`, `3.5 h`."""
    for unit, size in (("s", 60), ("min", 60), ("h", 24)):
        if seconds < 2 * size:
            return f"{seconds:.1f} h" if unit == "h" else f"{seconds:.0f} {unit}"
        seconds /= size
    return f"{seconds:.1f} d"


def _clock(when: datetime) -> str:
    """The time of day, and the day if it is another one."""
    return f"{when:%H:%M}" if when.date() == datetime.now().date() else f"{when:%d %b %H:%M}"
