"""`hpclr compare`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpclr.cli.many import NOTHING_STARTED, How, many_options, start
from hpclr.cli.picture import plot_option
from hpclr.cli.resources import SbatchCommand, resource_options
from hpclr.errors import UsageError
from hpclr.output import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hpclr.cluster.comparison.budgets import Trial
    from hpclr.cluster.comparison.files import Comparison, Equal
    from hpclr.cluster.sweep.files import Point
    from hpclr.cluster.sweep.points import Sweep
    from hpclr.cluster.sweep.standing import Standing


def _labels(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    labels = None if value is None else tuple(word.strip() for word in value.split(","))
    if labels is not None and not all(labels):
        raise click.BadParameter(f"expected labels with commas between, found {value!r}")
    return labels


@click.command(cls=SbatchCommand, epilog="Words after -- are further options of sbatch: -- --mail-type=END")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--methods", callback=_labels, metavar="A,B,…", help="Which [those of the file, else the usual ones].")
@click.option("--seeds", type=click.IntRange(min=1), metavar="N", help="Runs of each method [3].")
@click.option("--equal", type=click.Choice(["steps", "time", "flops"]), help="What they have in common [steps].")
@plot_option("Draw the comparison: .svg, .png or .pdf.")
@many_options
@resource_options
def compare(
    file: Path,
    overrides: tuple[str, ...],
    methods: "tuple[str, ...] | None",
    seeds: int | None,
    equal: "Equal | None",
    plot: Path | None,
    local: int | None,
    submit: bool,
    at_once: int | None,
    dry_run: bool,
    table: bool,
    csv: Path | None,
    runs_dir: Path | None,
    **asked: Any,
) -> None:
    """Train FILE, a run file or a comparison file, with several methods and seeds, and compare what comes of it.

    Without --local or --submit nothing is started, and what would be, and what there is already, is shown. Runs that
    are finished are not repeated, those that were stopped or have failed go on. With --equal time or flops each method
    is trained twice: as long as the run file says, and then as long as comes to what dense training takes.
    """
    from hpclr.cluster.comparison.budgets import check_budgets, trials, what_follows
    from hpclr.cluster.comparison.files import Wanted, load_comparison
    from hpclr.cluster.comparison.lengths import check_moments
    from hpclr.cluster.sweep.standing import plan
    from hpclr.training.run_directory import runs_directory

    how = How(local, submit, at_once, dry_run, asked)
    how.check()
    runs = runs_directory(runs_dir)
    comparison = load_comparison(file, Wanted(methods, seeds, equal, overrides))
    known, sweep, standing = _look(comparison, runs)
    wants_results = bool(table or csv or plot)
    if not (how.looks_only and wants_results):
        texts = filter(None, (plan(sweep, standing, runs), what_follows(comparison, known)))
        click.echo("\n".join(texts), err=not how.looks_only)
    if not how.looks_only:
        check_moments([point for point in sweep.points if standing[point.name].waits])
    code = start(sweep, standing, runs, how, _those_of_equal_cost(comparison, sweep, runs))
    has_results = any(found.finished for found in standing.values())
    if wants_results or local is not None or (how.looks_only and has_results):
        _show(comparison, runs, csv, plot)
    if how.looks_only and not wants_results and any(found.waits for found in standing.values()):
        click.echo(NOTHING_STARTED)
    if code == 0:
        check_budgets(trials(comparison, runs))
    sys.exit(code)


def _look(comparison: "Comparison", runs: Path) -> "tuple[list[Trial], Sweep, dict[str, Standing]]":
    """What is to be run, as far as that is known now, and how far it is."""
    from hpclr.cluster.comparison.budgets import as_sweep, trials
    from hpclr.cluster.sweep.standing import standings

    known = trials(comparison, runs)
    sweep = as_sweep(comparison, known)
    return known, sweep, standings(sweep.points, runs, sweep.kind)


def _those_of_equal_cost(comparison: "Comparison", sweep: "Sweep", runs: Path) -> "Callable[[], Sequence[Point]]":
    """Finds, when runs have ended, others whose length is known since then; each is given once.

    One that cannot be gone on with is none of them: `_show` refuses it when all others have ended.
    """
    from hpclr.cluster.comparison.budgets import as_sweep, trials
    from hpclr.cluster.sweep.standing import fault_of, remember

    given = {point.name for point in sweep.points}

    def new() -> "list[Point]":
        now = as_sweep(comparison, trials(comparison, runs))
        new_ones = [point for point in now.points if point.name not in given]
        given.update(point.name for point in new_ones)
        found = [point for point in new_ones if fault_of(point, runs, now.kind) is None]
        if found:
            remember(now, runs)
        return found

    return new


def _show(comparison: "Comparison", runs: Path, csv: Path | None, plot: Path | None) -> None:
    """The table, and the files: those that are asked for, and those in the comparison's directory, if there is one."""
    from hpclr.cluster.comparison.outcomes import outcomes
    from hpclr.cluster.comparison.picture import drawn
    from hpclr.cluster.comparison.table import csv_of, show
    from hpclr.files import write_asked

    known, sweep, standing = _look(comparison, runs)
    found = outcomes(comparison, known, standing, runs)
    show(comparison, found)
    mine = _own_places(sweep, runs)
    for file in [path / "results.csv" for path in mine] + ([csv] if csv is not None else []):
        write_asked(file, csv_of(found))
    try:
        for file in [path / "results.svg" for path in mine] + ([plot] if plot is not None else []):
            write_asked(file, drawn(comparison, found, file.suffix[1:].lower()))
    except UsageError as error:
        if plot is not None:
            raise
        click.echo(printable(f"no picture: {error}"), err=True)


def _own_places(sweep: "Sweep", runs: Path) -> list[Path]:
    """The comparison's directory, where one may write there and its results would not be replaced by fewer."""
    from hpclr.cluster.sweep.standing import directory_of, strangers

    directory = directory_of(sweep, runs)
    if not os.access(directory, os.W_OK):
        return []
    missing = [name for name in strangers(sweep, runs) if (runs / name / "summary.json").exists()]
    if missing and (directory / "results.csv").exists():
        click.echo(
            printable(
                f"{directory / 'results.csv'} is left as it is, since {len(missing)} finished runs of the comparison "
                f"are not in this table: {', '.join(missing)}"
            ),
            err=True,
        )
    return [] if missing else [directory]
