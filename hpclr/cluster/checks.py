"""What can be found out about a job before it waits for hours: without a GPU, and as far as possible without Slurm."""

import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

from hpclr.cluster import container, profiles
from hpclr.cluster.queued import Jobs, is_over, job_numbers, owner_of, queued, script_of
from hpclr.cluster.record import submitted
from hpclr.cluster.snapshot import code_size
from hpclr.config import RunFile, differences, load_run_file
from hpclr.config.schema import Oialr
from hpclr.data.dataset import Dataset
from hpclr.data.file import DatasetFile
from hpclr.errors import UsageError
from hpclr.slurm import client
from hpclr.slurm.script import BatchScript
from hpclr.training.demands import check_demands
from hpclr.training.lock import holder
from hpclr.training.owner import fate_of, this_process
from hpclr.training.run_directory import RunDirectory

_LAUNCHERS = {"srun": "slurm", "torchrun": "torchrun", "mpirun": "mpi"}  # as parallel.launcher calls them
_FOR_EVER = ("unlimited", "infinite")
_SPARE = 2  # checkpoints beyond `keep`: the best, and the one that is being written


class Finding(NamedTuple):
    """What a check has found.

    Attributes:
        what: was looked at, in a word.
        text: the result.
        sure: False if somebody should read it: it could not be checked here, or may not be meant.
    """

    what: str
    text: str
    sure: bool = True


def examine(looks: Sequence[Callable[[], Finding]], where: str) -> tuple[Finding, ...]:
    """The results of checks, all of which are made.

    Raises:
        UsageError: with every fault that was found.
    """
    findings: list[Finding] = []
    faults: list[str] = []
    for look in looks:
        try:
            findings.append(look())
        except UsageError as error:
            faults.append(str(error))
        except PermissionError as error:
            faults.append(f"{error.filename}: it cannot be looked at: {error.strerror}. Make it readable, or move it.")
    if faults:
        raise UsageError("\n".join([f"{len(faults)} faults in {where}:", *faults] if faults[1:] else faults))
    return tuple(findings)


# --- the run and its directory


def look_at_directory(run: RunFile, path: Path) -> Finding:
    """Whether a job may train, or go on with, this run there."""
    directory = RunDirectory(path)
    directory.check_place()
    if not os.access(_existing(path), os.W_OK | os.X_OK):
        raise UsageError(
            f"the run directory {path} cannot be made or written to: {_existing(path)} is not writable. Let runs live "
            "elsewhere, with --runs-dir or HPCLR_RUNS."
        )
    if not directory.exists:
        return Finding("run", f"{path}: new")
    stored = load_run_file(directory.run_file)
    if listed := differences(stored, run):
        raise UsageError(
            f"{path} holds a run of another run file. What differs: {'; '.join(listed)}. Give this run a name of its "
            "own (name=…), take the changes back, or move the directory away to start over."
        )
    require_unfinished(run, path)
    steps = [_step(file) for file in _saved(path)]
    return Finding("run", f"{path}: goes on from step {max(steps)}" if steps else f"{path}: starts again, none saved")


def require_unfinished(run: RunFile, path: Path) -> None:
    """Refuses a run that has nothing left to do.

    Raises:
        UsageError: if it is finished.
    """
    directory = RunDirectory(path)
    if directory.exists and directory.summary.exists() and _length(load_run_file(directory.run_file)) == _length(run):
        raise UsageError(
            f"{path}: this run is finished. `hpclr summary {path}` shows its results; more steps (train.epochs, "
            "train.steps) make it longer, another name (name=…) makes it another run."
        )


def look_at_use(path: Path) -> Finding:
    """Whether a job or a process has the run directory already."""
    jobs = _unfinished_jobs(path)
    if jobs:
        raise in_hand(path, jobs)
    owner = holder(path)
    fate = None if owner is None else fate_of(owner, this_process())
    if fate is not None and fate.gone is False:
        raise UsageError(f"{path} is in use by {owner}: {fate.why}. Wait for it to end, or end it with `hpclr stop`.")
    if fate is not None and fate.gone is None:
        doubt = "if it is still alive, which cannot be told from here, the job will not train"
        return Finding("use", f"{path} is in use by {owner}; {doubt}", sure=False)
    if jobs is None:
        return Finding(
            "use", "whether the jobs that it has had are over is not known: Slurm cannot be asked", sure=False
        )
    return Finding("use", "nobody else trains there")


def _unfinished_jobs(run: Path) -> Jobs | None:
    """The jobs of a run that wait or run; None if Slurm cannot be asked."""
    if not submitted(run) and not script_of(run).exists():
        return {}
    if not client.is_installed():
        return None
    try:
        known = queued({run: job_numbers(run, owner_of(run))})[run]
    except client.SlurmError:
        return None
    return _unfinished(known)


def require_no_job(*runs: Path) -> None:
    """Refuses runs that have a job, on Slurm's word; without its commands there is none.

    Raises:
        UsageError: if one has.
        SlurmError: if Slurm does not answer.
    """
    if not client.is_installed():
        return
    for run, known in queued({run: job_numbers(run, owner_of(run)) for run in runs}, surely=True).items():
        if jobs := _unfinished(known):
            raise in_hand(run, jobs)


def _unfinished(jobs: Jobs) -> Jobs:
    return {number: job for number, job in jobs.items() if not is_over(job)}


def in_hand(path: Path, jobs: Jobs) -> UsageError:
    """That a run has jobs already."""
    listed = ", ".join(f"{number} ({job.state.lower()})" for number, job in jobs.items())
    name = shlex.quote(str(path))
    waits = all(job.state == "PENDING" for job in jobs.values())
    stop = f"`hpclr stop {name}` lets it save and end, `hpclr cancel {name}` ends it at once"
    advice = f"`hpclr cancel {name}` takes it out of the queue" if waits else stop
    return UsageError(f"{path}: this run has a job that waits or runs: {listed}. {advice}.")


def look_at_space(run: RunFile, path: Path) -> Finding:
    """Whether the checkpoints that are still to come have room; known only once there is one."""
    free, saved = shutil.disk_usage(_existing(path)).free, _saved(path)
    there = f"{free / 1e9:,.1f} GB free for checkpoints"
    if not saved:
        return Finding("space", f"{there} (how large one is shows at the first save)")
    size = max(file.stat().st_size for file in saved)
    needed = size * max(1, run.checkpoint.keep + _SPARE - len(saved))
    if free < needed:
        raise UsageError(
            f"{path}: {free / 1e6:,.0f} MB are free there, but checkpoints need {needed / 1e6:,.0f} MB more "
            f"(checkpoint.keep {run.checkpoint.keep} and {_SPARE} others, of {size / 1e6:,.0f} MB each). Make room, or "
            "lower checkpoint.keep."
        )
    return Finding("space", f"{there}, {needed / 1e9:,.1f} GB needed at most")


# --- data and model


class _Header(DatasetFile):
    """A dataset file whose values are not read here, however it was written: the job does that."""

    def _scan(self) -> str:
        return ""


def data_files(run: RunFile) -> list[Path]:
    """The files of a run's data, one or several."""
    path = run.data.path
    return [Path(path)] if isinstance(path, str) else [Path(one) for one in path]


def look_at_data(run: RunFile) -> Finding:
    """Whether the data is there and fits the run file, by what its header says."""
    with ExitStack() as opened:
        files = [opened.enter_context(closing(_Header(path))) for path in data_files(run)]
        dataset = Dataset(files)
        _check_data(run, dataset)
    shape = " × ".join(map(str, dataset.sample_shape))
    what = "training samples" if dataset.task == "classification" else "rows to train on"
    count = f"{dataset.sizes['train']:,} {what}{shape and f', {shape}'}"
    where = str(files[0].path) if len(files) == 1 else f"{files[0].path} and {len(files) - 1} more"
    later = "" if dataset.trusted else "; not from `hpclr data prepare`, so each start of the job reads it all first"
    return Finding("data", f"{where}: {count}{later}", sure=dataset.trusted)


def _check_data(run: RunFile, dataset: Dataset) -> None:
    check_demands(run, dataset.task)
    size, batch = _samples(run, dataset), run.data.batch_size
    if batch > size:
        raise UsageError(f"data.batch_size is {batch}, but {dataset.path} has {size} training samples; make it smaller")
    if run.validation.patience is not None and "valid" not in dataset.sizes:
        raise UsageError(
            f"validation.patience asks for early stopping, but {dataset.path} has no validation split; prepare the "
            "data with --valid-fraction, or take validation.patience out"
        )


def _samples(run: RunFile, dataset: Dataset) -> int:
    """Training samples; of time series and text at most so many, as the windows of each file begin a stride apart."""
    rows, context = dataset.sizes["train"], run.data.context
    if context is None:
        return rows
    length = context + (run.data.horizon or 1)
    stride = run.data.stride or (1 if run.data.horizon else context)
    if rows < length:
        raise UsageError(
            f"data.context and what follows it are {length} rows, but the training split of {dataset.path} has {rows}"
        )
    return (rows - length) // stride + 1


def look_at_weights(file: str) -> Finding:
    """Whether the weights to start from are there."""
    if not os.access(file, os.R_OK):
        raise UsageError(f"model.weights: {file} cannot be read; check the path and its permissions")
    return Finding("weights", file)


def look_at_code(code: Sequence[Path]) -> Finding:
    """Whether the code that is not installed can be copied."""
    size = code_size(code)
    listed = ", ".join(piece.name for piece in code)
    return Finding("code", f"copied: {listed} ({size / 1e6:.1f} MB)" if code else "all installed, nothing is copied")


def look_at_changes(changes: bytes | None) -> Finding:
    """Whether it is known how the code differs from its commits."""
    if changes is None:
        return Finding("changes", "how the code differs from its commit is not known: git does not tell", sure=False)
    return Finding("changes", "recorded, in changes.diff" if changes else "none to record")


def look_at_image(image: str, runtime: container.Runtime, binds: Sequence[str]) -> Finding:
    """Whether the container's image is there, and of the kind that its runtime takes."""
    wanted = "directory" if runtime in ("bubblewrap", "charliecloud") else "file or directory"
    if not os.path.exists(image):
        raise UsageError(f"--container {image}: there is no such image here; give the path of a {wanted}")
    if wanted == "directory" and not os.path.isdir(image):
        raise UsageError(f"--container {image}: {runtime} needs a directory, found a file; unpack the image first")
    bound = [container.parse_bind(text) for text in binds]
    doubts = [f"{bind.source}, to be bound, is not here" for bind in bound if not os.path.exists(bind.source)]
    if os.path.isdir(image) and not any(map(os.path.lexists, _pythons(image, bound))):
        doubts.append(f"there is no python in it (sought in {container.IMAGE_PATH})")
    return Finding("image", "; ".join([image, *doubts]), sure=not doubts)


def _pythons(image: str, binds: Sequence[container.Bind]) -> Iterator[str]:
    """Where the image's Python may be: in it, or in what is bound over it."""
    for directory in container.IMAGE_PATH.split(":"):
        place = f"{directory}/python"
        yield image + place
        yield from (
            bind.source + place.removeprefix(bind.target.rstrip("/"))
            for bind in binds
            if Path(place).is_relative_to(bind.target)
        )


# --- processes


def look_at_processes(run: RunFile, script: BatchScript) -> Finding:
    """Whether the processes can share the batch and the GPUs, and meet."""
    total, batch = script.nodes * script.processes, run.data.batch_size
    if batch % total:
        nearest = max(1, round(batch / total)) * total
        raise UsageError(
            f"data.batch_size is {batch}, which {total} processes ({script.nodes} × {script.processes}) cannot share "
            "equally; it counts the samples of an optimiser step over all of them. Make it a multiple of "
            f"{total}, such as {nearest}, or ask for another number of processes."
        )
    _check_gpus(run, script)
    _check_launcher(run, script)
    each = [f"{batch // total} samples of a batch", f"{script.cpus} CPU{'s' * (script.cpus > 1)}"]
    each += ["a GPU"] if script.gpus else []
    count = f"{script.nodes} × {_count(script.processes, 'process')} by {script.launcher}"
    idle = script.gpus > 0 and run.train.device == "cpu"
    doubt = "; train.device is cpu: the GPUs would be idle, leave out --gpus-per-node" if idle else ""
    return Finding("processes", f"{count}, each with {', '.join(each)}{doubt}", sure=not idle)


def _count(number: int, word: str) -> str:
    """`1 GPU`, `2 processes`."""
    plural = f"{word}es" if word.endswith("s") else f"{word}s"
    return f"{number:,} {word if number == 1 else plural}"


def _check_gpus(run: RunFile, script: BatchScript) -> None:
    processes, gpus, device = script.processes, script.gpus, run.train.device
    if gpus and gpus != processes and device != "cpu":
        raise UsageError(
            f"{_count(processes, 'process')} and {_count(gpus, 'GPU')} per node: there must be one GPU for each "
            "process. Give --gpus-per-node alone, or the same number with --ntasks-per-node."
        )
    for key, value, wants in (("train.device", device, "cuda"), ("parallel.backend", run.parallel.backend, "nccl")):
        if value == wants and not gpus:
            raise UsageError(f"{key} is {wants}, but the job has no GPUs; give --gpus-per-node N, or set {key}=auto")


def _check_launcher(run: RunFile, script: BatchScript) -> None:
    asked, given = run.parallel.launcher, _LAUNCHERS[script.launcher]
    if asked not in ("auto", given):
        raise UsageError(
            f"parallel.launcher is {asked}, but the processes are started by {script.launcher}: set "
            f"parallel.launcher=auto or {given}, or choose another one with --launcher"
        )
    has_mpi = script.launcher == "mpirun" or (script.launcher == "srun" and script.mpi != "none")
    if isinstance(run.method, Oialr) and run.method.svd == "heat" and not has_mpi:
        raise UsageError(
            "method.svd is heat, which needs MPI: start the processes with --launcher mpirun, or by srun with a "
            "profile that says `mpi: pmix`"
        )


# --- Slurm


def look_at_time(script: BatchScript) -> Finding:
    """Whether the limit leaves time for more than to save."""
    limit = None if script.time is None else client.seconds_of(script.time)
    if script.time is not None and limit is None and script.time.lower() not in _FOR_EVER:
        raise UsageError(f"--time {script.time!r}: expected minutes, HH:MM:SS or D-HH:MM:SS, such as 08:00:00")
    if limit is not None and limit <= script.warning:
        raise UsageError(
            f"--time {script.time} is {limit} s, but the run is to save {script.warning} s before the end; give the "
            "job more time, or set slurm.margin to fewer seconds"
        )
    if script.time is None:
        return Finding("time", "no --time: the job gets the partition's default", sure=False)
    return Finding("time", f"{script.time}; the run is asked to save {script.warning} s before the end")


def look_at_partition(
    script: BatchScript, names: Sequence[str], profile: profiles.Profile, known: Sequence[client.Partition] | None
) -> Finding:
    """Whether a partition takes such a job.

    Args:
        script: the job.
        names: of the partitions that it may run in; none: the default one.
        profile: what is written down of the cluster.
        known: what Slurm says of it; None if it cannot be asked.
    """
    by_name = {partition.name: partition for partition in known or ()}
    names = names or [partition.name for partition in by_name.values() if partition.default]
    if known is not None and (unknown := [name for name in names if name not in by_name]):
        raise UsageError(f"there is no partition {unknown[0]!r} here; there are {', '.join(by_name) or 'none'}")
    excesses = [_excess(script, name, _limits(by_name.get(name), profile.partitions.get(name))) for name in names]
    if names and all(excesses):
        raise UsageError("; ".join(filter(None, excesses)))
    listed = ", ".join(names) or "the default one"
    if known is None:
        return Finding("partition", f"{listed}; its limits are not checked, as Slurm cannot be asked here", sure=False)
    down = [name for name in names if not by_name[name].up]
    return Finding("partition", listed + (f"; {', '.join(down)} starts no jobs now" if down else ""), sure=not down)


def _limits(found: client.Partition | None, written: profiles.Partition | None) -> dict[str, list[int | None]]:
    """What Slurm and the profile say of a partition."""
    what = ("nodes", "GPUs on a node", "CPUs on a node", "seconds", "MB of memory on a node")
    limits: dict[str, list[int | None]] = {name: [] for name in what}
    if found is not None:
        own = (found.max_nodes, found.nodes), (found.gpus,), (found.cpus,), (found.max_time,), (found.memory or None,)
        for values, more in zip(limits.values(), own, strict=True):
            values += more
    if written is not None:
        limits["GPUs on a node"].append(written.gpus_per_node)
        limits["seconds"].append(None if written.time is None else client.seconds_of(written.time))
    return limits


def _excess(script: BatchScript, name: str, limits: dict[str, list[int | None]]) -> str:
    """What is more than a partition has; "" if nothing is."""
    time = None if script.time is None else client.seconds_of(script.time)
    asked = (script.nodes, script.gpus, script.processes * script.cpus, time or 0, _memory(script))
    beyond = [
        f"{number:,} {what} (at most {least:,})"
        for number, (what, found) in zip(asked, limits.items(), strict=True)
        if number > (least := min((limit for limit in found if limit is not None), default=number))
    ]
    return f"partition {name} does not give a job {' or '.join(beyond)}" if beyond else ""


def _memory(script: BatchScript) -> int:
    """MB on a node, by --mem; 0 if it says nothing, or all that there is."""
    asked = next((word.partition("=")[2] for word in script.options if word.startswith("--mem=")), "")
    found = re.fullmatch(r"([0-9]{1,15})([KMGT]?)B?", asked.upper())
    return int(int(found[1]) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[found[2]]) if found else 0


def look_at_account(given: bool, required: bool) -> Finding:
    """Whether an account is named where one must be."""
    if required and not given:
        raise UsageError("this cluster's jobs must name whose time they use: give --account NAME")
    return Finding("account", "given" if given else "the default one")


def look_at_profile(name: str, profile: profiles.Profile) -> Finding:
    """Whether what is known of the cluster has stood the test."""
    doubt = "" if profile.tried else ", which has not been tried on that cluster yet (tried: false)"
    return Finding("profile", name + doubt, sure=profile.tried)


def partitions_here() -> list[client.Partition] | None:
    """What Slurm says of its partitions; None if it cannot be asked, now or here."""
    try:
        return client.partitions() if client.is_installed() else None
    except client.SlurmError:
        return None


# --- files


def _existing(path: Path) -> Path:
    """The path, or the nearest above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def _saved(path: Path) -> list[Path]:
    """The checkpoints that were completed."""
    found = RunDirectory(path).checkpoints.glob("step-*.h5")
    return [file for file in found if _step(file) >= 0 and Path(f"{file}.sha256").exists()]


def _step(file: Path) -> int:
    number = file.name[len("step-") : -len(".h5")]
    return int(number) if number.isascii() and number.isdecimal() else -1


def _length(run: RunFile) -> tuple[int | None, int | None, int | None]:
    return run.train.steps, run.train.epochs, run.validation.patience
