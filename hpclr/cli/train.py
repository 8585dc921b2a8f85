"""`hpclr train`."""

import os
import sys
from pathlib import Path

import click

from hpclr import cli


@click.command()
@click.argument("run_file", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--runs-dir", type=click.Path(path_type=Path), help="Where runs live [HPCLR_RUNS, else ./runs].")
@click.option("--fresh", is_flag=True, help="Start over; a run that is there already is set aside.")
@click.option("--break-lock", is_flag=True, help="Go on where a job was that is gone, if its heartbeat stands still.")
def train(run_file: Path, overrides: tuple[str, ...], runs_dir: Path | None, fresh: bool, break_lock: bool) -> None:
    """Train what RUN_FILE describes, in runs/NAME; a run that is there already continues where it stopped.

    Any key of the run file can be set here too: optimizer.lr=1e-3, method.name=dense, name=other.
    """
    from hpclr.config import load_run_file

    run = load_run_file(run_file, overrides)
    from hpclr.training.processes import who_am_i

    layout = who_am_i(run.parallel.launcher)
    cli.with_others = layout.world_size > 1
    if cli.with_others:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what broken connections log is said here in other words
    from hpclr.output import Unfailing, end_at_once
    from hpclr.training.run import train as train_run
    from hpclr.training.run_directory import runs_directory

    directory = train_run(run, runs_directory(runs_dir), fresh=fresh, break_lock=break_lock, layout=layout)
    if layout.rank == 0:
        print(directory.path, file=Unfailing(sys.stdout), flush=True)
    if cli.with_others:
        end_at_once(0)
