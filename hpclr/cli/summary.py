"""`hpclr summary`."""

from pathlib import Path

import click


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--mean", is_flag=True, help="One column a method: mean ± standard deviation over its runs.")
def summary(runs: tuple[Path, ...], mean: bool) -> None:
    """Compare finished RUNS (run directories) in a table: scores, sizes, operations, time, and every rank."""
    from hpclr.training.table import comparison, read_summaries

    comparison(read_summaries(runs), mean=mean)
