"""The options that say what a job is to have."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from hpclr.cluster.resources import Resources

_SBATCH, _WORDS = "hpclr.sbatch", "hpclr.words"
_PASSED = {
    "partition": "Where to run.",
    "account": "Whose time it uses.",
    "qos": "Quality of service.",
    "mem": "Memory of a node, such as 64G.",
    "constraint": "Features that nodes must have.",
    "exclude": "Nodes not to use.",
    "dependency": "Jobs to wait for, such as afterok:123.",
}
_AT_LEAST_ONE = click.IntRange(min=1)
_OPTIONS = (
    click.option("--nodes", type=_AT_LEAST_ONE, default=1, show_default=True, help="How many nodes."),
    click.option("--gpus-per-node", type=_AT_LEAST_ONE, help="GPUs of each node, with a process for each."),
    click.option("--ntasks-per-node", type=_AT_LEAST_ONE, help="Processes on each node [as many as GPUs]."),
    click.option("--cpus-per-task", type=_AT_LEAST_ONE, help="CPUs of each process [by the profile, else 1]."),
    click.option("--time", help="Time limit, such as 08:00:00 [the partition's]."),
    *(click.option(f"--{name}", help=text) for name, text in _PASSED.items()),
    click.option(
        "--launcher",
        type=click.Choice(["srun", "torchrun", "mpirun"]),
        default="srun",
        show_default=True,
        help="What starts the processes.",
    ),
    click.option("--container", metavar="IMAGE", help="Run in this image."),
    click.option("--bind", multiple=True, metavar="SOURCE[:TARGET[:ro]]", help="What else is seen in the container."),
    click.option(
        "--runtime",
        type=click.Choice(["apptainer", "singularity", "charliecloud", "bubblewrap"]),
        help="What runs the image [by the profile, else apptainer].",
    ),
    click.option("--profile", metavar="CLUSTER", help="Cluster profile: a name, or a file."),
    click.option(
        "--attempts", type=_AT_LEAST_ONE, default=20, show_default=True, help="Starts that a job may have, requeued."
    ),
)


class SbatchCommand(click.Command):
    """A command whose words after `--` are options of sbatch."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Sets them aside."""
        end = args.index("--") if "--" in args else len(args)
        ctx.meta[_SBATCH] = tuple(args[end + 1 :])
        ctx.meta[_WORDS] = ("hpclr", ctx.info_name or "", *args)
        return super().parse_args(ctx, args[:end])


def resource_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command, which takes them as `**asked`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def command_line() -> tuple[str, ...]:
    """The words of the current command, for the record."""
    words: tuple[str, ...] = click.get_current_context().meta[_WORDS]
    return words


def resources_of(asked: dict[str, Any], chain: int = 0) -> "Resources":
    """What the options of the current command ask for."""
    from hpclr.cluster.resources import Resources

    words = [f"--{name}={asked[name]}" for name in (*_PASSED, "array") if asked.get(name) is not None]
    options = (*words, *click.get_current_context().meta[_SBATCH])
    others = {name: asked[name] for name in asked.keys() - _PASSED.keys() - {"array", "bind"}}
    return Resources(binds=asked["bind"], options=options, chain=chain, **others)
