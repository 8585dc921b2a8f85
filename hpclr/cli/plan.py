"""`hpclr plan`."""

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("run_file", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--nodes", default="1", show_default=True, metavar="N[,N…]", help="Numbers of nodes to plan for.")
@click.option(
    "--gpu", type=click.Choice(["h200", "h100", "a100", "mi250", "cpu"]), help="Of the nodes [a100; measured: cpu]."
)
@click.option("--gpus-per-node", type=click.IntRange(1, 1000), help="Devices of a node, a process for each.")
@click.option("--profile", metavar="CLUSTER", help="Cluster profile that says how many GPUs a node has.")
@click.option("--partition", help="Of that profile [its first].")
@click.option("--hardware", multiple=True, metavar="KEY=NUMBER", help="A number of the device that you know better.")
@click.option("--path", metavar="cut=X,final=Y", help="Ranks assumed: a check's cut, and the share where that ends.")
@click.option("--like", type=click.Path(path_type=Path), metavar="RUN", help="Ranks as in this run directory.")
@click.option("--measure", is_flag=True, help="Take a few real steps here, and go by them.")
@click.option("--samples", type=click.IntRange(1, 10**12), help="Training samples, where the data is not here.")
@click.option("--shape", metavar="CxHxW", help="With --samples: shape of one.")
@click.option("--classes", type=click.IntRange(1, 10**7), help="With --samples: how many classes, or tokens of text.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def plan(run_file: Path, overrides: tuple[str, ...], **asked: Any) -> None:
    """Say what RUN_FILE will take before it is submitted: parameters, memory, time, energy, and how sure that is."""
    from hpclr.config import load_run_file
    from hpclr.planning.asking import Wishes, answer

    answer(load_run_file(run_file, overrides), Wishes(**asked))
