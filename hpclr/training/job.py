"""The processes that train a run together: where `parallel`, `slurm` and the run directory meet."""

import hashlib
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

import hpclr
from hpclr.config import RunFile, dump
from hpclr.config.schema import Oialr, Target
from hpclr.data.staging import Progress, stage
from hpclr.errors import UsageError
from hpclr.output import say
from hpclr.parallel import mpi
from hpclr.parallel.group import Group, join
from hpclr.parallel.meeting.layout import ALONE, Layout, check_gpus
from hpclr.parallel.meeting.proof import Statement, agree, share_secret
from hpclr.parallel.meeting.rendezvous import meet
from hpclr.parallel.watch.attempt import attempt_directory, attempts, next_attempt
from hpclr.parallel.watch.diagnosis import post_mortem
from hpclr.parallel.watch.heartbeat import Heartbeat
from hpclr.parallel.watch.participation import take_part
from hpclr.training.environment import choose_device, use_threads
from hpclr.training.processes import slurm_gpus
from hpclr.training.progress import SECONDS_BETWEEN_LINES
from hpclr.training.run_directory import RunDirectory, writing

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_PATIENCE = 10.0  # times parallel.timeout: what a collective may take; the watch over the processes ends them sooner


@dataclass
class Job:
    """The processes of a run, as one of them sees them.

    Attributes:
        layout: which of them this is.
        group: all of them.
        device: where this one computes.
        threads: its CPU threads.
        hosts: the host of each, by rank.
    """

    layout: Layout
    group: Group
    device: torch.device
    threads: int
    hosts: list[str] = field(default_factory=lambda: [platform.node()])
    circle: "Circle | None" = None
    heart: Heartbeat | None = None

    def doing(self, what: str, step: int | None = None, *, waiting: bool = False) -> None:
        """Says what this process does from here on, for whoever wonders why it takes so long.

        Args:
            what: completes "it was …".
            step: of the run.
            waiting: whether it needs the others.
        """
        if self.heart is not None:
            self.heart.phase(what, step, waiting=waiting)

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Compares facts over all processes, each of which proves that it belongs to this run and attempt.

        Raises:
            UsageError: on all of them; names the ranks that differ.
        """
        if self.circle is not None:
            self.circle.agree(facts)

    @contextmanager
    def attempt(self, directory: RunDirectory, timeout: float) -> Iterator[None]:
        """Logs, heartbeats and the watch over the other processes while the block trains; records how it ends."""

        def make() -> int:
            with writing(directory.path):
                for earlier in attempts(directory.path)[-1:]:
                    post_mortem(attempt_directory(directory.path, earlier))  # its processes may not have had the time
                return next_attempt(directory.path)

        number = self.group.on_first(make)
        with take_part(
            attempt_directory(directory.path, number),
            rank=self.group.rank,
            world_size=self.group.size,
            host=platform.node(),
            timeout=timeout if self.group.size > 1 else math.inf,
        ) as self.heart:
            yield


@dataclass
class Circle:
    """What the processes that have met need in order to trust one another."""

    store: "Store"
    layout: Layout
    secret: bytes
    timeout: float
    rounds: int = 0

    def agree(self, facts: Mapping[str, str], own: Mapping[str, str] | None = None) -> list[Statement]:
        """Compares `facts`, and tells all what is each one's `own`; as `hpclr.parallel.meeting.proof.agree`."""
        self.rounds += 1
        return agree(
            self.store, self.layout, self.secret, f"agreement {self.rounds}", facts, self.timeout, own=own or {}
        )


def alone(run: RunFile) -> Job:
    """A job of this process only."""
    try:
        device = choose_device(run.train.device)
    except ValueError as error:
        raise UsageError(f"train: {error}") from error
    return Job(ALONE, Group(), device, use_threads(run.train.threads))


@contextmanager
def assembled(run: RunFile, directory: RunDirectory, layout: Layout) -> Iterator[Job]:
    """The processes of a job, once they have met and have proved that they belong together.

    Args:
        run: the run file.
        directory: of the run, which all processes see; while they meet it holds small files.
        layout: which process this is.

    Raises:
        UsageError: if they do not fit together, or do not work on the same; all processes raise it.
        RetryableError: if some do not come.
    """
    if layout.world_size == 1:
        yield alone(run)
        return
    _check_batch(run, layout)
    device = _device(run, layout)
    backend = _backend(run, device)
    with _place_to_meet(directory):
        circle = _meet(run, directory, layout)
        processes = _introduce(run, circle, device)
        _check_devices(processes)
        timeout = _PATIENCE * run.parallel.timeout
        group = join(circle.store, layout.rank, layout.world_size, backend=backend, timeout=timeout, device=device)
        threads = use_threads(run.train.threads, _sharers(processes, layout.rank))
        yield Job(layout, group, device, threads, [one.host for one in processes], circle)
        # after an error the process just ends: what the others owe it may be waited for in here
        group.barrier()
        if _needs_mpi(run):
            mpi.leave()
        dist.destroy_process_group()


def _meet(run: RunFile, directory: RunDirectory, layout: Layout) -> Circle:
    settings = run.parallel
    store = meet(
        layout,
        directory=directory.path,
        timeout=settings.timeout,
        interface=settings.interface,
        host_suffix=settings.host_suffix,
        keep_mpi=_needs_mpi(run),
    )
    secret = share_secret(store, layout, directory.path, settings.timeout)
    return Circle(store, layout, secret, settings.timeout)


def _introduce(run: RunFile, circle: Circle, device: torch.device) -> list[Statement]:
    """Every process says what it is about to do, and what with."""
    facts = {"run file": _sha256(dump(run).encode()), "code": _code(run), "torch": torch.__version__}
    return circle.agree(facts, {"cores": repr(sorted(os.sched_getaffinity(0))), "device": _identity(device)})


def _sharers(processes: list[Statement], rank: int) -> int:
    """How many processes may use the same cores as this one."""
    mine = processes[rank]
    return sum((one.host, one.own["cores"]) == (mine.host, mine.own["cores"]) for one in processes)


def _needs_mpi(run: RunFile) -> bool:
    return isinstance(run.method, Oialr) and run.method.svd == "heat"


@contextmanager
def _place_to_meet(directory: RunDirectory) -> Iterator[None]:
    """The run directory, in which processes meet; it goes again if the block fails before anything else is in it."""
    with writing(directory.path):
        directory.path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            directory.path.rmdir()
        raise


def _check_batch(run: RunFile, layout: Layout) -> None:
    size, processes = run.data.batch_size, layout.world_size
    if size % processes:
        nearest = max(1, round(size / processes)) * processes
        raise UsageError(
            f"data.batch_size is {size}, which {processes} processes cannot share equally; it counts the samples of an "
            f"optimiser step over all of them. Make it a multiple of {processes}, such as {nearest}, or start another "
            "number of processes."
        )


def _device(run: RunFile, layout: Layout) -> torch.device:
    index = check_gpus(layout, torch.cuda.device_count(), task_gpus=slurm_gpus(), wanted=run.train.device)
    return torch.device("cpu") if index is None else torch.device("cuda", index)


def _backend(run: RunFile, device: torch.device) -> str:
    asked = run.parallel.backend
    if asked == "nccl" and device.type != "cuda":
        raise UsageError("parallel.backend is nccl, which is for CUDA devices, but this run is on the CPU; use auto")
    return ("nccl" if device.type == "cuda" else "gloo") if asked == "auto" else asked


def _identity(device: torch.device) -> str:
    """What tells a device from all others; "" for a CPU, which processes may share."""
    if device.type != "cuda":
        return ""
    return f"{platform.node()} {torch.cuda.get_device_properties(device).uuid}"


def _check_devices(statements: list[Statement]) -> None:
    owners: dict[str, int] = {}
    for statement in statements:
        device = statement.own["device"]
        if device and device in owners:
            raise UsageError(
                f"ranks {owners[device]} and {statement.rank} on {statement.host} have the same GPU ({device}); there "
                "must be one for each process. Give the job as many GPUs on each node as it has processes there."
            )
        owners[device] = statement.rank


def _code(run: RunFile) -> str:
    """A digest of hpclr's own code, and of the module that a `target:` names."""
    digest = hashlib.sha256()
    for path in sorted(Path(hpclr.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    if isinstance(run.model, Target):
        spec = PathFinder.find_spec(run.model.target.partition(":")[0].partition(".")[0], ["", *sys.path])
        if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
            digest.update(Path(spec.origin).read_bytes())
    return digest.hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def on_this_node(run: RunFile, files: list[Path]) -> list[Path]:
    """The data where it is to be read: on a disk of this node, if the run file asks for it.

    Every process calls it; the first on a node copies, the others wait for it.
    """
    return files if run.data.stage is None else stage(files, Path(run.data.stage), progress=_line_now_and_then())


def _line_now_and_then() -> Progress:
    """Says how far the copying on this node is, if it takes long."""
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            say(f"{platform.node()} has copied {done / 1e6:,.0f} of {total / 1e6:,.0f} MB of data ({done / total:.0%})")

    return show
