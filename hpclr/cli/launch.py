"""`hpclr launch`."""

import sys
from pathlib import Path

import click

from hpclr.errors import UsageError


@click.command()
@click.argument("run_file", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("-n", "processes", type=click.IntRange(min=1), help="How many processes [as many as there are GPUs].")
@click.option(
    "--launcher",
    type=click.Choice(["torchrun", "mpirun"]),
    default="torchrun",
    show_default=True,
    help="What starts them; mpirun needs mpi4py.",
)
@click.option("--runs-dir", type=click.Path(path_type=Path), help="Where runs live [HPCLR_RUNS, else ./runs].")
@click.option("--fresh", is_flag=True, help="Start over; a run that is there already is set aside.")
@click.option("--break-lock", is_flag=True, help="Go on where a job was that is gone, if its heartbeat stands still.")
def launch(
    run_file: Path,
    overrides: tuple[str, ...],
    processes: int | None,
    launcher: str,
    runs_dir: Path | None,
    fresh: bool,
    break_lock: bool,
) -> None:
    """Train what RUN_FILE describes as `hpclr train` does, with several processes on this machine.

    Ctrl-C, and the signals TERM, HUP, USR1 and USR2, let the run save and end; a second Ctrl-C ends it at once.
    """
    from hpclr.config import load_run_file
    from hpclr.parallel.launch import launch as start
    from hpclr.parallel.launch import visible_gpus

    load_run_file(run_file, overrides)  # what is wrong with it is said once, not by every process
    processes = processes or visible_gpus()
    if not processes:
        raise UsageError("no GPU is visible here, so say how many processes to start: hpclr launch -n 2 …")
    debug = "--debug" in sys.argv
    flags = {"--debug": debug, "--fresh": fresh, "--break-lock": break_lock}
    options = [flag for flag, given in flags.items() if given]
    options += [] if runs_dir is None else ["--runs-dir", str(runs_dir)]
    command = [sys.executable, "-m", "hpclr", "train", *options, "--", str(run_file), *overrides]
    sys.exit(start(command, processes, "mpirun" if launcher == "mpirun" else "torchrun", debug=debug))
