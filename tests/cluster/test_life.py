"""The life of a run on a real Slurm, as its user sees it: stopped from outside, by hand-written scripts, watched."""

import fcntl
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from job_helpers import AS_ROOT, LAUNCHERS, LIMIT, STEPS, script
from training_helpers import assert_same_run, steps_kept
from training_helpers import hpclr as command

from hpclr.slurm import client

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_hpclr_stop_ends_the_job_and_its_script_goes_on(launcher, jobs):
    job = jobs.submit(script(launcher, pause=0.05))
    jobs.await_step(20)
    done = command("stop", jobs.run)
    assert done.code == 0, done.err
    assert f"In use by job {job} (restart 0), process" in done.out
    assert jobs.ends(job, "COMPLETED").restarts == 0
    assert jobs.codes() == [85]
    assert max(steps_kept(jobs.run)) < STEPS
    assert not (jobs.run / "STOP").exists()
    assert f"ended as it was asked to. To go on: hpclr resume {jobs.run}\n" in jobs.said(job)
    jobs.ends(client.submit(jobs.run / "submission" / "job.sh"), "COMPLETED")
    assert jobs.codes() == [85, 0]
    jobs.assert_each_sample_once()
    assert_same_run(jobs.local(), jobs.run)


@pytest.mark.slow
def test_a_job_that_was_asked_to_end_when_its_node_died_does_not_go_on(jobs):
    job = jobs.submit(script("srun", pause=0.1), checkpoint={"every": 10})
    jobs.await_step(15)
    jobs.cluster.do("kill-node", "n1")  # where the first process and the script are
    try:
        assert command("stop", jobs.run).code == 0
        assert jobs.ends(job, "COMPLETED").restarts == 1
    finally:
        jobs.cluster.do("start-node", "n1")
    assert jobs.codes() == [85]
    assert "saved at step 10, and not started again as it was asked to" in jobs.said(job)


# --- hand-written scripts


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_hand_written_script_saves_requeues_and_goes_on(launcher, jobs):
    """In a repository with another run file, and with other numbers of processes."""
    jobs.name = "digits-vit"
    jobs.write(train={"device": "cpu"})
    repository = jobs.path / "repository"
    shutil.copytree(ROOT / "jobs", repository / "jobs")
    shutil.copy(jobs.file, repository / "jobs" / "quickstart.yaml")
    (repository / "hpclr").symlink_to(ROOT / "hpclr")
    (repository / "steady.py").symlink_to(jobs.file.parent / "code" / "steady.py")
    (repository / "runs").symlink_to(jobs.run.parent)
    own = AS_ROOT | {"OMP_NUM_THREADS": "1", "PAUSE": "0.05", "NOTES": str(jobs.run / "logs" / "notes")}
    lines = [f"export PATH={Path(sys.executable).parent}:$PATH", *(f"export {name}={own[name]}" for name in own)]
    (repository / ".venv" / "bin").mkdir(parents=True)
    (repository / ".venv" / "bin" / "activate").write_text("\n".join(lines))

    tasks = 1 if launcher == "torchrun" else 2
    numbers = [f"--ntasks-per-node={tasks}", "--gpus-per-node=2", "--cpus-per-task=1", "--time=10"]
    submit = ["sbatch", "--parsable", *numbers, f"jobs/{launcher}.sbatch"]
    job = subprocess.run(submit, cwd=repository, check=True, capture_output=True, text=True).stdout.strip()
    jobs.await_step(20)
    client.signal(job, "USR1")
    assert jobs.ends(job, "COMPLETED").restarts == 1
    assert jobs.codes() == [85, 0]
    jobs.assert_each_sample_once()


# --- slurm-tools, which find a job's logs by their names


@pytest.fixture(scope="module")
def slurm_tools(tmp_path_factory) -> Path:
    """Where slogs and stui are: in an environment of their own, as they need older packages than others do."""
    place = tmp_path_factory.mktemp("slurm-tools")
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    wanted = ["slurm-tools==0.1.0", "click<8.2", "numpy<2"]
    install = [place / "bin" / "python", "-m", "pip", "install", "--quiet", "--only-binary=:all:", *wanted]
    done = subprocess.run(install, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"slurm-tools cannot be installed here: {done.stderr.strip()[-300:]}")
    return place / "bin"


@pytest.mark.slow
def test_slurm_tools_show_the_logs_of_a_job(slurm_tools, jobs):
    job = jobs.submit(script("srun", pause=0.5), validation={"every_steps": 2})
    jobs.await_step(3)
    shown = subprocess.run([slurm_tools / "slogs", jobs.run / "logs"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert f"Showing Slurm Job ID: {job}" in shown.stdout
    assert "step 2: validation accuracy" in shown.stdout
    assert re.search(rf"^ +{job} +main +run ", shown.stdout, re.MULTILINE), "what squeue says of it"
    screen = Screen([str(slurm_tools / "stui")])
    try:
        screen.await_text("RUNNING")
        screen.press("\r")  # on the row of the job
        screen.await_text(f"STDOUT Log File: {jobs.run}/logs/{job}_0_log.out")
        screen.press("\t")
        time.sleep(0.3)
        screen.press("\x1b[C")  # from the tab of the output to that of the errors
        screen.await_text("validation accuracy")  # numbers have a colour of their own
        screen.press("q")
    finally:
        screen.close()


class Screen:
    """A program in a terminal of its own."""

    def __init__(self, line: list[str]) -> None:
        self.text = ""
        self._terminal, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 250, 0, 0))
        own = os.environ | {"TERM": "xterm-256color"}
        self._process = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, env=own)
        os.close(theirs)

    def await_text(self, text: str) -> None:
        end = time.monotonic() + LIMIT
        while text not in self.text:
            assert time.monotonic() < end, f"{text!r} is not shown: {self.text[-5000:]!r}"
            if select.select([self._terminal], [], [], 1)[0]:
                self.text += os.read(self._terminal, 65536).decode(errors="replace")

    def press(self, key: str) -> None:
        os.write(self._terminal, key.encode())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)
