"""Runs as jobs of a real Slurm, for the tests: two nodes with two processes each, which note what they are doing."""

import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from cluster import Cluster

import hpclr
from hpclr.parallel.watch.outcome import read_outcome
from hpclr.slurm import client
from hpclr.slurm.script import BatchScript

sys.path.append(str(Path(__file__).parents[1] / "training"))
from training_helpers import records, run_file

LAUNCHERS = ("srun", "torchrun", "mpirun")
LIMIT = 120.0  # seconds for what takes ten to thirty
AS_ROOT = {f"{mpi}_ALLOW_RUN_AS_ROOT{confirm}": "1" for mpi in ("OMPI", "PRTE") for confirm in ("", "_CONFIRM")}
STEPS = 120

# A model whose steps take PAUSE seconds, and which does what TROUBLE says at this step of the job's first start, or of
# every start. What samples a process takes for which step, and when, it notes in the directory NOTES.
STEADY = """
import json, os, signal, time
from pathlib import Path
from torch import nn
from hpclr.data.stream import BatchStream

RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
RANK = next((os.environ[name] for name in RANKS if name in os.environ), "0")
START = os.environ.get("SLURM_JOB_ID", "local"), os.environ.get("SLURM_RESTART_COUNT", "0")
WHAT, STEP, *WHEN = os.environ.get("TROUBLE", "nothing:0").split(":")
ALWAYS = WHEN == ["always"]

class Net(nn.Sequential):
    step = -1  # a look at the smallest piece comes first

    def forward(self, x):
        self.step += self.training
        if self.training:
            time.sleep(float(os.environ.get("PAUSE", "0")))
        if self.step == int(STEP) and RANK == "1" and (ALWAYS or START[1] == "0"):
            if WHAT == "bug":
                raise ValueError("a bug in the model")
            if WHAT == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

def make():
    return Net(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.1), nn.ReLU(), nn.Linear(32, 10))

take = BatchStream.__next__

def noting(self):
    step, batch = self._step, take(self)
    if "NOTES" in os.environ:
        with open(Path(os.environ["NOTES"], "-".join([*START, RANK])), "a") as file:
            samples = batch.indices.tolist() if batch.weight else []
            print(json.dumps({"step": step, "samples": samples, "time": time.time()}), file=file)
    return batch

BatchStream.__next__ = noting
"""


class Note(NamedTuple):
    """What a process took for a step."""

    step: int
    samples: list[int]
    time: float


@dataclass
class Jobs:
    """Runs as jobs of two nodes with two processes each."""

    cluster: Cluster
    path: Path
    digits: Path
    name: str = "run"

    @property
    def run(self) -> Path:
        return self.path / "runs" / self.name

    @property
    def file(self) -> Path:
        return self.run / "submission" / "run.yaml"

    def submit(self, script: BatchScript, options: tuple[str, ...] = (), **sections: object) -> str:
        """Puts everything where `hpclr submit` does, and submits it."""
        self.write(**sections)
        job = self.run / "submission" / "job.sh"
        job.write_text(self.placed(script).text())
        return client.submit(job, options)

    def write(self, **sections: object) -> None:
        """The run directory, with the run file and the code."""
        submission = self.run / "submission"
        if not submission.exists():
            (submission / "code").mkdir(parents=True)
            (submission / "code" / "hpclr").symlink_to(Path(hpclr.__file__).parent)
            (submission / "code" / "steady.py").write_text(STEADY)
            (self.run / "logs").mkdir()
            (self.run / "logs" / "notes").mkdir()
        sections = {"model": {"target": "steady:make"}, "validation": {"every_steps": 50}} | sections
        sections["train"] = {"steps": STEPS} | sections.get("train", {})
        self.file.write_text(json.dumps(run_file(self.digits, name=self.name, **sections)))

    def placed(self, script: BatchScript) -> BatchScript:
        submission = self.run / "submission"
        return replace(
            script,
            run=self.run,
            program=["hpclr", "train", "--runs-dir", str(self.run.parent), str(self.file)],
            python=sys.executable,
            code=submission / "code",
            mpirun=str(Path(sys.executable).with_name("mpirun")),
            environment={"OMP_NUM_THREADS": "1", "NOTES": str(self.run / "logs" / "notes")}
            | AS_ROOT
            | dict(script.environment),
        )

    def ends(self, job: str, state: str, limit: float = LIMIT) -> client.JobDetails:
        """Waits for the end of a job, which must be this one."""
        found = self.cluster.wait(job, limit=limit)
        assert found.state == state, f"{found}\n{self.said(job)}"
        return found

    def reference(self, script: BatchScript, **sections: object) -> Path:
        """The same run, undisturbed."""
        self.ends(self.submit(script, **sections), "COMPLETED")
        return self.run.rename(self.path / "reference")

    def local(self) -> Path:
        """The same run on this machine, with as many processes."""
        runs = self.path / "local"
        line = [sys.executable, "-m", "hpclr", "launch", "-n", "4", "--runs-dir", runs, self.file]
        own = {"PYTHONPATH": str(self.file.parent / "code"), "OMP_NUM_THREADS": "1"}
        subprocess.run(line, env=os.environ | own, check=True, capture_output=True, timeout=LIMIT)
        return runs / self.name

    def said(self, job: str) -> str:
        return "".join((self.run / "logs" / f"{job}_0_log.{end}").read_text() for end in ("out", "err"))

    def await_step(self, step: int) -> None:
        end = time.monotonic() + LIMIT
        while not (self.run / "metrics.jsonl").exists() or len(records(self.run, "train")) < step:
            assert time.monotonic() < end, f"step {step} is not reached"
            time.sleep(0.05)

    def codes(self) -> list[int | None]:
        """How the attempts ended."""
        found = [read_outcome(path) for path in sorted((self.run / "logs").glob("attempt-*"))]
        return [None if outcome is None else outcome.code for outcome in found]

    def notes(self) -> list[list[Note]]:
        """What the processes of each start noted, in the order in which the starts began."""
        starts: dict[str, list[Note]] = {}
        for path in (self.run / "logs" / "notes").iterdir():
            found = [Note(**json.loads(line)) for line in path.read_text().splitlines()]
            starts.setdefault(path.name.rpartition("-")[0], []).extend(found)
        return sorted(starts.values(), key=lambda start: min(note.time for note in start))

    def assert_each_sample_once(self) -> None:
        """In what counts of each epoch, that is, what the last start took that came to a step; and one at a time."""
        starts = self.notes()
        for earlier, later in itertools.pairwise(starts):
            assert max(note.time for note in earlier) < min(note.time for note in later)
        taken: dict[int, list[int]] = {}
        for start in starts:
            for step in {note.step for note in start}:
                taken[step] = [sample for note in start if note.step == step for sample in note.samples]
        epochs: dict[int, list[int]] = {}
        for record in records(self.run, "train"):
            epochs.setdefault(record["epoch"], []).extend(taken.pop(record["step"] - 1))
        assert not taken
        *whole, last = (sorted(epoch) for epoch in epochs.values())
        assert len(whole) > 3
        assert all(epoch == list(range(len(whole[0]))) for epoch in whole)
        assert len(set(last)) == len(last)


def script(launcher: str, *, pause: float = 0.02, trouble: str = "nothing:0", **more) -> BatchScript:
    environment = {"PAUSE": str(pause), "TROUBLE": trouble}
    run = ("run", Path("/"), [], launcher)
    return BatchScript(*run, nodes=2, processes=2, **({"time": "00:10:00", "environment": environment} | more))
