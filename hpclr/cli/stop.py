"""`hpclr stop`."""

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def stop(run: Path) -> None:
    """Ask the run in the directory RUN to save and end, from any machine that sees the directory.

    It does so at the end of a step, and is not started again by itself; the command that started it continues it. A job
    that waits to go on will not.
    """
    from hpclr.cluster.control import stop as stop_run

    click.echo(stop_run(run))
