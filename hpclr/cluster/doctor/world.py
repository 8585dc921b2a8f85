"""MPI: its library, and whether its world has as many processes as were started.

Under srun without the right --mpi, and with an mpirun of another MPI, each process is silently alone in a world of
its own; all of them then do the whole work, or write the same file.
"""

import sys
from collections.abc import Iterator

from hpclr.cluster.doctor.finding import Finding, failure, ok, warning
from hpclr.errors import RetryableError, UsageError
from hpclr.parallel import mpi
from hpclr.parallel.meeting.layout import Layout

_NEEDED = "MPI is needed for `svd: heat`, `hpclr data stats` in several processes, and under mpirun"
_PATIENCE = 10.0  # seconds for a message
_WORD = b"hpclr"


def examine(layout: Layout) -> Iterator[Finding]:
    """Collective: all processes that were started together look at it."""
    if not mpi.is_installed():
        yield _not_installed(layout)
        return
    try:
        comm = mpi.world_until_leave("This check")
    except UsageError as error:
        if layout.launcher == "mpi":
            yield failure("mpi", str(error), "Runs that mpirun starts need it.")
        else:
            yield warning("mpi", str(error), f"Or do without: {_NEEDED}.")
        return
    # only parallel/mpi.py imports mpi4py
    library = sys.modules[type(comm).__module__].Get_library_version().strip("\0").partition(",")[0].strip()
    yield _judge(layout, comm.Get_rank(), comm.Get_size(), library.splitlines()[0])
    if comm.Get_size() > 1:
        yield from _message(comm)
    mpi.leave()


def _not_installed(layout: Layout) -> Finding:
    if layout.launcher == "mpi":
        return warning("mpi", "mpi4py is not installed", "Install it with `pip install 'hpclr[mpi]'`, for this mpirun.")
    return ok("mpi", f"mpi4py is not installed; {_NEEDED}")


def _judge(layout: Layout, rank: int, size: int, library: str) -> Finding:
    started = f"{layout.launcher} started {layout.world_size} processes"
    if (rank, size) == (layout.rank, layout.world_size) or (layout.launcher == "torchrun" and size == 1):
        many = f"{size} processes" if size > 1 else "1 process"
        note = f"; {started}, and torchrun starts no MPI" if size < layout.world_size else ""
        return ok("mpi", f"{library}; COMM_WORLD has {many}{note}", same=f"mpi {library}")
    text = f"{library}; {started}, of which this is rank {layout.rank}, but in COMM_WORLD it is rank {rank} of {size}"
    if layout.launcher == "mpi":
        return failure(
            "mpi", text, "mpirun and mpi4py belong to different MPIs: use the mpirun of the MPI that mpi4py has."
        )
    return warning(
        "mpi",
        text,
        f"Start with `srun --mpi=pmix` (`srun --mpi=list` shows what there is), with an MPI that has it. {_NEEDED}; "
        "other runs do not notice.",
    )


def _message(comm: object) -> Iterator[Finding]:
    try:
        arrived = mpi.broadcast(comm, _WORD, _PATIENCE) == _WORD
    except RetryableError:
        arrived = False
    if not arrived:
        yield failure(
            "mpi",
            f"a message of the first process did not arrive within {_PATIENCE:.0f} s",
            "The processes do not reach one another: see the line on the network, and try the MPI's own settings for "
            "its interface (Open MPI: OMPI_MCA_btl_tcp_if_include).",
        )
