"""What a job is to have, in the words of sbatch."""

from collections.abc import Sequence
from dataclasses import dataclass

from hpclr.cluster.container import Runtime
from hpclr.cluster.profiles import Profile
from hpclr.errors import UsageError
from hpclr.slurm.script import Launcher

_MEMORY = ("--mem", "--mem-per-cpu", "--mem-per-gpu")
_GPUS = ("--gpus", "--gpus-per-node", "--gpus-per-task", "--gpus-per-socket", "--ntasks-per-gpu")
_OWN = ("--nodes", "--ntasks", "--ntasks-per-node", "--cpus-per-task", "--time")
_UNDERSTOOD = ("--partition", "--account", "--gres", "--array", *_MEMORY, *_GPUS)


@dataclass(frozen=True)
class Resources:
    """What a job is to have.

    Attributes:
        nodes: how many.
        gpus_per_node: GPUs of each; None: none.
        ntasks_per_node: processes on each; None: one for each GPU.
        cpus_per_task: CPUs of each process; None: their share of the cores that the profile gives a node, else 1.
        time: the limit, as sbatch takes it; None: the partition's.
        launcher: what starts the processes.
        attempts: how often a job may start.
        chain: how many jobs follow one another, where jobs cannot be requeued; 0: one job, which requeues itself.
        options: further options of sbatch, each one word, such as "--partition=main".
        profile: the name of a cluster profile, or a file; None: nothing is known of the cluster.
        container: the image to run in; None: in none.
        runtime: what runs the image; None: as the profile says.
        binds: what else is seen in the container.
    """

    nodes: int = 1
    gpus_per_node: int | None = None
    ntasks_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    launcher: Launcher = "srun"
    attempts: int = 20
    chain: int = 0
    options: tuple[str, ...] = ()
    profile: str | None = None
    container: str | None = None
    runtime: Runtime | None = None
    binds: tuple[str, ...] = ()

    @property
    def gpus(self) -> int:
        """GPUs of each node."""
        return self.gpus_per_node or 0

    @property
    def processes(self) -> int:
        """Processes on each node.

        Raises:
            UsageError: if nothing says how many.
        """
        processes = self.ntasks_per_node or self.gpus
        if not processes:
            raise UsageError(
                "how many processes are to run on each node? Give --gpus-per-node N for one with each GPU or, to "
                "compute on CPUs, --ntasks-per-node N."
            )
        return processes

    def option(self, name: str) -> str | None:
        """The value of an option of sbatch, "" if it has none; None if it is not given."""
        return next((value for word, _, value in (o.partition("=") for o in self.options) if word == name), None)

    def partitions(self, profile: Profile) -> list[str]:
        """Where the job may run: what is asked for, else the profile's first; none: Slurm's default."""
        asked = self.option("--partition")
        return list(profile.partitions)[:1] if asked is None else asked.split(",")

    def all_options(self, profile: Profile) -> tuple[str, ...]:
        """The options of sbatch, with what the profile adds to them."""
        added = self.partitions(profile) if self.option("--partition") is None else []
        return (*(f"--partition={name}" for name in added), *self.options)


def check_resources(resources: Resources) -> None:
    """Refuses what a container is to have where there is none, and what `check_options` refuses.

    Raises:
        UsageError: naming it.
    """
    given = [name for name, value in (("--runtime", resources.runtime), ("--bind", resources.binds)) if value]
    if given and resources.container is None:
        raise UsageError(f"{' and '.join(given)}: needs --container IMAGE, without which the job runs in no container.")
    check_options(resources.options)


def check_options(options: Sequence[str]) -> None:
    """Refuses options of sbatch that contradict one another, or what hpclr has options of its own for.

    Whether there are such options at all is sbatch's to say.

    Raises:
        UsageError: naming them.
    """
    names = [word.partition("=")[0] for word in options]
    for name, word in zip(names, options, strict=True):
        _check_option(name, word)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{', '.join(twice)}: given more than once, before or after --. Give each option once.")
    if len(memory := [name for name in names if name in _MEMORY]) > 1:
        raise UsageError(f"{' and '.join(memory)} exclude one another; give one of them.")


def _check_option(name: str, word: str) -> None:
    if name in _OWN:
        own = "--ntasks-per-node N, the number on each node" if name == "--ntasks" else name
        raise UsageError(f"{word!r}: give hpclr's own option {own}, before --.")
    if name not in _UNDERSTOOD and len(name) > 2 and (meant := [full for full in _UNDERSTOOD if full.startswith(name)]):
        raise UsageError(f"{word!r}: write the option in full, such as {meant[0]}; hpclr looks at it as well.")
    if name == "--array":
        raise UsageError(
            f"{word!r}: a job array of one run would train the same run several times, in one directory. Runs that "
            "differ, such as in their seeds, are submitted together as an array by `hpclr sweep`."
        )
    if name in _GPUS or (name == "--gres" and "gpu" in word):
        raise UsageError(
            f"{word!r}: give the number of GPUs with hpclr's own option --gpus-per-node N, before --, so that there is "
            "a process for each. A kind of GPU is chosen by --constraint or --partition."
        )
