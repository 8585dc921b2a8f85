"""Runs as jobs of a real Slurm: submitted, stopped, requeued, resumed, failed; the results compared to the bit."""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cluster import Cluster

import hpclr
from hpclr.parallel.watch.outcome import read_outcome
from hpclr.slurm import client
from hpclr.slurm.script import BatchScript

sys.path.append(str(Path(__file__).parents[1] / "training"))
from training_helpers import assert_same_run, records, run_file
from training_helpers import hpclr as command

LAUNCHERS = ("srun", "torchrun", "mpirun")
LIMIT = 120.0  # seconds for what takes ten to thirty
AS_ROOT = {f"{mpi}_ALLOW_RUN_AS_ROOT{confirm}": "1" for mpi in ("OMPI", "PRTE") for confirm in ("", "_CONFIRM")}
STEPS = 120

# A model whose steps take PAUSE seconds, and which does what TROUBLE says at this step of the job's first start.
STEADY = """
import os, signal, time
from torch import nn

RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
RANK = next(os.environ[name] for name in RANKS if name in os.environ)
WHAT, STEP = os.environ.get("TROUBLE", "nothing:0").split(":")

class Net(nn.Sequential):
    step = -1  # a look at the smallest piece comes first

    def forward(self, x):
        self.step += self.training
        if self.training:
            time.sleep(float(os.environ.get("PAUSE", "0")))
        if self.step == int(STEP) and RANK == "1" and "SLURM_RESTART_COUNT" not in os.environ:
            if WHAT == "bug":
                raise ValueError("a bug in the model")
            if WHAT == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

def make():
    return Net(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.1), nn.ReLU(), nn.Linear(32, 10))
"""


@dataclass
class Jobs:
    """Runs as jobs of two nodes with two processes each."""

    cluster: Cluster
    path: Path
    digits: Path

    @property
    def run(self) -> Path:
        return self.path / "runs" / "run"

    def submit(self, script: BatchScript, options: tuple[str, ...] = (), **sections: object) -> str:
        """Puts everything where `hpclr submit` does, and submits it."""
        submission = self.run / "submission"
        if not submission.exists():
            (submission / "code").mkdir(parents=True)
            (submission / "code" / "hpclr").symlink_to(Path(hpclr.__file__).parent)
            (submission / "code" / "steady.py").write_text(STEADY)
            (self.run / "logs").mkdir()
        sections = {"model": {"target": "steady:make"}, "validation": {"every_steps": 50}} | sections
        sections["train"] = {"steps": STEPS} | sections.get("train", {})
        (submission / "run.yaml").write_text(json.dumps(run_file(self.digits, **sections)))
        (submission / "job.sh").write_text(self.placed(script).text())
        return client.submit(submission / "job.sh", options)

    def placed(self, script: BatchScript) -> BatchScript:
        submission = self.run / "submission"
        return replace(
            script,
            run=self.run,
            program=["hpclr", "train", "--runs-dir", str(self.run.parent), str(submission / "run.yaml")],
            python=sys.executable,
            code=submission / "code",
            mpirun=str(Path(sys.executable).with_name("mpirun")),
            environment={"OMP_NUM_THREADS": "1"} | AS_ROOT | dict(script.environment),
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


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits.h5"
    done = command("data", "prepare", "digits", path, "--valid-fraction", "0.1", "--limit", "300")
    assert done.code == 0, done.err
    return path


@pytest.fixture
def jobs(real_slurm, digits, tmp_path):
    made = Jobs(real_slurm, tmp_path, digits)
    yield made
    client.cancel([job.id for job in client.queue() if job.state in ("RUNNING", "PENDING")])


def script(launcher: str, *, pause: float = 0.02, trouble: str = "nothing:0", **more) -> BatchScript:
    environment = {"PAUSE": str(pause), "TROUBLE": trouble}
    run = ("run", Path("/"), [], launcher)
    return BatchScript(*run, nodes=2, processes=2, **({"time": "00:10:00", "environment": environment} | more))


def test_a_run_is_trained_by_srun_on_two_nodes(jobs):
    job = jobs.submit(script("srun"), train={"steps": 10})
    jobs.ends(job, "COMPLETED")
    assert jobs.codes() == [0]
    hosts = {json.loads(path.read_text().rstrip("\0"))["host"] for path in jobs.run.glob("logs/attempt-01/*.heartbeat")}
    assert hosts == {"n1", "n2"}
    assert (jobs.run / "logs" / f"{job}_0_log.out").read_text().strip().endswith(str(jobs.run))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(launcher, jobs):
    """By the signal that Slurm sends before the limit, which reaches the batch script and nothing else."""
    reference = jobs.reference(script(launcher))
    job = jobs.submit(script(launcher))
    jobs.await_step(20)
    client.signal(job, "USR1")
    assert jobs.ends(job, "COMPLETED").restarts == 1
    assert jobs.codes() == [85, 0]
    assert jobs.said(job).count("requeueing job") == 1
    assert_same_run(reference, jobs.run)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_program_that_fails_is_a_job_that_failed(launcher, jobs):
    job = jobs.submit(script(launcher, trouble="bug:7"))
    found = jobs.ends(job, "FAILED")
    assert (found.exit_code, found.restarts, jobs.codes()) == (1, 0, [1])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_process_that_is_killed_costs_the_steps_since_the_checkpoint(launcher, jobs):
    reference = jobs.reference(script(launcher))
    job = jobs.submit(script(launcher, trouble="kill:57"), checkpoint={"every": 25})
    assert jobs.ends(job, "COMPLETED").restarts == 1
    assert jobs.codes() == [75, 0]
    assert_same_run(reference, jobs.run)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_wrong_run_file_is_not_tried_again(launcher, jobs):
    job = jobs.submit(script(launcher), data={"batch_size": 63})
    found = jobs.ends(job, "FAILED")
    assert (found.exit_code, found.restarts) == (2, 0)
    assert "which 4 processes cannot share equally" in jobs.said(job)


@pytest.mark.slow
def test_a_job_that_is_cancelled_saves_and_stays_cancelled(jobs):
    job = jobs.submit(script("srun", pause=0.1))
    jobs.await_step(5)
    client.cancel([job])
    assert jobs.ends(job, "CANCELLED").restarts == 0
    time.sleep(7)  # a requeued job would start after five seconds
    assert client.details(job).state == "CANCELLED"
    assert "the job was cancelled, and is not requeued" in jobs.said(job)


@pytest.mark.slow
@pytest.mark.parametrize(("warning", "margin"), [(40, 1), (1, 40)], ids=["signal", "clock"])
def test_the_time_limit(warning, margin, jobs):
    """A limit of a minute, really waited for: the warning by Slurm, or the clock of the processes where none comes."""
    asked = script("srun", pause=0.25, time="1", warning=warning)
    job = jobs.submit(asked, slurm={"margin": margin}, train={"steps": 130})
    found = jobs.ends(job, "COMPLETED", limit=280)
    codes = jobs.codes()
    assert (codes[-1], set(codes[:-1]), len(codes)) == (0, {85}, found.restarts + 1)
    assert ("signal USR1" in jobs.said(job)) == (margin == 1)


@pytest.mark.slow
def test_a_node_that_is_lost(jobs):
    """Slurm itself requeues the job, on other nodes."""
    reference = jobs.reference(script("srun"))
    job = jobs.submit(script("srun", pause=0.1), checkpoint={"every": 10})
    jobs.await_step(35)
    jobs.cluster.do("kill-node", "n2")
    try:
        assert jobs.ends(job, "COMPLETED").restarts == 1
    finally:
        jobs.cluster.do("start-node", "n2")
    assert_same_run(reference, jobs.run)


@pytest.mark.slow
def test_a_chain_of_jobs(jobs):
    asked = script("srun", chain=True)
    reference = jobs.reference(asked)
    chain = [jobs.submit(asked)]
    for _ in range(3):
        after = (f"--dependency=afternotok:{chain[-1]}", "--kill-on-invalid-dep=yes")
        chain.append(jobs.submit(asked, after))
    jobs.await_step(20)
    client.signal(chain[0], "USR1")
    found = [jobs.cluster.wait(job, limit=LIMIT) for job in chain]
    assert [job.state for job in found] == ["FAILED", "COMPLETED", "CANCELLED", "COMPLETED"]
    assert found[0].exit_code == 85
    assert jobs.codes() == [85, 0]
    assert "nothing is left to do" in jobs.said(chain[3])
    assert_same_run(reference, jobs.run)


@pytest.mark.slow
def test_a_controller_that_goes_away(jobs):
    """For long enough that the script finds none when it wants to requeue."""
    job = jobs.submit(script("srun", pause=0.1))
    jobs.await_step(5)
    client.signal(job, "USR1")
    jobs.cluster.do("kill-controller")
    try:
        with pytest.raises(client.SlurmError, match="Unable to contact slurm controller") as error:
            client.submit(jobs.run / "submission" / "job.sh")
        assert error.value.exit_code == 75
        time.sleep(15)
    finally:
        jobs.cluster.do("start-controller")
    assert jobs.ends(job, "COMPLETED").restarts == 1
    assert jobs.codes() == [85, 0]
