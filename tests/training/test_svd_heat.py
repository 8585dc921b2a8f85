"""`svd: heat`: the layers decomposed by all processes of an MPI job together."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from training_helpers import hpclr, summary

pytestmark = pytest.mark.skipif(
    find_spec("heat") is None or find_spec("mpi4py") is None, reason="heat or mpi4py is not installed"
)
HEAT = {"name": "oialr", "delay": 0.5, "every": 0.25, "cutoff": 0.3, "layer_fraction": 0.5, "svd": "heat"}


def mpirun(processes: int, bench, file: Path) -> subprocess.CompletedProcess[str]:
    beside = str(Path(sys.executable).parent)
    command = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(processes)]
    return subprocess.run(
        [*command, sys.executable, "-m", "hpclr", "train", file],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=bench.path,
        env=os.environ
        | {"PATH": f"{beside}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
    )  # fmt: skip


def test_two_processes_decompose_together_and_train_as_one(bench):
    """At full rank heat is exact, so that only rounding differs."""
    bench.train()
    alone = summary(bench.run)
    file = bench.write(name="together", method=HEAT | {"heat_rank": 1.0}, parallel={"verify_every": 1})
    done = mpirun(2, bench, file)
    assert done.returncode == 0, done.stderr
    together = summary(bench.path / "runs" / "together")
    assert [layer["rank"] for layer in together["layers"]] == [layer["rank"] for layer in alone["layers"]]
    assert together["test"]["loss"] == pytest.approx(alone["test"]["loss"], rel=1e-3)


def test_what_heat_does_not_find_is_gone_at_conversion(bench):
    done = hpclr("train", bench.write(method=HEAT | {"heat_rank": 0.25, "every": 0.9}))
    assert done.code == 0, done.err
    shares = [layer["rank"] / min(layer["shape"]) for layer in summary(bench.run)["layers"] if layer["converted"]]
    assert shares
    assert max(shares) <= 0.25 + 1 / 16


def test_processes_that_mpi_does_not_know_are_refused(bench):
    file = bench.write(method=HEAT)
    done = hpclr("launch", "-n", 2, file)
    assert done.code == 2
    assert not bench.run.exists()
