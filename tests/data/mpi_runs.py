"""Running hpclr's commands under mpirun."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
MPIRUN = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n"]

needs_mpi = pytest.mark.skipif(
    shutil.which("mpirun", path=ENVIRONMENT["PATH"]) is None or find_spec("mpi4py") is None,
    reason="mpirun or mpi4py is not installed",
)
needs_heat = pytest.mark.skipif(find_spec("heat") is None, reason="heat is not installed")


def python(processes, *arguments):
    """Runs Python, under mpirun unless processes is 0."""
    return subprocess.run(
        [*([*MPIRUN, str(processes)] if processes else []), sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=ENVIRONMENT,
    )


def hpclr(processes, *arguments):
    return python(processes, "-m", "hpclr", "data", *arguments)


def messages(done):
    """What hpclr itself said; mpirun has its own words."""
    return [line for line in done.stderr.splitlines() if line.startswith("hpclr:")]
