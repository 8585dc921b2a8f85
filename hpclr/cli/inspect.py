"""`hpclr inspect`."""

from pathlib import Path

import click


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--best", is_flag=True, help="Of a run directory: the best checkpoint on validation, not the newest.")
@click.option("--untrusted", is_flag=True, help="Examine the file in a process of its own first; no .sha256 needed.")
def inspect(checkpoint: Path, best: bool, untrusted: bool) -> None:
    """Show what CHECKPOINT, a file or a run directory, holds. Nothing that it names is imported."""
    from hpclr.training.inspection import show_checkpoint

    show_checkpoint(checkpoint, best=best, untrusted=untrusted)
