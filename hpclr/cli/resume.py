"""`hpclr resume`."""

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def resume(run: Path) -> None:
    """Submit the run in the directory RUN again, as `hpclr submit` has left it.

    The job has the same resources, code and run file, and goes on from the newest checkpoint.
    """
    from hpclr.cli.submit import report
    from hpclr.cluster.submit import resume as resume_run
    from hpclr.cluster.submitting import hangups_undo

    with hangups_undo():
        jobs = resume_run(run)
    report(run, jobs)
