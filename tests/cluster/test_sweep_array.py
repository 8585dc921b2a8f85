"""`hpclr sweep --submit`: a job array on a real Slurm, each of whose elements is a run with a life of its own."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from script_helpers import PLAIN
from sweep_helpers import make_sweeps
from training_helpers import hpclr, records, summary

from hpclr.cluster.record import submitted
from hpclr.cluster.sweep import submission
from hpclr.errors import UsageError
from hpclr.slurm import client
from hpclr.slurm.array import array_script, most_elements

GOLDEN = Path(__file__).with_name("golden") / "sweep-array.sh"
RUNS = Path("/scratch/me/runs")
CPU = ("--submit", "--ntasks-per-node", 1, "--time", "00:10:00")
LIMIT = 120.0
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
STEADY = """
import time
from torch import nn

class Net(nn.Sequential):
    def forward(self, x):
        time.sleep(0.1 if self.training else 0)
        return super().forward(x)

def make():
    return Net(nn.Flatten(), nn.Linear(64, 10))
"""


@pytest.fixture
def sweeps(real_slurm, few_digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster.yaml").write_text('tried: true\nenvironment: {OMP_NUM_THREADS: "1"}\n')
    (tmp_path / "steady.py").write_text(STEADY)
    yield make_sweeps(tmp_path, few_digits)
    client.cancel([job.id for job in client.queue() if job.state in ("RUNNING", "PENDING")])


def submit(sweeps, *words, **parts) -> str:
    done = sweeps.sweep(*CPU, "--profile", "./cluster.yaml", *words, **parts)
    assert done.code == 0, done.err
    word, job = done.out.splitlines()[0].split()
    assert word == "job"
    return job


def elements(job: str) -> dict[str, tuple[str, str, int]]:
    """`12_3` → own number, state, restarts."""
    form = "--Format=JobArrayID:20,JobID:20,State:20,RestartCnt:10"
    answer = client.ask("squeue", "--array", "--noheader", "--states=all", f"--jobs={job}", form)
    rows = [line.split() for line in answer.stdout.splitlines()]
    return {element: (own, state, int(restarts)) for element, own, state, restarts in rows}


def ended(job: str) -> dict[str, tuple[str, str, int]]:
    """Waits for all elements."""
    end = time.monotonic() + LIMIT
    while not {state for _, state, _ in elements(job).values()} <= OVER:
        assert time.monotonic() < end, elements(job)
        time.sleep(0.2)
    return elements(job)


def await_step(run: Path, step: int) -> None:
    end = time.monotonic() + LIMIT
    while not (run / "metrics.jsonl").exists() or len(records(run, "train")) < step:
        assert time.monotonic() < end, f"step {step} of {run} is not reached"
        time.sleep(0.1)


def test_the_script_is_as_expected():
    """HPCLR_GOLDEN=write writes it anew."""
    scripts = [replace(PLAIN, run=RUNS / name, name=name, time="08:00:00") for name in ("lr-seed-0", "lr's $(seed)")]
    text = array_script("lr", RUNS / "lr.sweep", [*scripts, replace(scripts[0], warning=300)], 2)
    if os.environ.get("HPCLR_GOLDEN") == "write":
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_an_element_is_the_batch_script_of_its_run_and_writes_where_that_does(tmp_path):
    """By hand, with names that a shell could take amiss."""
    runs = [tmp_path / name for name in ("one", "it's $(two) `three`", "four")]
    for run in runs:
        (run / "submission").mkdir(parents=True)
        (run / "submission" / "job.sh").write_text('echo "I am $0 of job $SLURM_JOB_ID"; echo wrong >&2; exit 7')
    script = tmp_path / "array.sh"
    script.write_text(array_script("a", tmp_path / "a.sweep", [replace(PLAIN, run=run) for run in runs]))
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "12"}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")
    assert (runs[1] / "logs" / "12_0_log.out").read_text() == f"I am {runs[1]}/submission/job.sh of job 12\n"
    assert (runs[1] / "logs" / "12_0_log.err").read_text() == "wrong\n"


def test_without_slurm_a_dry_run_checks_and_shows_the_script(few_digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweeps = make_sweeps(tmp_path, few_digits)
    before = set(tmp_path.rglob("*"))
    done = sweeps.sweep(*CPU, "--dry-run", "--at-once", 2, grid={"train.seed": [0, 1, 2]})
    assert done.code == 0, done.err
    assert "#SBATCH --array=0-2%2\n" in done.out
    assert str(sweeps.runs / "sweep-seed-2") in done.out
    done = sweeps.sweep(*CPU, "--dry-run", list=[{"data.path": "a.h5"}, {"data.path": "digits.h5", "train.seed": 3}])
    assert (done.code, "sweep-path-a.h5: " in done.err, "cannot be opened" in done.err) == (2, True, True)
    assert set(tmp_path.rglob("*")) - before <= {tmp_path / "run.yaml", tmp_path / "sweep.yaml"}


def test_a_sweep_is_submitted_once_and_trained(sweeps):
    """A run that fails is a failed element, and no more than that."""
    parts = {
        "base": {"train": {"steps": 3}},
        "grid": {"train.seed": [0, 1]},
        "list": [{"optimizer.name": "sgd", "optimizer.lr": 1e30}],
    }
    job = submit(sweeps, "--at-once", 2, "--", "--hold", **parts)
    again = sweeps.sweep(*CPU, **parts)
    assert (again.code, again.out) == (0, "")
    assert "3 runs in runs, of which 0 are to be started" in again.err
    assert f"{client.queue([job])[0].state}" in again.err
    subprocess.run(["scontrol", "release", job], check=True)
    found = ended(job)
    assert sweeps.finished() == {"sweep-seed-0", "sweep-seed-1"}
    assert found[f"{job}_2"][1:] == ("FAILED", 0)
    for number, name in enumerate(sweeps.names(**parts)):
        (entry,) = submitted(sweeps.runs / name)
        assert (entry.jobs, entry.by) == ((f"{job}_{number}",), "sweep")
        own = found[f"{job}_{number}"][0]
        assert (sweeps.runs / name / "logs" / f"{own}_0_log.out").exists()
    assert summary(sweeps.runs / "sweep-seed-1")["steps"] == 3
    assert (sweeps.runs / "sweep.sweep" / "logs" / f"{job}_submission.sh").read_text().startswith("#!/bin/bash\n")
    done = sweeps.sweep("--table", **parts)
    assert done.out.count("finished") == 2


def test_nothing_is_left_of_a_sweep_that_slurm_refuses(sweeps):
    done = sweeps.sweep(*CPU, "--", "--licenses=nothing", grid={"train.seed": [0, 1]})
    assert (done.code, "sbatch --parsable has failed" in done.err) == (1, True), done.err
    assert list(sweeps.runs.iterdir()) == []


def slow_sbatch(sweeps, monkeypatch) -> Path:
    """Has Slurm take the job, and says nothing of it; returns the file that shows when."""
    real, flag = shutil.which("sbatch"), sweeps.path / "taken"
    program = sweeps.path / "first" / "sbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\nanswer=$({real} "$@") || exit; touch {flag}; exec >/dev/null 2>&1 sleep 20\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return flag


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_submission_that_is_interrupted_is_undone(number, sweeps, monkeypatch):
    flag, file = slow_sbatch(sweeps, monkeypatch), sweeps.write(grid={"train.seed": [0, 1]})
    words = [*map(str, CPU), "--profile", "./cluster.yaml", "--", "--hold"]
    process = subprocess.Popen([sys.executable, "-m", "hpclr", "sweep", str(file), *words], stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while not flag.exists():
        assert (process.poll(), time.monotonic() < end) == (None, True)
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert (process.returncode != 0, b"interrupted; cancelled again: " in said) == (True, True), said
    assert [job.state for job in client.queue() if job.state in ("RUNNING", "PENDING")] == []
    assert list(sweeps.runs.iterdir()) == []


def test_an_array_that_was_answered_too_late_counts(sweeps, monkeypatch):
    slow_sbatch(sweeps, monkeypatch)
    monkeypatch.setattr(client, "_PATIENCE_OF_SBATCH", 2.0)
    job = submit(sweeps, "--", "--hold", grid={"train.seed": [0, 1]})
    assert {found.id for found in client.queue() if found.state == "PENDING"} == {job}
    assert [entry.jobs for entry in submitted(sweeps.runs / "sweep-seed-1")] == [(f"{job}_1",)]


def test_an_array_has_no_more_elements_than_the_cluster_takes(real_slurm):
    assert most_elements() == 1001
    submission._check_number(1001)
    with pytest.raises(UsageError, match=r"1002 runs are to be started.*at most 1001"):
        submission._check_number(1002)


@pytest.mark.slow
def test_elements_are_requeued_and_stopped_one_by_one(sweeps):
    """Also the one that has the number of the whole array for its own: the last to start."""
    parts = {"base": {"model": {"target": "steady:make"}, "method": {"name": "dense"}, "train": {"steps": 200}}}
    job = submit(sweeps, **parts, grid={"train.seed": [0, 1, 2]})
    runs = [sweeps.runs / f"sweep-seed-{seed}" for seed in range(3)]
    for run in runs:
        await_step(run, 5)
    assert {own for own, _, _ in elements(job).values()} >= {job}
    (last,) = [element for element, (own, _, _) in elements(job).items() if own == job]
    client.signal(last, "USR1")
    other, third = [element for element in elements(job) if element != last]
    assert hpclr("stop", runs[int(other[-1])]).code == 0
    found = ended(job)
    assert {element: (state, restarts) for element, (_, state, restarts) in found.items()} == {
        last: ("COMPLETED", 1),
        other: ("COMPLETED", 0),
        third: ("COMPLETED", 0),
    }
    assert sweeps.finished() == {runs[int(last[-1])].name, runs[int(third[-1])].name}
    assert [record["step"] for record in records(runs[int(last[-1])], "train")] == list(range(1, 201))
    job = submit(sweeps, **parts, grid={"train.seed": [0, 1, 2]})  # the one that was stopped goes on
    assert list(ended(job)) == [f"{job}_0"]
    assert len(sweeps.finished()) == 3
