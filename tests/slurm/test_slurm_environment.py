"""Environments as real Slurm 22.05 set them, shortened to what matters."""

import pytest

from hpclr.errors import UsageError
from hpclr.slurm.environment import read

BATCH = {
    "SLURM_JOB_ID": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_GPUS_ON_NODE": "2",
}
TASK = BATCH | {
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
INTERACTIVE_SHELL = BATCH | {  # salloc with use_interactive_step
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}
SALLOC_SHELL = {key: BATCH[key] for key in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_TASKS_PER_NODE")}


def test_outside_of_slurm():
    assert read({"HOME": "/root"}) is None


def test_task_of_a_step():
    process = read(TASK)
    assert process is not None
    assert process.started
    assert (process.rank, process.size, process.local_rank, process.local_size, process.nodes) == (2, 4, 0, 2, 2)
    assert process.gpus == 2
    assert (process.rank_name, process.size_name) == ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


@pytest.mark.parametrize("environ", [BATCH, INTERACTIVE_SHELL, SALLOC_SHELL])
def test_scripts_and_shells_are_no_tasks(environ):
    process = read(environ)
    assert process is not None
    assert not process.started
    assert (process.size, process.size_name) == (4, "SLURM_NTASKS")


@pytest.mark.parametrize(
    ("environ", "size"),
    [
        ({"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "3"}, 6),
        ({"SLURM_NNODES": "2", "SLURM_TASKS_PER_NODE": "1(x2)"}, 2),
        ({"SLURM_NNODES": "1", "SLURM_TASKS_PER_NODE": "4"}, 1),  # --exclusive: these are CPUs
    ],
)
def test_room_of_a_job_without_a_number_of_tasks(environ, size):
    process = read({"SLURM_JOB_ID": "9"} | environ)
    assert process is not None
    assert process.size == size


@pytest.mark.parametrize(("node", "tasks"), [("0", 3), ("1", 1), ("2", 1), ("3", 2)])
def test_uneven_tasks(node, tasks):
    process = read(TASK | {"SLURM_STEP_TASKS_PER_NODE": "3,1(x2),2", "SLURM_NODEID": node})
    assert process is not None
    assert process.local_size == tasks


def test_key_tells_jobs_steps_and_attempts_apart():
    others = [
        {},
        {"SLURM_JOB_ID": "2"},
        {"SLURM_STEP_ID": "4"},
        {"SLURM_RESTART_COUNT": "1"},
        {"SLURM_JOB_ID": "13", "SLURM_STEP_ID": "0"},
    ]
    keys = {process.key for other in others if (process := read(TASK | other)) is not None}
    assert len(keys) == len(others)
    same = read(TASK | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"})
    assert same is not None
    assert same.key in keys


def test_parts_of_a_heterogeneous_job_have_one_key():
    parts = [read(TASK | {"SLURM_JOB_ID": job, "SLURM_JOB_ID_HET_GROUP_0": "10"}) for job in ("10", "11")]
    assert parts[0] is not None
    assert parts[1] is not None
    assert parts[0].key == parts[1].key


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"SLURM_STEP_NUM_TASKS": None}, "SLURM_STEP_NUM_TASKS is not set"),
        ({"SLURM_PROCID": "one"}, "SLURM_PROCID is 'one'"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x"}, r"SLURM_STEP_TASKS_PER_NODE is '2\(x'"),
        ({"SLURM_NODEID": "2"}, "SLURM_NODEID=2"),
    ],
)
def test_what_is_missing_or_wrong_is_named(change, named):
    environ = {key: value for key, value in (TASK | change).items() if value is not None}
    with pytest.raises(UsageError, match=named):
        read(environ)
