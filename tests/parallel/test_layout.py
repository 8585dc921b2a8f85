"""Who am I: all families of variables, alone and together."""

import subprocess
import sys
import time

import pytest

from hpclr.errors import UsageError
from hpclr.parallel.meeting.layout import ALONE, Layout, Task, check_gpus, resolve

MASTER = {"MASTER_ADDR": "n1", "MASTER_PORT": "4000"}
EXPORTED = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", **MASTER}
TORCHRUN = EXPORTED | {"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
OMPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "2",
    "PMIX_NAMESPACE": "prterun-n1-167@1",
}
MVAPICH = {name.replace("OMPI", "MV2"): value for name, value in OMPI.items() if name.startswith("OMPI")}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
TASK = Task(True, 2, 4, 0, 2, 2, None, "13.0.0", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
BATCH = Task(False, 0, 4, 0, 1, 2, None, "13.none.0", "SLURM_PROCID", "SLURM_NTASKS")
DAEMON = TASK._replace(rank=0, size=1, local_rank=0, local_size=1, nodes=1)  # what mpirun's helper on a node is
AGENT = TASK._replace(rank=1, size=2, local_rank=0, local_size=1)
PLACE = (2, 4, 0, 2)


@pytest.mark.parametrize(
    ("environ", "task", "launcher"),
    [
        (TORCHRUN, None, "torchrun"),
        (TORCHRUN, AGENT, "torchrun"),
        (TORCHRUN, BATCH, "torchrun"),
        (TORCHRUN | {"PMIX_RANK": "1"}, AGENT, "torchrun"),  # srun --mpi=pmix torchrun
        (EXPORTED, None, "torchrun"),
        (OMPI, None, "mpi"),
        (OMPI, BATCH, "mpi"),
        (OMPI, DAEMON, "mpi"),
        (OMPI | {"PMI_RANK": "0", "PMI_SIZE": "1"}, DAEMON, "mpi"),  # a site whose srun speaks PMI2 by itself
        (MVAPICH, None, "mpi"),
        (HYDRA, None, "mpi"),
        (HYDRA, TASK._replace(size=4, rank=1, nodes=4, local_size=1), "mpi"),
        (OMPI | EXPORTED, None, "mpi"),
        ({}, TASK, "slurm"),
        (EXPORTED, TASK, "slurm"),
        ({"WORLD_SIZE": "4", **MASTER}, TASK, "slurm"),
        ({"PMI_RANK": "2", "PMI_SIZE": "4"}, TASK, "slurm"),  # srun --mpi=pmi2
        ({"PMIX_RANK": "2", "PMIX_NAMESPACE": "slurm.pmix.13.0"}, TASK, "slurm"),
    ],
)
def test_each_launcher(environ, task, launcher):
    layout = resolve(environ, task=task)
    assert layout[:4] == PLACE
    assert layout.launcher == launcher
    assert layout.store_address == (("n1", 4000) if launcher == "torchrun" else None)
    assert layout.key == {"slurm": "13.0.0", "mpi": environ.get("PMIX_NAMESPACE"), "torchrun": None}[launcher]


@pytest.mark.parametrize("task", [None, BATCH._replace(size=1)])
def test_nobody_started_it(task):
    assert resolve({"HOME": "/root"}, task=task) == ALONE


def test_tasks_of_one_are_one():
    one = TASK._replace(rank=0, size=1, local_size=1, nodes=1)
    assert resolve({}, task=one) == Layout(0, 1, 0, 1, "slurm", "13.0.0")
    assert resolve({"RANK": "0", "WORLD_SIZE": "1"})[:4] == (0, 1, 0, 1)


@pytest.mark.parametrize(
    ("environ", "task", "named"),
    [
        ({"RANK": "0"}, None, ["RANK", "WORLD_SIZE is not"]),
        ({"WORLD_SIZE": "2"}, None, ["WORLD_SIZE", "RANK is not"]),
        ({"RANK": "0", "WORLD_SIZE": "2"}, None, ["MASTER_ADDR is not"]),
        ({"RANK": "0", "WORLD_SIZE": "2", **MASTER}, None, ["rank of this process on its node", "LOCAL_RANK"]),
        (EXPORTED | {"RANK": "two"}, None, ["RANK='two'", "whole number"]),
        (EXPORTED | {"RANK": "-1"}, None, ["RANK='-1'"]),
        (EXPORTED | {"RANK": "4"}, None, ["RANK=4", "WORLD_SIZE=4"]),
        (EXPORTED | {"LOCAL_RANK": "2"}, None, ["is 2", "processes on it, 2"]),
        (EXPORTED | {"LOCAL_WORLD_SIZE": "8"}, None, ["8 processes", "WORLD_SIZE=4"]),
        (EXPORTED | {"MASTER_PORT": "70000"}, None, ["MASTER_PORT=70000", "65535"]),
        (EXPORTED | {"WORLD_SIZE": "8"}, TASK, ["WORLD_SIZE=8", "SLURM_STEP_NUM_TASKS=4", "Remove the export"]),
        (EXPORTED | {"RANK": "0"}, TASK, ["RANK=0", "SLURM_PROCID=2", "batch script"]),
        (EXPORTED | {"WORLD_SIZE": "3"} | OMPI, None, ["WORLD_SIZE=3", "OMPI_COMM_WORLD_SIZE=4"]),
        (EXPORTED | {"LOCAL_RANK": "1"}, TASK, ["LOCAL_RANK=1", "=0"]),
        (TORCHRUN | {"GROUP_WORLD_SIZE": "1"}, TASK, ["SLURM_STEP_NUM_TASKS=4", "GROUP_WORLD_SIZE=1", "--nnodes"]),
        (TORCHRUN | {"GROUP_WORLD_SIZE": "1"} | OMPI, None, ["OMPI_COMM_WORLD_SIZE=4", "GROUP_WORLD_SIZE=1"]),
        ({"GROUP_WORLD_SIZE": "1"}, None, ["RANK is not"]),
        (OMPI, TASK._replace(nodes=1), ["srun started 4 tasks", "OMPI_COMM_WORLD_SIZE=4", "Two launchers"]),
        (OMPI, TASK._replace(nodes=1, size=8), ["SLURM_STEP_NUM_TASKS=8", "OMPI_COMM_WORLD_SIZE=4"]),
        (HYDRA, TASK._replace(nodes=1), ["SLURM_STEP_NUM_TASKS=4", "PMI_SIZE=4"]),
        (OMPI | HYDRA | {"PMI_SIZE": "3"}, None, ["OMPI_COMM_WORLD_SIZE=4", "PMI_SIZE=3"]),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, None, ["OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK is not"]),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, None, ["PMI_SIZE=2", "on its node"]),
        ({"PMIX_RANK": "1"}, None, ["PMIX_RANK=1", "of how many"]),
        ({"PMIX_RANK": "1"}, TASK, ["PMIX_RANK=1", "SLURM_PROCID=2"]),
        (OMPI | {"PMIX_RANK": "1"}, None, ["PMIX_RANK=1", "OMPI_COMM_WORLD_RANK=2"]),
        ({}, BATCH, ["world size 1", "SLURM_NTASKS=4", "srun hpclr"]),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, BATCH, ["SIZE=1", "SLURM_NTASKS=4", "-n 4"]),
        ({}, TASK._replace(rank=4), ["SLURM_PROCID=4", "SLURM_STEP_NUM_TASKS=4"]),
    ],
)  # fmt: skip
def test_contradictions_stop_at_once_and_are_named(environ, task, named):
    start = time.perf_counter()
    with pytest.raises(UsageError) as error:
        resolve(environ, task=task)
    assert time.perf_counter() - start < 0.1
    for text in named:
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("launcher", "expected"), [("torchrun", (1, 8)), ("mpi", (2, 4)), ("slurm", (0, 1)), ("single", (0, 1))]
)
def test_a_forced_launcher_alone_counts(launcher, expected):
    torch = EXPORTED | {"RANK": "1", "WORLD_SIZE": "8"}
    layout = resolve(torch | OMPI, launcher=launcher, task=DAEMON)
    assert layout[:2] == expected
    assert layout.launcher == launcher


def test_forced_mpi_takes_from_the_task_what_pmix_does_not_say():
    assert resolve({"PMIX_RANK": "2"}, launcher="mpi", task=TASK)[:4] == PLACE


@pytest.mark.parametrize("launcher", ["torchrun", "mpi", "slurm"])
def test_a_forced_launcher_must_be_there(launcher):
    environ = MASTER if launcher == "torchrun" else {}
    with pytest.raises(UsageError, match=f"parallel.launcher is {launcher}"):
        resolve(environ, launcher=launcher, task=BATCH)


def of(local_rank: int, local_size: int, launcher: str = "slurm") -> Layout:
    return Layout(local_rank, 8, local_rank, local_size, launcher)


@pytest.mark.parametrize(
    ("layout", "visible", "task_gpus", "wanted", "device"),
    [
        (of(3, 4), 4, 4, "auto", 3),
        (of(3, 4, "torchrun"), 4, None, "cuda", 3),
        (of(3, 4), 1, 4, "auto", 0),  # each task sees only its own
        (of(0, 1), 1, 4, "auto", 0),  # chosen by CUDA_VISIBLE_DEVICES
        (of(1, 2, "torchrun"), 4, None, "auto", 1),
        (ALONE, 4, None, "auto", 0),
        (ALONE, 0, None, "auto", None),
        (of(1, 2), 0, 0, "auto", None),
        (of(1, 2), 4, 4, "cpu", None),
    ],
)
def test_device_of_a_process(layout, visible, task_gpus, wanted, device):
    assert check_gpus(layout, visible, task_gpus=task_gpus, wanted=wanted) == device


@pytest.mark.parametrize(
    ("layout", "visible", "task_gpus", "named"),
    [
        (of(0, 2), 4, 4, ["2 processes", "4 GPUs", "--ntasks-per-node", "--gpus-per-task|--gpus-per-node"]),
        (of(0, 4), 2, 2, ["4 processes", "2 GPUs"]),
        (of(0, 4), 1, 1, ["4 processes", "1 GPUs"]),
        (of(0, 2), 1, 4, ["2 processes", "1 GPUs of the 4"]),
        (of(0, 4, "torchrun"), 1, None, ["4 processes", "--nproc-per-node"]),
        (of(0, 4, "mpi"), 2, None, ["4 processes", "2 GPUs"]),
        (of(0, 4), 0, 4, ["0 CUDA devices", "4 GPUs", "train.device=cpu"]),
    ],
)
def test_processes_and_gpus_must_fit(layout, visible, task_gpus, named):
    with pytest.raises(UsageError) as error:
        check_gpus(layout, visible, task_gpus=task_gpus, wanted="auto")
    for text in named:
        assert any(part in str(error.value) for part in text.split("|"))


def test_cuda_where_there_is_none():
    with pytest.raises(UsageError, match="is cuda"):
        check_gpus(ALONE, 0, task_gpus=None, wanted="cuda")


def test_it_takes_no_torch():
    code = "import sys, hpclr.parallel.meeting.layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=20).returncode == 0
