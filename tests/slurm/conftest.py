import os

import pytest
from cluster import started, unavailable


@pytest.fixture(scope="session")
def running_slurm():
    if reason := unavailable():
        pytest.skip(reason)
    with started() as cluster:
        yield cluster


@pytest.fixture
def real_slurm(running_slurm, monkeypatch):
    """A real Slurm, whose commands are first on PATH."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SBATCH_", "SQUEUE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", running_slurm.path)
    return running_slurm
