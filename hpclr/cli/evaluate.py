"""`hpclr evaluate`."""

from pathlib import Path

import click


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--split", default="test", show_default=True, help="train, valid or test.")
@click.option("--data", type=click.Path(path_type=Path), help="Another data file than the run's.")
@click.option("--best", is_flag=True, help="Of a run directory: the best checkpoint on validation, not the newest.")
@click.option("--trust", is_flag=True, help="Import the target: model that the checkpoint names.")
@click.option("--untrusted", is_flag=True, help="Examine the file in a process of its own first; no .sha256 needed.")
def evaluate(checkpoint: Path, split: str, data: Path | None, best: bool, trust: bool, untrusted: bool) -> None:
    """Score CHECKPOINT, a file or a run directory, on a split of its data."""
    from hpclr.training.evaluation import evaluate_checkpoint

    score, path = evaluate_checkpoint(checkpoint, split=split, data=data, best=best, trust=trust, untrusted=untrusted)
    click.echo(f"{path}: {split} {score}, {score.samples} samples")
