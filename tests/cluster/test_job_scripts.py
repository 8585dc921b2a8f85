"""The hand-written scripts of jobs/: what they do with each end of a run. Real bash; Slurm's commands are stood in."""

import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

JOBS = Path(__file__).parents[2] / "jobs"
SCRIPTS = sorted(JOBS.glob("*.sbatch"))
RECORD = '{\n  "code": %d,\n  "message": "said \\"code\\": 1, then left",\n  "rank": 0\n}\n'


class Job:
    """A batch job's surroundings: a run directory, and Slurm's commands, which write down how they were called."""

    def __init__(self, place: Path) -> None:
        self.place, self.run = place, place / "a run's $(directory)"
        (self.run / "checkpoints").mkdir(parents=True)
        (place / "bin").mkdir()
        self.command("squeue", "echo 2030-01-01T00:00:00")
        self.command("scontrol")
        self.environment = {"PATH": f"{place / 'bin'}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "HPCLR_PAUSES": "0 0"}
        self.environment |= {"TZ": "UTC", "RUN": str(self.run)}

    def command(self, name: str, lines: str = "true") -> None:
        program = self.place / "bin" / name
        program.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >>"{self.place}/{name}.called"\n{lines}\n')
        program.chmod(stat.S_IRWXU)

    def called(self, name: str) -> list[str]:
        record = self.place / f"{name}.called"
        return record.read_text().splitlines() if record.exists() else []

    def saved(self, step: int) -> None:
        for name in (f"step-{step:08d}.h5", f"step-{step:08d}.h5.sha256"):
            (self.run / "checkpoints" / name).touch()

    def start(self, launcher: str, **environment: str) -> subprocess.Popen[str]:
        script = f'set -euo pipefail; . "{JOBS}/supervise.sh"; supervise "$RUN" bash -c "$1"; echo not reached'
        return subprocess.Popen(
            ["bash", "-c", script, "job.sh", launcher],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, launcher: str, **environment: str) -> tuple[int, str]:
        process = self.start(launcher, **environment)
        said, _ = process.communicate(timeout=30)
        assert "not reached" not in said
        return process.returncode, said


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def recorded(code: int, launcher_code: int = 1) -> str:
    """A launcher whose run records its end in the directory of an attempt, and that itself ends with another code."""
    return (
        f'mkdir -p "$RUN/logs/attempt-01"; printf %s "$RUN/logs/attempt-01" >"$HPCLR_LAUNCH/attempt"; '
        f"printf %s '{RECORD % code}' >\"$RUN/logs/attempt-01/exit.json\"; exit {launcher_code}"
    )


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (1, 1), (2, 2)])
def test_the_recorded_end_counts_and_not_the_launchers(job, code, expected):
    assert job.end(recorded(code, launcher_code=0 if code else 9))[0] == expected
    assert job.called("scontrol") == []
    assert list((job.run / "logs").glob(".launch-*")) == []


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (2, 2), (75, 75), (137, 75), (143, 75)])
def test_without_a_record_the_launchers_counts(job, code, expected):
    job.saved(5)
    returned, _ = job.end(f"exit {code}")
    assert (returned, job.called("scontrol")) == ((0, ["requeue 7"]) if expected == 75 else (expected, []))


def test_a_failure_before_the_attempt_counts(job):
    assert job.end(f"printf %s '{RECORD % 2}' >\"$HPCLR_LAUNCH/exit.json\"; exit 1")[0] == 2


@pytest.mark.parametrize("code", [75, 85])
def test_a_run_that_is_saved_is_requeued_while_it_makes_progress(job, code):
    job.saved(90)
    assert (job.end(recorded(code))[0], job.called("scontrol")) == (0, ["requeue 7"])
    job.saved(200)
    assert (job.end(recorded(code), SLURM_RESTART_COUNT="1")[0], len(job.called("scontrol"))) == (0, 2)
    returned, said = job.end(recorded(code), SLURM_RESTART_COUNT="2")
    assert (returned, len(job.called("scontrol"))) == (1, 2)
    assert "nothing beyond step 200" in said
    assert (job.run / "logs" / "progress").read_text() == "7 0 90\n7 1 200\n7 2 200\n"


def test_a_checkpoint_without_digest_is_no_progress(job):
    job.saved(90)
    job.end(recorded(75))
    (job.run / "checkpoints" / "step-00000300.h5").touch()
    assert job.end(recorded(75))[0] == 1


def test_a_new_job_begins_to_count_anew(job):
    assert job.end(recorded(75))[0] == 0
    assert job.end(recorded(75), SLURM_JOB_ID="8")[0] == 0
    assert job.end(recorded(75), SLURM_JOB_ID="8")[0] == 1


def test_there_are_so_many_attempts(job):
    returned, said = job.end(recorded(85), SLURM_RESTART_COUNT="2", HPCLR_ATTEMPTS="3")
    assert (returned, job.called("scontrol")) == (1, [])
    assert "3 attempts are enough" in said


def test_a_run_that_was_asked_to_end_is_not_requeued(job):
    (job.run / "STOP").write_text("end by someone\n")
    returned, said = job.end(recorded(85))
    assert (returned, job.called("scontrol")) == (0, [])
    assert "ends as it was asked to" in said


def test_a_controller_that_is_away_is_asked_again(job):
    job.command("scontrol", f'[ $(wc -l <"{job.place}/scontrol.called") = 2 ]')
    assert (job.end(recorded(85))[0], len(job.called("scontrol"))) == (0, 2)


def test_a_controller_that_stays_away_leaves_the_command_to_give(job):
    job.command("scontrol", "exit 1")
    returned, said = job.end(recorded(85))
    assert (returned, len(job.called("scontrol"))) == (1, 2)
    assert "scontrol requeue 7" in said


@pytest.mark.parametrize("warning", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warning_asks_the_run_to_save_and_waits_for_it(job, warning):
    ready = job.place / "ready"
    launcher = f'touch "{ready}"; until [ -e "$RUN/STOP" ]; do sleep 0.05; done; sleep 0.3; {recorded(85)}'
    process = job.start(launcher)
    while not ready.exists():
        time.sleep(0.02)
    process.send_signal(warning)
    process.send_signal(warning)
    assert process.wait(timeout=30) == 0
    assert (job.run / "STOP").read_text().startswith("requeue the time limit is near")
    assert job.called("scontrol") == ["requeue 7"]


def test_a_request_to_end_is_not_overwritten_by_a_warning(job):
    launcher = f'echo "end by someone" >"$RUN/STOP"; kill -USR1 $PPID; sleep 0.3; {recorded(85)}'
    assert (job.end(launcher)[0], job.called("scontrol")) == (0, [])


@pytest.mark.parametrize(
    ("squeue", "environment", "expected"),
    [
        ("echo 2030-01-01T00:00:00", {}, "1893456000"),
        ("echo 2030-01-01T00:00:00", {"SLURM_JOB_END_TIME": "1900000000"}, "1900000000"),
        ("echo NONE", {}, "none"),
        ("exit 1", {}, "none"),
        ("true", {}, "none"),
    ],
)
def test_the_run_is_told_when_the_job_must_end(job, squeue, environment, expected):
    job.command("squeue", squeue)
    job.end('echo "${HPCLR_DEADLINE-none}" >"$RUN/deadline"', **environment)
    assert (job.run / "deadline").read_text() == f"{expected}\n"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_ask_slurm_for_what_they_rely_on(path):
    text = path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)
    head, _, body = text.partition("set -euo pipefail\n")
    assert "#SBATCH" not in body, "Slurm reads no directives after the first command"
    directives = [line.split()[1] for line in head.splitlines() if line.startswith("#SBATCH")]
    for wanted in (
        "--open-mode=append",
        "--export=NONE",
        "--signal=B:USR1@180",
        "--output=runs/digits-vit/logs/%j_0_log.out",
    ):
        assert wanted in directives
    assert "unset SLURM_EXPORT_ENV" in body


def test_there_is_a_script_for_each_launcher():
    assert [path.stem for path in SCRIPTS] == ["apptainer", "mpirun", "srun", "torchrun"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_start_the_launcher_with_the_jobs_numbers(path, tmp_path):
    """Run as Slurm runs them, with launchers that write down their words."""
    job = Job(tmp_path)
    job.command("scontrol", '[ "$1" != show ] || printf "%s\\n" node17 node18')
    for launcher in ("srun", "mpirun"):
        job.command(launcher)
    here = tmp_path / "repository"
    (here / ".venv" / "bin").mkdir(parents=True)
    (here / ".venv" / "bin" / "activate").touch()
    (here / "jobs").symlink_to(JOBS)
    numbers = {"SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2"}
    numbers |= {"SLURM_JOB_NODELIST": "node[17-18]", "SLURM_GPUS_ON_NODE": "4"}
    done = subprocess.run(["bash", path], cwd=here, env=job.environment | numbers, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = "\n".join(job.called("mpirun" if path.stem == "mpirun" else "srun"))
    assert "hpclr train jobs/quickstart.yaml" in words
    expected = {
        "srun": ["--kill-on-bad-exit=1 --cpus-per-task=8 python -m hpclr"],
        "torchrun": ["--nnodes=2 --nproc-per-node=4", "--rdzv-endpoint=node17:20007 --rdzv-id=7 -m hpclr"],
        "mpirun": ["-n 8 --map-by ppr:4:node --bind-to none python -m hpclr"],
        "apptainer": ["bash -p -c", 'export "APPTAINERENV_$name=${!name}"', "apptainer exec --cleanenv --nv --bind="],
    }
    for part in expected[path.stem]:
        assert part in words
