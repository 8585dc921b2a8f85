"""What Slurm tells a process in its environment; nothing is asked of Slurm itself."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from hpclr.errors import UsageError

# Steps that are no srun of the user's count down from here (slurm.h: SLURM_INTERACTIVE_STEP, SLURM_BATCH_SCRIPT, …).
_FIRST_RESERVED_STEP = 0xFFFFFFF0


class SlurmProcess(NamedTuple):
    """A process inside a Slurm job: a task that srun started, or a part of the batch script or of salloc's shell."""

    started: bool  # by srun, as one of `size` tasks; else `rank` is 0 and `size` what the job has room for
    rank: int
    size: int
    local_rank: int
    local_size: int
    nodes: int  # of the step, or of the job
    gpus: int | None  # of the job on this node; None if none were asked for
    key: str  # the same in all tasks of this step in this attempt of the job, and nowhere else
    rank_name: str  # the variables that `rank` and `size` come from
    size_name: str


def read(environ: Mapping[str, str]) -> SlurmProcess | None:
    """The place of a process in its Slurm job; None outside Slurm.

    A batch script too has SLURM_PROCID=0, SLURM_LOCALID=0 and SLURM_NTASKS; only a task has a step (SLURM_STEP_ID)
    with its number of tasks (SLURM_STEP_NUM_TASKS). The shell that salloc may open on a node is a step with a
    reserved number. Seen on Slurm 22.05.

    Raises:
        UsageError: if a variable is missing that Slurm sets, or is not a number.
    """
    if not environ.get("SLURM_JOB_ID"):
        return None
    if _number(environ, "SLURM_STEP_ID", _FIRST_RESERVED_STEP) < _FIRST_RESERVED_STEP:
        return _task(environ)
    size, size_name = _room(environ)
    nodes = _number(environ, "SLURM_NNODES", 1)
    return SlurmProcess(
        False, 0, size, 0, 1, nodes, _gpus(environ), _key(environ, "none"), "SLURM_PROCID", size_name
    )  # fmt: skip


def _task(environ: Mapping[str, str]) -> SlurmProcess:
    counts = _tasks_per_node(environ)
    node = _number(environ, "SLURM_NODEID")
    if node >= len(counts):
        raise UsageError(
            f"SLURM_NODEID={node}, but SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']} has only "
            f"{len(counts)} nodes: one of them was changed after srun had set it. Leave both as they are."
        )
    return SlurmProcess(
        started=True,
        rank=_number(environ, "SLURM_PROCID"),
        size=_number(environ, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_size=counts[node],
        nodes=_number(environ, "SLURM_STEP_NUM_NODES", len(counts)),
        gpus=_gpus(environ),
        key=_key(environ, environ["SLURM_STEP_ID"]),
        rank_name="SLURM_PROCID",
        size_name="SLURM_STEP_NUM_TASKS",
    )


def _room(environ: Mapping[str, str]) -> tuple[int, str]:
    """How many tasks srun would start without further options, and which variables say so.

    SLURM_TASKS_PER_NODE does not: where no number of tasks was asked for, it counts CPUs.
    """
    nodes = _number(environ, "SLURM_NNODES", 1)
    if "SLURM_NTASKS" in environ:
        return _number(environ, "SLURM_NTASKS"), "SLURM_NTASKS"
    if "SLURM_NTASKS_PER_NODE" in environ:
        return nodes * _number(environ, "SLURM_NTASKS_PER_NODE"), "SLURM_NNODES × SLURM_NTASKS_PER_NODE"
    return nodes, "SLURM_NNODES"


def _tasks_per_node(environ: Mapping[str, str]) -> list[int]:
    """`2(x3),1` as [2, 2, 2, 1]."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    counts: list[int] = []
    for part in environ.get(name, "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UsageError(_unusable(name, environ.get(name), "counts such as 2(x3),1"))
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _gpus(environ: Mapping[str, str]) -> int | None:
    return _number(environ, "SLURM_GPUS_ON_NODE") if environ.get("SLURM_GPUS_ON_NODE") else None


def _key(environ: Mapping[str, str], step: str) -> str:
    # Each part of a heterogeneous job has its own id; that of the first part stands for all.
    job = environ.get("SLURM_JOB_ID_HET_GROUP_0") or environ["SLURM_JOB_ID"]
    return f"{job}.{step}.{environ.get('SLURM_RESTART_COUNT', '0')}"


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environ.get(name)
    if value is None and default is not None:
        return default
    if value is None or not re.fullmatch(r"[0-9]+", value):
        raise UsageError(_unusable(name, value, "a number"))
    return int(value)


def _unusable(name: str, value: str | None, expected: str) -> str:
    found = "is not set" if value is None else f"is {value!r}"
    return (
        f"This process belongs to a Slurm job (SLURM_JOB_ID), but {name} {found}; expected {expected}. A container "
        "must be given all of Slurm's variables, and a script should not change them."
    )
