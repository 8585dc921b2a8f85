"""The page on one machine: which checks there are, and how their findings are shown."""

from collections.abc import Iterable, Iterator

from hpclr.cluster.doctor import containers, devices, machine, net, slurm, space, storage, world
from hpclr.cluster.doctor.circumstances import Circumstances
from hpclr.cluster.doctor.collecting import Check, collect
from hpclr.cluster.doctor.finding import Finding, Level

_FILES_HANG = "The file system does not answer: `df` and `ls` there will hang too. Tell the administrators."


def examine(here: Circumstances) -> Iterator[Finding]:
    """All that can be said of this machine, line by line as it is found out.

    Of several processes only the first looks at all; the others take part in what needs all of them, and say nothing.
    """
    if here.layout.rank > 0:
        list(collect([of_mpi(here)]))
        return
    yield from here.doubts()
    checks = [of_devices(here), of_mpi(here), *of_node(here), of_slurm(here), of_containers()]
    for findings in collect(checks):
        yield from findings


def of_devices(here: Circumstances) -> Check:
    """torch, its devices and backends; a first import from a busy file system takes its time."""
    return Check("torch", lambda: devices.examine(here), 120, remedy="Try `python -c 'import torch'` by itself.")


def of_mpi(here: Circumstances) -> Check:
    """MPI, which only runs under mpirun depend on."""
    level: Level = "failure" if here.layout.launcher == "mpi" else "warning"
    remedy = "MPI does not start: load its module; under srun try --mpi=pmix, or start with its own mpirun."
    return Check("mpi", lambda: world.examine(here.layout), 60, level, remedy)


def of_node(here: Circumstances) -> list[Check]:
    """File systems, machine, network."""
    return [
        Check("files", lambda: storage.examine(here.directory), 30, remedy=_FILES_HANG),
        Check("space", lambda: space.examine(here.directory), 30, remedy=_FILES_HANG),
        Check("machine", lambda: machine.examine(here.layout.world_size), 10),
        Check("network", lambda: net.examine(here), 30, remedy="The name service does not answer."),
    ]


def of_slurm(here: Circumstances) -> Check:
    """Slurm, as far as one may ask."""
    return Check("slurm", lambda: slurm.examine(here.job), 45, remedy="Slurm does not answer: try `sinfo`.")


def of_containers() -> Check:
    """Container runtimes."""
    return Check("containers", containers.examine, 30, "warning")


def lines(finding: Finding) -> Iterator[str]:
    """A finding for a terminal: what was found, and in a second line what to do."""
    yield f"{finding.level:<8} {finding.about:<13} {finding.text}"
    if finding.advice:
        yield f"{'':<8} {'':<13} → {finding.advice}"


def verdict(findings: Iterable[Finding]) -> str:
    """The last line."""
    levels = [finding.level for finding in findings]
    counts = [_counted(levels.count(level), level) for level in ("failure", "warning") if level in levels]
    return ", ".join(counts) or "no problems found"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"
