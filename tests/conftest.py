import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).with_name("slurm")))  # cluster.py and helpers, for all folders of tests
from cluster import started, unavailable

# `python -m pytest` looks for packages in the repository as well, where `make quickstart` has left a folder `datasets`;
# transformers would take that for Hugging Face's package
sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).parents[1]]


def pytest_collection_modifyitems(items):
    """With several workers, the tests of a file stay together, and so do all that share the machine's one Slurm."""
    for item in items:
        shared = "running_slurm" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("slurm" if shared else str(item.path)))


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


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory):
    """A dataset of 300 samples."""
    from hpclr.cli import hpclr

    path = tmp_path_factory.mktemp("data") / "digits.h5"
    hpclr(["data", "prepare", "digits", str(path), "--valid-fraction", "0.1", "--limit", "300"], standalone_mode=False)
    return path


@pytest.fixture
def jobs(real_slurm, few_digits, tmp_path):
    """Runs as jobs of a real Slurm; none is left."""
    from job_helpers import Jobs

    from hpclr.slurm import client

    yield Jobs(real_slurm, tmp_path, few_digits)
    client.cancel([job.id for job in client.queue() if job.state in ("RUNNING", "PENDING")])
