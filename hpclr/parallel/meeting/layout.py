"""Who a process is: its rank, and how many there are, by the word of whoever started it.

Three families of environment variables may speak, also at once: torch's (torchrun's, or exported by hand), MPI's
(mpirun's), and those of the batch system's own tasks. All that are there must agree; finding out takes no torch and
no more than milliseconds.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from hpclr.errors import UsageError


class Task(NamedTuple):
    """What the batch system knows of a process."""

    started: bool  # by the batch system, as one of `size` tasks; else `size` is what the job has room for
    rank: int
    size: int
    local_rank: int
    local_size: int
    nodes: int
    gpus: int | None  # on this node; None if none were asked for
    key: str  # the same in all tasks that were started together, and nowhere else
    rank_name: str  # the variables that `rank` and `size` come from
    size_name: str


class Layout(NamedTuple):
    """Which process of how many this is."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    launcher: str  # single, torchrun, mpi, slurm
    key: str | None = None  # for meeting through a directory: the same in all processes of this start only
    store_address: tuple[str, int] | None = None  # torchrun's store; or where rank 0 shall open one


class _Names(NamedTuple):
    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]


class _Numbers(NamedTuple):
    """What one family of variables says; local numbers are None where it does not say."""

    rank: int
    size: int
    local_rank: int | None
    local_size: int | None
    rank_name: str
    size_name: str

    @property
    def place(self) -> tuple[int, int]:
        return self.rank, self.size

    def __str__(self) -> str:
        return f"{self.rank_name}={self.rank}, {self.size_name}={self.size}"


ALONE = Layout(0, 1, 0, 1, "single")

_TORCH = _Names("RANK", "WORLD_SIZE", ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",))
_MPIRUN = tuple(  # set by mpirun only: Open MPI, MVAPICH2
    _Names(f"{prefix}_RANK", f"{prefix}_SIZE", (f"{prefix}_LOCAL_RANK",), (f"{prefix}_LOCAL_SIZE",))
    for prefix in ("OMPI_COMM_WORLD", "MV2_COMM_WORLD")
)
_PMI = _Names(  # set by the mpirun of MPICH and Intel MPI, and by batch systems
    "PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"), ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")
)
_MPI = (*_MPIRUN, _PMI)
_AGENTS = "GROUP_WORLD_SIZE"
_HOW = {
    "torchrun": "`torchrun --nproc-per-node N -m hpclr …`",
    "mpi": "`mpirun -n N hpclr …`",
    "slurm": "`srun -n N hpclr …` in a job",
}


def resolve(environ: Mapping[str, str], *, launcher: str = "auto", task: Task | None = None) -> Layout:
    """Finds out which process of how many this is.

    Args:
        environ: the environment variables of this process.
        launcher: "auto" listens to all families of variables and requires that they agree; "torchrun", "mpi",
            "slurm" listen to that family alone and compare nothing; "single" is alone whatever they say.
        task: what the batch system says; None outside of one.

    Raises:
        UsageError: if the variables are incomplete or contradict one another.
    """
    if launcher == "single":
        return ALONE
    if launcher != "auto":
        return _forced(environ, launcher, task)
    started = task if task is not None and task.started else None
    mpi = _checked_mpi(environ, started)
    outer = mpi or (_of_task(started) if started else None)
    if _AGENTS in environ:
        return _under_torchrun(environ, outer)
    if outer is None:
        return _without_launcher(environ, task)
    _check_exported(environ, outer)
    if mpi is None:
        return _layout(outer, "slurm", task.key if task else None)
    if task is not None and not task.started and mpi.size == 1 < task.size:
        raise UsageError(
            f"MPI started this process alone ({mpi.size_name}=1), but the job has room for {task.size} tasks "
            f"({task.size_name}={task.size}). Give mpirun the number: `mpirun -n {task.size} hpclr …`; or set "
            "parallel.launcher=single to use one process on purpose."
        )
    return _layout(mpi, "mpi", environ.get("PMIX_NAMESPACE"))


def check_gpus(layout: Layout, visible: int, *, task_gpus: int | None, wanted: str) -> int | None:
    """The CUDA device of this process, or None for the CPU.

    Args:
        layout: which process this is.
        visible: CUDA devices that torch sees in this process.
        task_gpus: GPUs that the batch system gave the job on this node; None if it gave none, or without one.
        wanted: train.device: "auto", "cpu" or "cuda".

    Raises:
        UsageError: if processes and GPUs of the node do not fit together.
    """
    processes = layout.local_size
    if wanted == "cpu":
        return None
    if visible == 0:
        if wanted == "cuda" or task_gpus:
            raise UsageError(_no_gpus_seen(task_gpus))
        return None
    if visible == processes or (visible > processes and not task_gpus):
        return layout.local_rank
    if visible == 1 and task_gpus is not None and task_gpus == processes:
        return 0  # the batch system shows each task only its own
    raise UsageError(_gpus_differ(layout, visible, task_gpus))


def _no_gpus_seen(task_gpus: int | None) -> str:
    found = f"the job has {task_gpus} GPUs on this node" if task_gpus else "train.device is cuda"
    return (
        f"torch sees 0 CUDA devices, but {found}. Either this build of torch is without CUDA (then `python -c 'import "
        "torch; print(torch.version.cuda)'` prints None), or the container hides the GPUs (apptainer needs --nv), or "
        "CUDA_VISIBLE_DEVICES is empty. To compute on the CPU all the same, set train.device=cpu."
    )


def _gpus_differ(layout: Layout, visible: int, task_gpus: int | None) -> str:
    change = {
        "slurm": "Make --ntasks-per-node and --gpus-per-node the same number",
        "torchrun": "Give torchrun as many --nproc-per-node as there are GPUs",
        "mpi": "Start as many processes a node as there are GPUs (Open MPI: --npernode)",
        "single": "Start one process for each GPU (srun, torchrun or mpirun)",
    }[layout.launcher]
    given = f" of the {task_gpus} that the job has on it" if task_gpus is not None and task_gpus != visible else ""
    return (
        f"{layout.local_size} processes run on this node, but each sees {visible} GPUs{given}; there must be one GPU "
        f"for each process. {change}, or choose with CUDA_VISIBLE_DEVICES (the same list in all processes of the "
        "node), or set train.device=cpu."
    )


def _forced(environ: Mapping[str, str], launcher: str, task: Task | None) -> Layout:
    """Listens to one family alone."""
    found: _Numbers | None
    if launcher == "torchrun":
        found = _read(environ, _TORCH)
        key, address = None, _store_address(environ)
    elif launcher == "mpi":
        found = _any_mpi(environ) or _with_size_of_task(environ, task)
        key, address = environ.get("PMIX_NAMESPACE"), None
    else:
        found = _of_task(task) if task is not None and task.started else None
        key, address = task.key if task else None, None
    if found is None:
        raise UsageError(
            f"parallel.launcher is {launcher}, but this process was not started by it: none of its variables is set. "
            f"Start with {_HOW[launcher]}, or set parallel.launcher=auto."
        )
    return _layout(found, launcher, key, address)


def _under_torchrun(environ: Mapping[str, str], outer: _Numbers | None) -> Layout:
    torch = _read(environ, _TORCH)
    if torch is None:
        raise UsageError(_incomplete(_AGENTS, "RANK"))
    agents = _number(environ, _AGENTS)
    if outer is not None and outer.size != agents:
        raise UsageError(
            f"Two launchers at once: {outer.size_name}={outer.size} says that torchrun itself was started {outer.size} "
            f"times, but {_AGENTS}={agents} says that {agents} of them work together. Start torchrun once a node and "
            f"give it `--nnodes NODES --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:PORT`, or start hpclr "
            "itself with srun or mpirun, without torchrun."
        )
    return _layout(torch, "torchrun", None, _store_address(environ))


def _without_launcher(environ: Mapping[str, str], task: Task | None) -> Layout:
    """Variables exported by hand, or none at all."""
    torch = _read(environ, _TORCH)
    if torch is not None:
        return _layout(torch, "torchrun", None, _store_address(environ) if torch.size > 1 else None)
    if task is not None and task.size > 1:
        raise UsageError(
            f"This process is alone (world size 1), but its job has room for {task.size} tasks "
            f"({task.size_name}={task.size}), and nothing has started the others. Start it with srun (`srun hpclr …`), "
            f"`mpirun -n {task.size} hpclr …` or torchrun; or set parallel.launcher=single to use one process on "
            "purpose."
        )
    return ALONE


def _checked_mpi(environ: Mapping[str, str], task: Task | None) -> _Numbers | None:
    """What mpirun says; None if there was none. What the batch system itself says to MPI belongs to its tasks."""
    families = [numbers for names in _MPI if (numbers := _read(environ, names)) is not None]
    mine = [numbers for numbers in families if not (task and _is_of_task(environ, numbers, task))]
    _check_rank_of_pmix(environ, mine, task)
    if not mine:
        return None
    for other in mine[1:]:
        if other.place != mine[0].place:
            raise UsageError(
                f"Two MPIs contradict each other: {mine[0]}, but {other}. One mpirun was started inside another, or "
                "variables of an outer one were left in the environment: use one of them, and unset the others."
            )
    if task is not None and task.size > task.nodes:
        raise UsageError(
            f"Two launchers at once: srun started {task.size} tasks ({task.size_name}={task.size}) on {task.nodes} "
            f"nodes, and mpirun in them {mine[0].size} processes ({mine[0].size_name}={mine[0].size}). Start mpirun "
            "from the batch script without srun, or hpclr with srun without mpirun."
        )
    return mine[0]


def _is_of_task(environ: Mapping[str, str], numbers: _Numbers, task: Task) -> bool:
    """Whether the batch system set PMI's variables: `srun --mpi=pmi2`, or the step that carries mpirun's daemons.

    MPICH's and Intel's mpirun set the same, and the rank on the node besides.
    """
    ours = numbers.rank_name == _PMI.rank and _PMI.local_rank[0] not in environ
    return ours and numbers.place == (task.rank, task.size)


def _check_rank_of_pmix(environ: Mapping[str, str], mpi: list[_Numbers], task: Task | None) -> None:
    """PMIx tells only the rank, so somebody else must tell the size, and the rank must be the same."""
    if "PMIX_RANK" not in environ:
        return
    rank = _number(environ, "PMIX_RANK")
    known = {numbers.rank_name: numbers.rank for numbers in mpi}
    if task is not None:
        known[task.rank_name] = task.rank
    if not known:
        raise UsageError(
            f"PMIX_RANK={rank} says that this is one of several processes, but no variable says of how many. Start "
            "with mpirun, srun or torchrun; a container must be given their variables."
        )
    if rank not in known.values():
        said = ", ".join(f"{name}={value}" for name, value in known.items())
        raise UsageError(
            f"PMIX_RANK={rank}, but {said}: two launchers at once, or variables of another start were left in the "
            "environment. Use one launcher, and unset the other's variables."
        )


def _check_exported(environ: Mapping[str, str], outer: _Numbers) -> None:
    """RANK, WORLD_SIZE and the like, exported by hand under srun or mpirun, must say what those say."""
    pairs = [
        ("RANK", outer.rank, outer.rank_name),
        ("WORLD_SIZE", outer.size, outer.size_name),
        ("LOCAL_RANK", outer.local_rank, "the rank on the node"),
        ("LOCAL_WORLD_SIZE", outer.local_size, "the number of processes on the node"),
    ]
    for name, expected, source in pairs:
        if name in environ and expected is not None and _number(environ, name) != expected:
            raise UsageError(
                f"{name}={environ[name]}, but {source}={expected}. {name} was exported by hand, perhaps in the batch "
                "script, where it has the same value for all processes. Remove the export: hpclr needs none of RANK, "
                "WORLD_SIZE, MASTER_ADDR under srun or mpirun."
            )


def _any_mpi(environ: Mapping[str, str]) -> _Numbers | None:
    return next((numbers for names in _MPI if (numbers := _read(environ, names)) is not None), None)


def _with_size_of_task(environ: Mapping[str, str], task: Task | None) -> _Numbers | None:
    return _of_task(task) if "PMIX_RANK" in environ and task is not None and task.started else None


def _of_task(task: Task) -> _Numbers:
    numbers = _Numbers(task.rank, task.size, task.local_rank, task.local_size, task.rank_name, task.size_name)
    _check_range(numbers)
    return numbers


def _read(environ: Mapping[str, str], names: _Names) -> _Numbers | None:
    """What a family says; None if it says nothing."""
    local_rank_name = next((name for name in names.local_rank if name in environ), None)
    local_size_name = next((name for name in names.local_size if name in environ), None)
    if names.rank not in environ and names.size not in environ:
        return None
    for name, other in ((names.rank, names.size), (names.size, names.rank)):
        if name not in environ:
            raise UsageError(_incomplete(other, name))
    numbers = _Numbers(
        rank=_number(environ, names.rank),
        size=_number(environ, names.size),
        local_rank=_number(environ, local_rank_name) if local_rank_name else None,
        local_size=_number(environ, local_size_name) if local_size_name else None,
        rank_name=names.rank,
        size_name=names.size,
    )
    _check_range(numbers)
    return numbers


def _check_range(numbers: _Numbers) -> None:
    if numbers.rank >= numbers.size:
        raise UsageError(
            f"{numbers.rank_name}={numbers.rank} is not below {numbers.size_name}={numbers.size}; ranks count from 0. "
            "They come from different starts, or were exported wrongly."
        )
    if numbers.local_size is not None and numbers.local_size > numbers.size:
        raise UsageError(
            f"{numbers.local_size} processes are said to be on this node, but only {numbers.size} in the whole job "
            f"({numbers.size_name}={numbers.size}). They come from different starts, or were exported wrongly."
        )
    if numbers.local_rank is not None and numbers.local_size is not None and numbers.local_rank >= numbers.local_size:
        raise UsageError(
            f"The rank on this node is {numbers.local_rank}, which is not below the number of processes on it, "
            f"{numbers.local_size} (beside {numbers}); ranks count from 0."
        )


def _layout(numbers: _Numbers, launcher: str, key: str | None, store_address: tuple[str, int] | None = None) -> Layout:
    local_rank, local_size = numbers.local_rank, numbers.local_size
    if numbers.size == 1:
        local_rank, local_size = 0, 1
    if local_rank is None or local_size is None:
        missing = "rank of this process on its node" if local_rank is None else "number of processes on this node"
        raise UsageError(
            f"{numbers}, but no variable says the {missing}. Export LOCAL_RANK and LOCAL_WORLD_SIZE with RANK and "
            "WORLD_SIZE, or start with torchrun, srun or mpirun."
        )
    return Layout(numbers.rank, numbers.size, local_rank, local_size, launcher, key, store_address)


def _store_address(environ: Mapping[str, str]) -> tuple[str, int]:
    for name, other in (("MASTER_ADDR", "MASTER_PORT"), ("MASTER_PORT", "MASTER_ADDR")):
        if not environ.get(name):
            raise UsageError(_incomplete("RANK, WORLD_SIZE" if not environ.get(other) else other, name))
    port = _number(environ, "MASTER_PORT")
    if not 0 < port < 2**16:
        raise UsageError(f"MASTER_PORT={port}, but a port is between 1 and 65535.")
    return environ["MASTER_ADDR"], port


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ[name]
    if not re.fullmatch(r"[0-9]{1,9}", value.strip()):
        raise UsageError(f"{name}={value!r} in the environment, but it must be a whole number, 0 or more.")
    return int(value)


def _incomplete(there: str, missing: str) -> str:
    return (
        f"{there} is set in the environment, but {missing} is not. torchrun, mpirun and srun set all that is needed; "
        "who exports variables by hand must export RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and "
        "MASTER_PORT. Export what is missing, or unset what is left of an earlier start."
    )
