"""`hpclr cancel`."""

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def cancel(run: Path) -> None:
    """End all jobs of the run in the directory RUN now, also those that wait.

    A run that trains is asked to save, but Slurm gives it only some seconds for that; `hpclr stop` waits for it.
    """
    from hpclr.cluster.control import cancel as cancel_run

    for number, job in cancel_run(run).items():
        click.echo(f"job {number}: was {job.state}, is cancelled")
