"""What the commands that train many runs have in common: their options, and starting what waits."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from hpclr.cli.progress import progress_shown
from hpclr.cli.resources import command_line, resources_of
from hpclr.errors import EXIT_REQUEUE, EXIT_RETRY
from hpclr.output import printable

if TYPE_CHECKING:
    from hpclr.cluster.sweep.files import Point
    from hpclr.cluster.sweep.points import Sweep
    from hpclr.cluster.sweep.standing import Standing

NOTHING_STARTED = "Nothing has been started: --local N trains the runs here, N at a time; --submit as jobs of Slurm."


def _no_dash(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Elsewhere a dash is standard output, which has the table for people."""
    if value is not None and str(value) == "-":
        raise click.BadParameter("expected the path of a file, such as results.csv, found '-'")
    return value


_AT_LEAST_ONE = click.IntRange(min=1)
_OPTIONS = (
    click.option("--local", type=_AT_LEAST_ONE, metavar="N", help="Train the runs here, N at a time."),
    click.option("--submit", is_flag=True, help="Submit them to Slurm as one job array."),
    click.option("--at-once", type=_AT_LEAST_ONE, metavar="N", help="With --submit: how many may run at a time [any]."),
    click.option("--dry-run", is_flag=True, help="With --submit: check everything and print the array's script only."),
    click.option("--table", is_flag=True, help="Show what has come of the runs so far."),
    click.option(
        "--csv",
        type=click.Path(path_type=Path, dir_okay=False),
        callback=_no_dash,
        metavar="FILE",
        help="Write the table there.",
    ),
    click.option("--runs-dir", type=click.Path(path_type=Path), help="Where runs live [HPCLR_RUNS, else ./runs]."),
)


def many_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command, which takes all of them but `table`, `csv` and `runs_dir` as parts of `How`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


class How(NamedTuple):
    """What is to be done with the runs that wait.

    Attributes:
        local: train them here, this many at a time; None: not here.
        submit: submit them.
        at_once: how many jobs may run at a time.
        dry_run: check, and show the script, only.
        asked: what each job is to have, as `resource_options` gives it.
    """

    local: int | None
    submit: bool
    at_once: int | None
    dry_run: bool
    asked: dict[str, Any]

    @property
    def looks_only(self) -> bool:
        """Whether nothing is to be started."""
        return not self.submit and self.local is None

    def check(self) -> None:
        """Whether the options go together.

        Raises:
            UsageError: of click's.
        """
        if self.submit and self.local is not None:
            raise click.UsageError("--local trains here and --submit elsewhere; give one of them")
        for option, given in (("--dry-run", self.dry_run), ("--at-once", self.at_once is not None)):
            if given and not self.submit:
                raise click.UsageError(
                    f"{option} is of --submit, which is not given. Give both; without --submit and --local nothing is "
                    "started anyway, and --local N says itself how many train at a time."
                )


def start(
    sweep: "Sweep",
    standing: "Mapping[str, Standing]",
    runs: Path,
    how: How,
    then: "Callable[[], Sequence[Point]]" = lambda: (),
) -> int:
    """Trains or submits the runs that wait, if that is asked for; returns the exit code.

    Args:
        sweep: the runs.
        standing: how far they are.
        runs: the directory that holds them.
        how: what is asked for.
        then: here only: which others can begin when some have ended.
    """
    waiting = [point for point in sweep.points if standing[point.name].waits]
    if how.submit and waiting:
        _submit(sweep, waiting, runs, how)
    if how.local is None:
        return 0
    unknown = _unknown([name for name, found in standing.items() if found.unknown])
    code = _train(sweep, waiting, runs, how.local, then) if waiting else 0
    return unknown if unknown and code in (0, EXIT_REQUEUE) else code


def _submit(sweep: "Sweep", points: "list[Point]", runs: Path, how: How) -> None:
    from hpclr.cluster.submitting import hangups_undo
    from hpclr.cluster.sweep.submission import prepare_array, submit_array

    array = prepare_array(sweep, points, runs, resources_of(how.asked), command_line(), how.at_once)
    doubts = dict.fromkeys(
        f"{found.what}: {found.text}" for run in array.runs for found in run.checks if not found.sure
    )
    for doubt in doubts:
        click.echo(printable(doubt), err=True)
    if how.dry_run:
        click.echo(array.text, nl=False)
        return
    with hangups_undo():
        job = submit_array(array, sweep, runs)
    click.echo(f"job {job}")
    click.echo(f"logs in the directories of the runs; of the array {array.directory / 'logs'}")
    click.echo("next the same command with --table; hpclr status, hpclr logs, hpclr stop with the directory of a run")


def _train(
    sweep: "Sweep", points: "list[Point]", runs: Path, at_once: int, then: "Callable[[], Sequence[Point]]"
) -> int:
    from hpclr.cluster.sweep.local import train_here
    from hpclr.cluster.sweep.standing import remember

    with progress_shown("training", lambda done, total: f"{done} of {total} runs have ended") as show:
        return train_here(points, runs, remember(sweep, runs), at_once, show, then)


def _unknown(names: list[str]) -> int:
    """Runs that may be in a queue are not trained here as well."""
    if names:
        click.echo(
            f"not trained here: {', '.join(names)}: whether their jobs wait or run is not known, since Slurm does not "
            "say. Try again when it does.",
            err=True,
        )
    return EXIT_RETRY if names else 0
