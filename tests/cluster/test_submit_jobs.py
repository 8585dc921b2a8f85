"""`hpclr submit` and `hpclr resume` on a real Slurm: jobs that train, and everything that Slurm refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from submit_helpers import CPU, TARGET, make_place
from training_helpers import assert_same_run, hpclr

from hpclr.cluster.record import note_jobs, read_submission, submitted
from hpclr.slurm import client

PROFILE = """
tried: true
environment: {OMP_NUM_THREADS: "1", OMPI_ALLOW_RUN_AS_ROOT: "1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM: "1"}
"""
NODES = ("--nodes", 2, "--profile", "./cluster.yaml")


@pytest.fixture
def place(real_slurm, few_digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster.yaml").write_text(PROFILE)
    yield make_place(tmp_path, few_digits)
    client.cancel([job.id for job in client.queue() if job.state in ("RUNNING", "PENDING")])


def hpclr_command(*words: object) -> "subprocess.CompletedProcess[str]":
    """The command in a process of its own."""
    return subprocess.run([sys.executable, "-m", "hpclr", *map(str, words)], capture_output=True, text=True)


def job_of(done) -> str:
    assert done.code == 0, done.err
    word, number = done.out.splitlines()[0].split()
    assert word == "job"
    return number


def test_a_job_works_with_what_was_there_when_it_was_submitted(place, real_slurm):
    done = place.submit(*NODES, "--ntasks-per-node", 1, "--time", 10, "--", "--hold", **TARGET)
    job = job_of(done)
    (place.path / "net.py").write_text("raise ValueError('changed after it was submitted')")
    (place.path / "helpers.py").unlink()
    (place.path / "run.yaml").unlink()
    subprocess.run(["scontrol", "release", job], check=True)
    found = real_slurm.wait(job)
    logs = place.run / "logs"
    said = "".join((logs / f"{job}_0_log.{end}").read_text() for end in ("out", "err"))
    assert found.state == "COMPLETED", said
    assert said.splitlines()[0] == str(place.run)
    assert done.out.splitlines()[1] == f"logs runs/run/logs/{job}_0_log.out, runs/run/logs/{job}_0_log.err"
    assert (logs / f"{job}_submission.sh").read_bytes() == (place.submission / "job.sh").read_bytes()
    assert place.jobs() == [(job,)]
    assert read_submission(place.run).command[:3] == ("hpclr", "submit", str(place.path / "run.yaml"))
    assert json.loads((place.run / "summary.json").read_text())["steps"] == 13
    for again in (hpclr("resume", place.run), hpclr("submit", place.submission / "run.yaml", *CPU)):
        assert (again.code, "this run is finished" in again.err) == (2, True)


def test_a_run_that_is_in_the_queue_is_not_submitted_twice(place):
    job = job_of(place.submit(*NODES, "--", "--hold"))
    before = place.listing()
    for again in (place.submit(*NODES), hpclr("resume", place.run)):
        assert (again.code, f"a job that waits or runs: {job} (pending)" in again.err) == (2, True)
    assert place.listing() == before
    client.cancel([job])
    resumed = job_of(hpclr("resume", place.run))
    client.cancel([resumed])
    assert place.jobs() == [(job,), (resumed,)]
    assert {name: place.listing()[name] for name in before if "submission" in name} == {
        name: text for name, text in before.items() if "submission" in name
    }
    assert int(job) < int(job_of(place.submit(*NODES, "--", "--hold")))


def test_the_jobs_of_a_chain_wait_for_one_another(place):
    done = place.submit(*NODES, "--chain", 3, "--", "--hold")
    first, *others = place.jobs()[0]
    assert job_of(done) == first
    assert f"then jobs {', '.join(others)}, each if" in done.out
    queue = {job.id: job.dependency for job in client.queue([first, *others])}
    assert queue == {
        first: "",
        others[0]: f"afternotok:{first}(unfulfilled)",
        others[1]: f"afternotok:{others[0]}(unfulfilled)",
    }
    assert read_submission(place.run).chain == 3
    client.cancel([first, *others])
    assert len(hpclr("resume", place.run).out.splitlines()[1].split(",")) == 3


# --- what Slurm refuses


REFUSED = ("--", "--constraint=nowhere")


@pytest.mark.parametrize("before", [False, True], ids=["new", "again"])
def test_nothing_is_left_of_a_submission_that_slurm_refuses(before, place):
    if before:
        client.cancel([job_of(place.submit(*NODES, "--", "--hold"))])
    was = place.listing()
    done = place.submit(*NODES, *REFUSED)
    assert done.code == 1
    assert "sbatch --parsable has failed (exit code 1): " in done.err
    assert "Invalid feature specification" in done.err
    assert place.listing() == was
    assert place.run.exists() == before
    assert not list(place.path.glob("runs/run/.tmp*"))


def test_a_chain_is_submitted_whole_or_not_at_all(place, monkeypatch):
    """The third call of sbatch fails, after two jobs of the chain."""
    real = subprocess.run(["which", "sbatch"], capture_output=True, text=True, check=True).stdout.strip()
    directory = place.path / "bin"
    directory.mkdir()
    program = directory / "sbatch"
    program.write_text(
        f'#!/bin/bash\necho >>"{directory}/calls"\n'
        f'[ "$(wc -l <"{directory}/calls")" -lt 3 ] || {{ echo "sbatch: error: no more jobs" >&2; exit 1; }}\n'
        f'exec "{real}" "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory), prepend=":")
    before = {job.id for job in client.queue()}
    done = place.submit(*NODES, "--chain", 3, "--", "--hold")
    assert (done.code, "no more jobs" in done.err) == (1, True)
    assert not place.run.exists()
    assert [job.state for job in client.queue() if job.id not in before] == ["CANCELLED"] * 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--partition", "nowhere"), "there is no partition 'nowhere' here; there are main, short"),
        (("--partition", "short", "--nodes", 2), "partition short does not give a job 2 nodes (at most 1)"),
        (("--partition", "short", "--time", "01:00:00"), "3,600 seconds (at most 600)"),
        (("--gpus-per-node", 4), "4 GPUs on a node (at most 2)"),
        (("--cpus-per-task", 3), "6 CPUs on a node (at most 4)"),
        (("--mem", "8T"), "8,388,608 MB of memory on a node (at most "),
        (("--nodes", 32), "partition main does not give a job 32 nodes (at most 4)"),
    ],
)
def test_what_a_partition_does_not_have_is_said_with_both_numbers(words, said, place):
    done = place.submit(*words)
    assert (done.code, said in done.err) == (2, True), done.err
    assert place.listing() == {}


def test_one_of_several_partitions_is_enough(place):
    assert place.submit("--partition", "short,main", "--nodes", 2, "--dry-run").code == 0


def test_a_dry_run_asks_slurm_and_submits_nothing(place):
    jobs = client.queue()
    done = place.submit(*NODES, "--dry-run")
    assert done.code == 0, done.err
    assert "to start at" in done.err.splitlines()[-1]
    assert done.out.startswith("#!/bin/bash\n")
    assert (place.listing(), client.queue()) == ({}, jobs)
    refused = place.submit(*NODES, "--dry-run", *REFUSED)
    assert (refused.code, refused.out.startswith("#!/bin/bash\n")) == (0, True)
    assert "sbatch     warning: sbatch --test-only has failed" in refused.err


@pytest.mark.slow
def test_a_controller_that_is_away(place, real_slurm):
    real_slurm.do("kill-controller")
    try:
        done = place.submit(*NODES)
    finally:
        real_slurm.do("start-controller")
        await_nodes(place)
    assert (done.code, "Unable to contact slurm controller" in done.err) == (75, True), done.err
    assert not place.run.exists()


def await_nodes(place) -> None:
    """They take a moment to come back to a controller."""
    end = time.monotonic() + 30
    while "warning: sbatch" in place.submit(*NODES, "--dry-run").err:
        assert time.monotonic() < end
        time.sleep(0.2)


NAMES = st.text(st.sampled_from("ab \"'$`#%!&|;<>()*?[]{}~=-.,é\n"), min_size=1, max_size=10)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs=NAMES, comment=NAMES)
def test_any_names_are_taken_as_they_are_or_refused(runs, comment, place):
    done = place.submit("--runs-dir", f"/tmp/x/{runs}", "--dry-run", "--", f"--comment={comment}")
    if "\n" in runs + comment:
        assert (done.code, "which a batch script cannot hold" in done.err) == (2, True)
        return
    assert (done.code, "to start at" in done.err) == (0, True), done.err
    assert subprocess.run(["bash", "-n"], input=done.out, text=True, capture_output=True).stderr == ""
    place_of_run = subprocess.run(
        ["bash", "-c", f'{re.search("^RUN=.*$", done.out, re.MULTILINE)[0]}; printf %s "$RUN"'], capture_output=True
    )
    assert place_of_run.stdout.decode() == os.path.abspath(f"/tmp/x/{runs}/run")


# --- jobs that were not noted, or whose outcome is not known


def program_first(place, monkeypatch, name: str, lines: str) -> None:
    """A program of Slurm's that does something else, and has the real one as $real."""
    real = shutil.which(name)
    directory = place.path / "first"
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/bash\nreal={real} flag={directory}/flag\n{lines}\n")
    (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(directory), prepend=":")


SLOW = 'answer=$("$real" "$@") || exit; touch "$flag"; exec >/dev/null 2>&1 sleep 20'
FAILS_AFTERWARDS = '[ ! -e "$flag" ] || { echo "Socket timed out" >&2; exit 1; }; exec "$real" "$@"'


def unfinished() -> list[str]:
    return [job.id for job in client.queue() if job.state in ("RUNNING", "PENDING")]


def test_a_job_that_was_not_noted_is_found_by_its_script(place):
    job_of(place.submit(*NODES, "--", "--hold"))
    client.cancel(place.jobs()[0])
    by_hand = client.submit(place.submission / "job.sh")
    assert f"job {by_hand}" in hpclr("status", place.run).out + hpclr("cancel", place.run).out
    ghost = client.submit(place.submission / "job.sh")
    (place.run / "logs" / "jobs").unlink()
    for again in (place.submit(*NODES), hpclr("resume", place.run)):
        assert (again.code, f"a job that waits or runs: {ghost} (pending)" in again.err) == (2, True), again.err
    shutil.rmtree(place.run)
    assert f"{ghost} (pending)" in place.submit(*NODES).err
    assert not place.run.exists()


def test_a_number_that_slurm_has_given_again_is_no_job_of_ours(place):
    job = job_of(place.submit(*NODES, "--", "--hold"))
    other = place.path / "runs" / "other"
    (other / "logs").mkdir(parents=True)
    note_jobs(other, (job,), "submit", other / "submission" / "job.sh")
    assert job_of(place.submit(*NODES, "name=other", "--", "--hold")) != job
    client.cancel([entry.jobs[0] for entry in submitted(other)][1:])
    note_jobs(other, (job,), "submit", other / "submission" / "job.sh")
    done = hpclr("cancel", other)
    assert (done.code, "nothing to cancel" in done.err) == (2, True), done.err
    assert unfinished() == [job]


def test_a_submission_that_was_answered_too_late_counts(place, monkeypatch):
    program_first(place, monkeypatch, "sbatch", SLOW)
    monkeypatch.setattr(client, "_PATIENCE_OF_SBATCH", 2.0)
    job = job_of(place.submit(*NODES, "--", "--hold"))
    assert (unfinished(), place.jobs()) == ([job], [(job,)])


def test_nothing_is_undone_while_slurm_does_not_say_whether_it_was_done(place, monkeypatch):
    program_first(place, monkeypatch, "sbatch", SLOW)
    program_first(place, monkeypatch, "squeue", FAILS_AFTERWARDS)
    monkeypatch.setattr(client, "_PATIENCE_OF_SBATCH", 2.0)
    done = place.submit(*NODES, "--", "--hold")
    assert (done.code, "Whether the job was submitted is not known" in done.err) == (75, True), done.err
    (place.path / "first" / "flag").unlink()
    assert [entry.name for entry in place.run.iterdir() if "tmp" in entry.name or "lock" in entry.name] == []
    assert "waits or runs" in place.submit(*NODES).err
    assert hpclr("cancel", place.run).code == 0
    assert unfinished() == []


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_submission_that_is_interrupted_is_undone(number, place, monkeypatch):
    program_first(place, monkeypatch, "sbatch", SLOW)
    command = [sys.executable, "-m", "hpclr", "submit", str(place.write()), *map(str, (*CPU, *NODES)), "--", "--hold"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 30
    while not (place.path / "first" / "flag").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    second = place.submit(*NODES)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert second.code == 2
    assert re.search("just being submitted by process|a job that waits or runs", second.err), second.err
    assert (process.returncode, out) == (1 if number == signal.SIGINT else 128 + number, "")
    assert "hpclr: interrupted; cancelled again: " in err
    assert not place.run.exists()
    assert unfinished() == []


def test_without_an_answer_of_squeue_nothing_is_submitted(place, monkeypatch):
    program_first(place, monkeypatch, "squeue", 'echo "Socket timed out on send/recv operation" >&2; exit 1')
    done = place.submit(*NODES)
    (place.path / "first" / "squeue").unlink()
    assert (done.code, "Socket timed out on send/recv operation" in done.err) == (75, True), done.err
    assert not place.run.exists()
    assert unfinished() == []


def test_jobs_are_submitted_though_they_could_not_start_now(place, monkeypatch):
    """As where nodes are drained; sbatch refuses a trial then."""
    refusal = 'case " $* " in *" --test-only "*) echo "sbatch: error: nodes are drained" >&2; exit 1 ;; esac'
    program_first(place, monkeypatch, "sbatch", f'{refusal}\nexec "$real" "$@"')
    assert job_of(place.submit(*NODES, "--", "--hold"))


def test_a_run_is_resumed_whose_dependency_is_gone(place):
    first = job_of(place.submit(*NODES, "--", "--hold"))
    job = job_of(place.submit(*NODES, "name=second", "--dependency", f"afterok:{first}"))
    client.cancel([first, job])
    done = hpclr("resume", place.path / "runs" / "second")
    resumed = job_of(done)
    assert f"--dependency=afterok:{first} was for the first submission" in done.err
    assert client.queue([resumed])[0].dependency == ""


# --- all the way


def image_of_this_machine(path: Path) -> list[str]:
    """A directory in which everything is bound that is here, and this Python at the place of that of an image."""
    words = ["--container", str(path), "--runtime", "bubblewrap", "--bind", f"{sys.prefix}:/opt/hpclr"]
    for entry in Path("/").iterdir():
        if entry.is_symlink():
            (path / entry.name).symlink_to(entry.readlink())
        elif entry.is_dir():
            (path / entry.name).mkdir()
            words += [] if entry.name in ("dev", "opt", "proc", "sys", "tmp") else ["--bind", str(entry)]
    (path / "opt" / "hpclr").mkdir()
    return words


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "torchrun", "mpirun"])
@pytest.mark.parametrize("contained", [False, True], ids=["bare", "container"])
def test_a_job_on_two_nodes_gives_what_four_processes_here_give(
    launcher, contained, place, real_slurm, tmp_path_factory
):
    words = image_of_this_machine(tmp_path_factory.mktemp("image")) if contained else []
    done = hpclr_command("launch", "-n", 4, place.write(**TARGET))
    assert done.returncode == 0, done.stderr
    here = place.run.rename(place.path / "here")
    job = job_of(place.submit(*NODES, "--launcher", launcher, *words, **TARGET))
    found = real_slurm.wait(job, limit=120)
    assert found.state == "COMPLETED", (place.run / "logs" / f"{job}_0_log.err").read_text()
    assert_same_run(here, place.run)
