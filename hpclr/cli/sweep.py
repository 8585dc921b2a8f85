"""`hpclr sweep`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpclr.cli.many import NOTHING_STARTED, How, many_options, start
from hpclr.cli.resources import SbatchCommand, resource_options

if TYPE_CHECKING:
    from hpclr.cluster.sweep.points import Sweep


@click.command(cls=SbatchCommand, epilog="Words after -- are further options of sbatch: -- --mail-type=END")
@click.argument("sweep_file", type=click.Path(path_type=Path))
@many_options
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

    how = How(local, submit, at_once, dry_run, asked)
    how.check()
    runs = runs_directory(runs_dir)
    found = load_sweep(sweep_file, lambda name: (runs / name).is_dir())
    standing = standings(found.points, runs)
    if not (how.looks_only and (table or csv)):
        click.echo(plan(found, standing, runs), err=not how.looks_only)
    code = start(found, standing, runs, how)
    if local is not None or table or csv:
        _show(found, runs, csv)
    elif how.looks_only and any(found.waits for found in standing.values()):
        click.echo(NOTHING_STARTED)
    sys.exit(code)


def _show(sweep: "Sweep", runs: Path, csv: Path | None) -> None:
    from hpclr.cluster.sweep.results import Results
    from hpclr.cluster.sweep.standing import standings

    results = Results(sweep, standings(sweep.points, runs))
    results.show()
    if csv is not None:
        results.write(csv)
