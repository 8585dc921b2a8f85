"""`hpclr evaluate`."""

from pathlib import Path
from typing import Any

import click

from hpclr.cli.ranks import check_calibrated, fractions, rank_options


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--split", default="test", show_default=True, help="train, valid or test.")
@click.option("--data", type=click.Path(path_type=Path), help="Another data file than the run's.")
@click.option("--best", is_flag=True, help="Of a run directory: the best checkpoint on validation, not the newest.")
@click.option("--trust", is_flag=True, help="Import the target: model that the checkpoint names.")
@click.option("--untrusted", is_flag=True, help="Examine the file in a process of its own first; no .sha256 needed.")
@rank_options("Score the model cut to these shares of full rank, such as 1,.5,.25: a table.", fractions, "F,F,…")
@click.option("--json", "as_json", is_flag=True, help="With --rank-fraction: the table with all ranks, for programs.")
def evaluate(
    checkpoint: Path, rank_fraction: list[float] | None, calibrate: int | None, as_json: bool, **options: Any
) -> None:
    """Score CHECKPOINT, a file or a run directory, on a split of its data."""
    from hpclr.training.evaluation import evaluate_checkpoint

    check_calibrated(rank_fraction, calibrate)
    if rank_fraction is not None:
        _show_ranks(checkpoint, rank_fraction, calibrate, as_json, **options)
        return
    if as_json:
        raise click.UsageError("--json goes with --rank-fraction")
    score, path = evaluate_checkpoint(checkpoint, **options)
    click.echo(f"{path}: {options['split']} {score}, {score.samples} samples")


def _show_ranks(
    checkpoint: Path, rank_fraction: list[float], calibrate: int | None, as_json: bool, **options: Any
) -> None:
    import msgspec

    from hpclr.training.elastic import evaluate_at_ranks
    from hpclr.training.elastic_table import show_curve

    curve = evaluate_at_ranks(checkpoint, rank_fraction, calibrate=calibrate, **options)
    if as_json:
        click.echo(msgspec.json.encode(curve.as_dict()).decode())
    else:
        show_curve(curve, options["split"])
