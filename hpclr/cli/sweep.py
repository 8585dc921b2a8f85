"""`hpclr sweep`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpclr.cli.progress import progress_shown
from hpclr.cli.resources import SbatchCommand, command_line, resource_options, resources_of
from hpclr.errors import EXIT_REQUEUE, EXIT_RETRY
from hpclr.output import printable

if TYPE_CHECKING:
    from hpclr.cluster.sweep.points import Point, Sweep

_AT_LEAST_ONE = click.IntRange(min=1)


@click.command(cls=SbatchCommand, epilog="Words after -- are further options of sbatch: -- --mail-type=END")
@click.argument("sweep_file", type=click.Path(path_type=Path))
@click.option("--local", type=_AT_LEAST_ONE, metavar="N", help="Train the runs here, N at a time.")
@click.option("--submit", is_flag=True, help="Submit them to Slurm as one job array.")
@click.option("--at-once", type=_AT_LEAST_ONE, metavar="N", help="With --submit: how many may run at a time [any].")
@click.option("--dry-run", is_flag=True, help="With --submit: check everything and print the script of the array only.")
@click.option("--table", is_flag=True, help="Show what has come of the runs so far.")
@click.option("--csv", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the table there.")
@click.option("--runs-dir", type=click.Path(path_type=Path), help="Where runs live [HPCLR_RUNS, else ./runs].")
@resource_options
def sweep(
    sweep_file: Path,
    local: int | None,
    submit: bool,
    at_once: int | None,
    dry_run: bool,
    table: bool,
    csv: Path | None,
    runs_dir: Path | None,
    **asked: Any,
) -> None:
    """Train the runs that SWEEP_FILE describes: a run file, and lists of the values that some of its keys take.

    Without --local or --submit nothing is started, and what would be is shown. Runs that are finished are not repeated,
    those that were stopped or have failed go on. The options for jobs, which are those of `hpclr submit`, count for
    each of them.
    """
    from hpclr.cluster.sweep.points import load_sweep
    from hpclr.cluster.sweep.standing import plan, standings
    from hpclr.training.run_directory import runs_directory

    if submit and local is not None:
        raise click.UsageError("--local trains here and --submit elsewhere; give one of them")
    runs = runs_directory(runs_dir)
    found = load_sweep(sweep_file, lambda name: (runs / name).is_dir())
    standing = standings(found.points, runs)
    waiting = [point for point in found.points if standing[point.name].waits]
    looks_only = not submit and local is None
    code = 0
    if not (looks_only and (table or csv)):
        click.echo(plan(found, standing, runs), err=not looks_only)
    if submit and waiting:
        _submit(found, waiting, runs, asked, at_once, dry_run)
    if local is not None:
        unknown = _unknown([name for name, how in standing.items() if how.unknown])
        code = _train(found, waiting, runs, local) if waiting else 0
        code = unknown if unknown and code in (0, EXIT_REQUEUE) else code
    if local is not None or table or csv:
        _show(found, runs, csv)
    elif looks_only and waiting:
        click.echo("Nothing has been started: --local N trains the runs here, N at a time; --submit as jobs of Slurm.")
    sys.exit(code)


def _submit(
    sweep: "Sweep", points: "list[Point]", runs: Path, asked: dict[str, Any], at_once: int | None, dry_run: bool
) -> None:
    from hpclr.cluster.submitting import hangups_undo
    from hpclr.cluster.sweep.submission import prepare_array, submit_array

    array = prepare_array(sweep, points, runs, resources_of(asked), command_line(), at_once)
    doubts = dict.fromkeys(
        f"{found.what}: {found.text}" for run in array.runs for found in run.checks if not found.sure
    )
    for doubt in doubts:
        click.echo(printable(doubt), err=True)
    if dry_run:
        click.echo(array.text, nl=False)
        return
    with hangups_undo():
        job = submit_array(array, sweep, runs)
    click.echo(f"job {job}")
    click.echo(f"logs in the directories of the runs; of the array {array.directory / 'logs'}")
    click.echo("next the same command with --table; hpclr status, hpclr logs, hpclr stop with the directory of a run")


def _train(sweep: "Sweep", points: "list[Point]", runs: Path, at_once: int) -> int:
    from hpclr.cluster.sweep.local import train_here
    from hpclr.cluster.sweep.standing import remember

    with progress_shown("training", lambda done, total: f"{done} of {total} runs have ended") as show:
        return train_here(points, runs, remember(sweep, runs), at_once, show)


def _unknown(names: "list[str]") -> int:
    """Runs that may be in a queue are not trained here as well."""
    if names:
        click.echo(
            f"not trained here: {', '.join(names)}: whether their jobs wait or run is not known, since Slurm does not "
            "say. Try again when it does.",
            err=True,
        )
    return EXIT_RETRY if names else 0


def _show(sweep: "Sweep", runs: Path, csv: Path | None) -> None:
    from hpclr.cluster.sweep.results import Results
    from hpclr.cluster.sweep.standing import standings

    results = Results(sweep, standings(sweep.points, runs))
    results.show()
    if csv is not None:
        results.write(csv)
