"""Runs in several processes for the tests: by torchrun, mpirun and `hpclr launch`, or each as a task of srun.

Importing torch takes a process seconds, so tasks of srun are forked from a process that has done that and little
else. What they find is what srun leaves: variables, a shared directory, and no launcher that looks after them.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import Bench, Done, last_tree, records

from hpclr.parallel.watch.heartbeat import process_state, read_heartbeat

LIMIT = 60.0  # seconds: longer than anything here takes on a busy machine; what takes longer hangs
FLOAT64 = {"precision": "float64", "threads": 1}
HYGIENE = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI", "HPCLR_", "TORCHELASTIC_", "GROUP_")
LAUNCHERS = ("torchrun", "mpirun", "launch torchrun", "launch mpirun")
TASKS = """
import json, os, sys
import h5py, rich.progress, torch, torch._dynamo, torch.distributed, torch.nn.parallel
import hpclr.checkpoint, hpclr.config, hpclr.data, hpclr.methods, hpclr.models, hpclr.parallel.replica
# not hpclr.training: when the watch over the processes is imported, it notes who its parent is

def reply(value):
    print(json.dumps(value), flush=True)

def orders():
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        if isinstance(order, int):
            pid, status = os.waitpid(order, os.WNOHANG)
            reply(os.waitstatus_to_exitcode(status) if pid else None)
        elif (pid := os.fork()):
            reply(pid)
        else:
            return order

def become(order):
    os.setsid()
    for source, targets in ((os.devnull, [0]), (order["console"], [1, 2])):
        descriptor = os.open(source, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        for target in targets:
            os.dup2(descriptor, target)
    os.chdir(order["directory"])
    os.environ.clear()
    os.environ.update(order["environment"])
    exec(order["before"], {"__name__": "before"})
    from hpclr.cli import main
    sys.argv = ["hpclr", *order["arguments"]]
    main()

if (order := orders()) is not None:
    become(order)
"""

# A model that does what TROUBLE=what:rank:step says: in the forward pass of that step of this attempt, from 0, or
# (slow) of every step from that one on.
OWN = """
import os, signal, sys, time
import torch
from torch import nn

NAMES = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
RANK = next((os.environ[name] for name in NAMES if name in os.environ), "0")
WHAT, WHERE, STEP = os.environ.get("TROUBLE", "nothing:0:0").split(":")

class Net(nn.Sequential):
    steps = 0

    def forward(self, x):
        if self.training and torch.is_grad_enabled() and RANK == WHERE:
            if self.steps == int(STEP) or (WHAT == "slow" and self.steps > int(STEP)):
                self.trouble()
            self.steps += 1
        return super().forward(x)

    def trouble(self):
        print("trouble:", WHAT, flush=True)
        if WHAT == "slow":
            time.sleep(0.2)
        elif WHAT == "hang":
            time.sleep(1000)
        elif WHAT == "bug":
            raise ValueError("a bug in the model")
        elif WHAT == "exit":
            os._exit(3)
        elif WHAT == "flip":
            with torch.no_grad():
                next(self.parameters()).view(-1)[0] += 1e-3
        elif WHAT != "nothing":
            os.kill(os.getpid(), getattr(signal, WHAT))

def make(dropout=0.0):
    if WHAT == "refuse" and RANK == WHERE:
        raise RuntimeError("no licence here")
    parts = [nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 24), nn.ReLU()]
    return Net(*parts, nn.Linear(24, 10))
"""

# Each task notes the samples that it takes from its loader for each step, but those that only stand in.
OBSERVE = """
import json, os
from hpclr.data.stream import BatchStream

take = BatchStream.__next__

def observed(self):
    step, batch = self._step, take(self)
    with open(f"{os.environ['SEEN']}-{os.getpid()}.jsonl", "a") as file:
        print(json.dumps([step, batch.indices.tolist() if batch.weight else []]), file=file)
    return batch

BatchStream.__next__ = observed
"""


class Tasks:
    """A process that forks others."""

    def __init__(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        line = [sys.executable, "-c", TASKS]  # which looks for packages in the current directory, too
        self._process = subprocess.Popen(line, text=True, cwd=os.sep, env=environment(), **pipes)

    def start(self, **order: Any) -> int:
        """The pid of a new process."""
        return int(self._ask(order))

    def code(self, pid: int) -> int | None:
        """The exit code of a process that has been started; None while it runs. To be asked no more afterwards."""
        return self._ask(pid)

    def _ask(self, order: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        assert select.select([self._process.stdout], [], [], LIMIT)[0]
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def environment(**more: object) -> dict[str, str]:
    """This process's environment without what launchers have left in it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(HYGIENE)}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return kept | as_root | {"OMP_NUM_THREADS": "1", "PATH": path} | {k: str(v) for k, v in more.items()}


@dataclass
class Change:
    """What is different for one task of srun."""

    arguments: Sequence[object] = ()
    environment: Mapping[str, object] = field(default_factory=dict)
    before: str = ""
    directory: Path | None = None


class Started:
    """Processes of one start of a run."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.mark = uuid.uuid4().hex

    @property
    def attempt(self) -> Path:
        """The directory of the newest attempt."""
        return max((self.run / "logs").glob("attempt-*"))

    def outcome(self) -> dict[str, Any]:
        """What `exit.json` of the newest attempt says."""
        return dict(json.loads((self.attempt / "exit.json").read_text()))

    def log(self, rank: int) -> str:
        return (self.attempt / f"rank-{rank:04d}.log").read_text()

    def await_step(self, step: int) -> None:
        """Waits until the run has recorded a step."""
        deadline = time.monotonic() + LIMIT
        while not (self.run / "metrics.jsonl").exists() or len(records(self.run, "train")) < step:
            assert time.monotonic() < deadline, "the run does not get on"
            time.sleep(0.01)

    def pid(self, rank: int) -> int:
        """The process of a rank."""
        record = read_heartbeat(self.attempt / f"rank-{rank:04d}.heartbeat")
        assert record is not None
        return record.pid

    def left(self) -> list[int]:
        """Processes that this start has left behind, a moment after it has ended."""
        deadline = time.monotonic() + 10
        while (found := self._alive()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def _alive(self) -> list[int]:
        mark = f"HPCLR_TEST_MARK={self.mark}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes() and process_state(int(entry.name)):
                    found.append(int(entry.name))
        return found

    def kill(self) -> None:
        """Ends what is left."""
        for pid in self._alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class ByLauncher(Started):
    """Processes that a launcher has started."""

    def __init__(self, run: Path, line: Sequence[object], directory: Path, variables: Mapping[str, object]) -> None:
        super().__init__(run)
        self.process = subprocess.Popen(
            [str(word) for word in line],
            cwd=directory,
            env=environment(HPCLR_TEST_MARK=self.mark, **variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ended(self) -> Done:
        """How the launcher ended."""
        try:
            out, err = self.process.communicate(timeout=LIMIT)
        finally:
            self.process.kill()
        return Done(self.process.returncode, out, err)


class BySrun(Started):
    """Tasks of a step of srun."""

    def __init__(self, run: Path, tasks: Tasks, pids: list[int], consoles: list[Path]) -> None:
        super().__init__(run)
        self._tasks, self.pids, self.consoles = tasks, pids, consoles
        self._codes: dict[int, int] = {}

    def ended(self, *ranks: int) -> list[int]:
        """The exit codes of these tasks, or of all, by rank."""
        chosen = [self.pids[rank] for rank in ranks] or self.pids
        deadline = time.monotonic() + LIMIT
        while left := [pid for pid in chosen if self._code(pid) is None]:
            assert time.monotonic() < deadline, f"{left} of {self.pids} have not ended: {self.console}"
            time.sleep(0.02)
        return [self._codes[pid] for pid in chosen]

    @property
    def console(self) -> str:
        """What all tasks have written to the console."""
        return "".join(console.read_text() for console in self.consoles)

    def _code(self, pid: int) -> int | None:
        if pid not in self._codes and (code := self._tasks.code(pid)) is not None:
            self._codes[pid] = code
        return self._codes.get(pid)

    def _alive(self) -> list[int]:
        return [pid for pid in self.pids if process_state(pid)]


class Team:
    """Starts runs of a bench in several processes; none is left afterwards."""

    def __init__(self, tasks: Tasks, bench: Bench) -> None:
        self._tasks, self.bench = tasks, bench
        self._started: list[Started] = []

    def srun(
        self,
        size: int,
        *arguments: object,
        before: str = "",
        changes: Mapping[int, Change] | None = None,
        variables: Mapping[str, object] | None = None,
        **sections: Any,
    ) -> BySrun:
        """Starts a run as srun does, without any launcher around it.

        Args:
            size: how many tasks.
            arguments: of `hpclr train`, after the run file.
            before: Python code that each task runs first.
            changes: rank → what is different there.
            variables: of the environment.
            sections: of the run file.
        """
        file, number, pids = self.bench.write(**sections), len(self._started), []
        consoles = [self.bench.path / f"console-{number}-{rank}" for rank in range(size)]
        for rank, console in enumerate(consoles):
            change = (changes or {}).get(rank, Change())
            pid = self._tasks.start(
                arguments=["train", str(file), *map(str, [*arguments, *change.arguments])],
                environment=environment(**_of_srun(rank, size, number), **(variables or {}), **change.environment),
                before=before + change.before,
                directory=str(change.directory or self.bench.path),
                console=str(console),
            )
            pids.append(pid)
        return self._kept(BySrun(self.bench.run, self._tasks, pids, consoles))

    def launch(
        self,
        launcher: str,
        size: int,
        *arguments: object,
        variables: Mapping[str, object] | None = None,
        **sections: Any,
    ) -> ByLauncher:
        """Starts a run by one of LAUNCHERS."""
        file = self.bench.write(**sections)
        line = [*_line(launcher, size), file, *arguments]
        return self._kept(ByLauncher(self.bench.run, line, self.bench.path, variables or {}))

    def _kept(self, started: Any) -> Any:
        self._started.append(started)
        return started

    def close(self) -> None:
        for started in self._started:
            started.kill()
        for started in self._started:
            if isinstance(started, ByLauncher):
                started.process.kill()
                started.process.wait()


@pytest.fixture(scope="session", name="tasks")
def the_tasks():
    """What forks tasks, for all tests together."""
    found = Tasks()
    yield found
    found.close()


@pytest.fixture(name="team")
def the_team(tasks, bench):
    """Runs of the bench in several processes."""
    found = Team(tasks, bench)
    yield found
    found.close()


def _of_srun(rank: int, size: int, number: int) -> dict[str, object]:
    """What Slurm 22.05 tells a task, as far as it matters."""
    return {
        "SLURM_JOB_ID": 4711,
        "SLURM_NNODES": 1,
        "SLURM_NTASKS": size,
        "SLURM_STEP_ID": number,
        "SLURM_STEP_NUM_NODES": 1,
        "SLURM_STEP_NUM_TASKS": size,
        "SLURM_STEP_TASKS_PER_NODE": size,
        "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank,
        "SLURM_NODEID": 0,
    }


def _line(launcher: str, size: int) -> list[object]:
    hpclr = [sys.executable, "-m", "hpclr"]
    if launcher == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        return [*torchrun, "-m", "hpclr", "train"]
    if launcher == "mpirun":
        return ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", size, *hpclr, "train"]
    return [*hpclr, "launch", "-n", size, "--launcher", launcher.split()[1]]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The dense weights of the newest checkpoint: U Σ Vᵀ where a layer is low-rank."""
    found = {key[7:]: value for key, value in last_tree(run).items() if key.startswith("/model/")}
    for name, core in [key.rsplit(".", 1) for key in found if key.endswith((".sigma", ".s"))]:
        u, sigma, vh = (found.pop(f"{name}.{part}") for part in ("u", core, "vh"))
        found[f"{name}.weight"] = (u * sigma if sigma.ndim == 1 else u @ sigma) @ vh
    return found


def distance(one: Path, other: Path) -> float:
    """The norm of the difference between all weights of two runs."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(value.dtype == torch.float64 for value in a.values())
    return float(torch.cat([(a[name] - b[name]).flatten() for name in a]).norm())


def ranks(run: Path) -> list[tuple[int, dict[str, int]]]:
    """The ranks of all layers at each check."""
    return [(record["step"], record["ranks"]) for record in records(run, "check")]


def assert_same_result(one: Path, other: Path) -> None:
    """Equal but for rounding: the weights, the ranks at every check, the loss of every step, the scores."""
    assert distance(one, other) < 1e-6
    assert ranks(one) == ranks(other)
    for x, y in zip(records(one, "train", "valid"), records(other, "train", "valid"), strict=True):
        assert x["step"] == y["step"]
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-6)


def errors(text: str) -> list[str]:
    """The messages of hpclr on a console that say what has failed."""
    return [line for line in text.splitlines() if line.startswith("hpclr: ") and "warning" not in line]


def seen(bench: Bench, name: str) -> dict[int, list[int]]:
    """What OBSERVE has noted under a name: step → the samples of all tasks, in rising order."""
    found: dict[int, list[int]] = {}
    for path in bench.path.glob(f"{name}-*.jsonl"):
        for line in path.read_text().splitlines():
            step, samples = json.loads(line)
            found[step] = sorted(found.get(step, []) + samples)
    return found


def own_model(bench: Bench, **arguments: object) -> dict[str, object]:
    """The model of OWN, for a run file."""
    (bench.path / "own.py").write_text(OWN)
    return {"target": "own:make", "args": arguments}
