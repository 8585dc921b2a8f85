"""`hpclr export`."""

from pathlib import Path
from typing import Any

import click

from hpclr.cli.ranks import check_calibrated, one_fraction, rank_options


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    type=click.Choice(["safetensors", "torch", "onnx", "hdf5"]),
    help="Without it OUT's suffix tells: .safetensors, .pt or .pth, .onnx, .h5.",
)
@click.option("--dense", "form", flag_value="dense", default="dense", help="Multiply factored weights out (default).")
@click.option("--factored", "form", flag_value="factored", help="Leave them as factors.")
@click.option(
    "--adapter", "form", flag_value="adapter", help="Adapters and what trained with them alone; .safetensors or .h5."
)
@click.option(
    "--dtype", type=click.Choice(["float32", "float64", "bf16", "fp16"]), help="Type of the weights; as stored."
)
@click.option("--no-average", is_flag=True, help="The run's own weights, also where it keeps averaged ones.")
@click.option("--best", is_flag=True, help="Of a run directory: the best checkpoint on validation, not the newest.")
@rank_options("Cut layers to this share of full rank first, above 0 and at most 1.", one_fraction)
@click.option("--data", type=click.Path(path_type=Path), help="For --calibrate: another data file than the run's.")
@click.option("--trust", is_flag=True, help="For ONNX and ranks: import the target: model that the checkpoint names.")
@click.option("--untrusted", is_flag=True, help="Examine the file in a process of its own first; no .sha256 needed.")
@click.option("--force", is_flag=True, help="Replace OUT if it is there.")
def export(checkpoint: Path, out: Path, form: str, no_average: bool, **options: Any) -> None:
    """Write the weights in CHECKPOINT, a file or a run directory, to OUT, for programs other than hpclr."""
    from hpclr.training.export import export_adapter, export_checkpoint

    check_calibrated(options["rank_fraction"], options["calibrate"])
    if form == "adapter":
        if any([options.pop(key) for key in ("format", "trust", "rank_fraction", "calibrate", "data")]):  # noqa: C419
            raise click.UsageError(
                "--adapter goes with none of --format, --trust, --rank-fraction, --calibrate and --data: OUT's suffix "
                "tells the format"
            )
        click.echo(export_adapter(checkpoint, out, average=not no_average, **options))
        return
    click.echo(export_checkpoint(checkpoint, out, factored=form == "factored", average=not no_average, **options))
