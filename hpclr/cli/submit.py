"""`hpclr submit`."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from hpclr.cli.resources import SbatchCommand, command_line, resource_options, resources_of
from hpclr.errors import UsageError
from hpclr.output import printable

if TYPE_CHECKING:
    from hpclr.cluster.submit import Prepared


@click.command(cls=SbatchCommand, epilog="Words after -- are further options of sbatch: -- --mail-type=END")
@click.argument("run_file", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@resource_options
@click.option("--chain", type=click.IntRange(min=2), metavar="N", help="N jobs, one after another, and no requeues.")
@click.option("--array", hidden=True)
@click.option("--runs-dir", type=click.Path(path_type=Path), help="Where runs live [HPCLR_RUNS, else ./runs].")
@click.option("--dry-run", is_flag=True, help="Check everything and print the batch script; submit nothing.")
def submit(
    run_file: Path, overrides: tuple[str, ...], runs_dir: Path | None, dry_run: bool, chain: int | None, **asked: Any
) -> None:
    """Train what RUN_FILE describes as a job of Slurm's, which is requeued until the run is done.

    What can be checked here is checked first. The job works with a copy of the run file and of code that is not
    installed, in runs/NAME/submission; its batch script is there too.
    """
    from hpclr.cluster.submit import prepare
    from hpclr.cluster.submit import submit as submit_run
    from hpclr.cluster.submitting import hangups_undo
    from hpclr.config import load_run_file
    from hpclr.training.run_directory import runs_directory

    _check_attempts(chain)
    run, runs = load_run_file(run_file, overrides), runs_directory(runs_dir)
    prepared = prepare(run, runs, resources_of(asked, chain=chain or 0), command_line())
    if dry_run:
        _show(prepared)
        return
    for finding in prepared.checks:
        if not finding.sure:
            click.echo(printable(f"{finding.what}: {finding.text}"), err=True)
    with hangups_undo():
        jobs = submit_run(prepared)
    report(runs / run.name, jobs)


def _check_attempts(chain: int | None) -> None:
    given = click.get_current_context().get_parameter_source("attempts") == ParameterSource.COMMANDLINE
    if chain and given:
        raise UsageError(
            "--attempts and --chain exclude one another: the jobs of a chain are not requeued, each starts once. Give "
            "one of them."
        )


def report(run: Path, jobs: Sequence[str]) -> None:
    """Says which jobs there are now, and what comes next; the first line is for programs."""
    first, *others = jobs
    name = shlex.quote(str(run))
    click.echo(f"job {first}")
    if others:
        click.echo(f"then jobs {', '.join(others)}, each if the run is not done by the one before")
    click.echo(f"logs {run / 'logs' / first}_0_log.out, {run / 'logs' / first}_0_log.err")
    click.echo(f"next hpclr status {name}, hpclr logs -f {name}, hpclr stop {name}")


def _show(prepared: "Prepared") -> None:
    from hpclr.cluster.submit import test
    from hpclr.slurm import client

    for finding in prepared.checks:
        click.echo(printable(f"{finding.what:10} {finding.text}"), err=True)
    click.echo(prepared.text, nl=False)
    try:
        said = test(prepared) if client.is_installed() else "not asked, there is no sbatch here"
    except client.SlurmError as error:  # it is stricter than a submission, which may wait for nodes
        said = f"warning: {error}"
    click.echo(printable(f"{'sbatch':10} {said}"), err=True)
