"""`hpclr status`, `hpclr cancel`: runs in every condition, by their files, their processes and a real Slurm."""

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from watching_helpers import Questions, attempt_with_log, away_slurm, killed_in, owned_elsewhere, unfinished

from hpclr.cli import status as command
from hpclr.cluster import progress
from hpclr.cluster.control import cancel, stop
from hpclr.cluster.progress import progress_of
from hpclr.cluster.queued import current, is_over
from hpclr.cluster.record import note_jobs
from hpclr.cluster.status import runs_in, statuses
from hpclr.errors import UsageError
from hpclr.parallel.watch.outcome import Outcome
from hpclr.slurm import client
from hpclr.slurm.jobs import Job
from hpclr.training.lock import locked

sys.path.append(str(Path(__file__).parents[1] / "training"))
from training_helpers import hpclr, records, run_file, steps_kept, summary

JOB = "#!/bin/bash\n#SBATCH --output=/dev/null --time=10\nsleep 60\n"
FORGOTTEN = "Slurm no longer knows its job"
FAILS = "#!/bin/bash\n#SBATCH --output=/dev/null --time=10\nexit 2\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of three epochs of five steps each."""
    place = tmp_path_factory.mktemp("trained")
    assert (
        hpclr("data", "prepare", "digits", place / "digits.h5", "--valid-fraction", "0.1", "--limit", "300").code == 0
    )
    (place / "run.yaml").write_text(json.dumps(run_file(place / "digits.h5", train={"epochs": 3})))
    done = hpclr("train", place / "run.yaml", "--runs-dir", place)
    assert done.code == 0, done.err
    return place / "run"


@pytest.fixture
def without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "no commands"))


def status_of(run: Path):
    (found,) = statuses([run])
    return found


def test_a_finished_run(trained, without_slurm):
    found = status_of(trained)
    assert (found.summary, found.live, found.job, found.ends) == ("finished", False, None, None)
    run, last = found.progress, records(trained, "train")[-1]
    assert (run.attempt, run.step, run.steps, run.loss) == (1, 15, 15, last["loss"])
    shares = [layer["rank"] / min(layer["shape"]) for layer in summary(trained)["layers"] if layer["converted"]]
    assert run.rank_share == sum(shares) / len(shares)
    sizes = summary(trained)["sizes"]
    assert run.trained_share == sizes["trainable"] / sizes["dense"]
    assert run.saved_step == max(steps_kept(trained))
    assert 0 <= run.save_age < 600


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        (Outcome(85, "STOP (end: by mia): the run is saved at step 7 of 15"), "stopped"),
        (Outcome(1, "the loss of step 9 is nan"), "failed"),
        (Outcome(75, "the disk is full"), "failed"),
        (None, "killed"),
    ],
    ids=["saved", "failed", "retry", "none"],
)
def test_a_run_that_nobody_trains(outcome, state, trained, tmp_path, without_slurm):
    run = unfinished(trained, tmp_path / "run", outcome)
    killed_in(run)
    found = status_of(run)
    assert (found.state, found.live, found.ends) == (state, False, None)
    shown = hpclr("status", run).out
    assert (outcome is not None and outcome.message in shown) == (state == "failed")


def test_a_run_that_is_new(tmp_path, without_slurm):
    (tmp_path / "run" / "submission").mkdir(parents=True)
    found = status_of(tmp_path / "run")
    assert (found.state, found.progress.step, found.progress.steps) == ("new", None, None)


def test_a_run_that_trains_here(trained, tmp_path, without_slurm):
    run = unfinished(trained, tmp_path / "run")
    with locked(run):
        found = status_of(run)
        assert (found.state, found.live) == ("training", True)
        assert found.ends is not None
    assert status_of(run).state == "killed"


@pytest.mark.parametrize(("age", "state"), [(1, "training"), (600, "silent")])
def test_a_run_that_trains_elsewhere_is_judged_by_its_heartbeats(age, state, trained, tmp_path, without_slurm):
    run = unfinished(trained, tmp_path / "run")
    owned_elsewhere(run, job=Job("77", 0, "far"))
    for path in [*run.glob(".locks/*"), *run.glob("logs/*/*.heartbeat")]:
        os.utime(path, (time.time() - age,) * 2)
    found = status_of(run)
    assert (found.state, found.live, found.job) == (state, True if state == "training" else None, "77")
    assert found.reason == ("on n7" if state == "training" else "no sign of life for 10 min")


def test_the_length_of_a_run_is_known_from_its_first_step(trained, tmp_path):
    run = unfinished(trained, tmp_path / "run")
    (run / "metrics.jsonl").write_text(json.dumps(records(run, "train")[0]) + '\n{"kind":"train","st')
    found = progress_of(run)
    assert (found.step, found.steps) == (1, 15)


def test_only_the_end_of_long_metrics_is_read(trained, tmp_path, monkeypatch):
    run = unfinished(trained, tmp_path / "run")
    whole = progress_of(run)
    content = (run / "metrics.jsonl").read_bytes()
    for size in range(1, len(content), 61):  # wherever it is cut
        monkeypatch.setattr(progress, "_TAIL", size)
        found = progress_of(run)
        assert (found.step, found.steps) == (15, 15)  # of the newest checkpoint, if need be
        assert found.loss in (None, whole.loss)
    assert found.loss == whole.loss


def test_a_line_nested_without_end_does_no_harm(trained, tmp_path):
    run = unfinished(trained, tmp_path / "run")
    whole = progress_of(run)
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind":"check","step":15,"ranks":' + 50_000 * '{"a":' + "1" + 50_001 * "}" + "\n")
    found = progress_of(run)
    assert (found.step, found.loss, found.rank_share) == (whole.step, whole.loss, whole.rank_share)


def test_layers_that_are_still_dense_have_no_rank(trained, tmp_path):
    run = unfinished(trained, tmp_path / "run")
    first = [record for record in records(run) if record["step"] <= 5]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in first))
    assert any(record["kind"] == "check" for record in first)
    assert progress_of(run).rank_share is None


@pytest.mark.parametrize(
    ("saved", "speed"),
    [
        ({0: 1000, 10: 1010}, 15 / 50),  # the first attempt: since its first checkpoint
        ({0: 1000}, 15 / 50),
        ({0: 900, 5: 950}, 10 / 50),  # one that goes on from step 5
        ({0: 900, 5: 950, 10: 1040}, 10 / 50),
        ({0: 900, 5: 950, 10: 1010, 12: 1040}, 5 / 40),  # enough of its own
        ({5: 1010, 10: 1040}, 10 / 40),  # the earlier ones are deleted
        ({10: 1040, 12: 1045}, 5 / 10),
        ({}, 15 / 50),
    ],
    ids=str,
)
def test_the_speed(saved, speed, trained, tmp_path):
    """Of step 15 at 1050 s, in an attempt that began at 1000 s."""
    run = unfinished(trained, tmp_path / "run")
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    for step, when in saved.items():
        path = run / "checkpoints" / f"step-{step:08d}.h5.sha256"
        path.touch()
        os.utime(path, (when, when))
    os.utime(run / "environment.json", (1000, 1000))
    os.utime(run / "metrics.jsonl", (1050, 1050))
    assert progress_of(run).speed == pytest.approx(speed)


@settings(max_examples=30, deadline=None)
@given(
    content=st.binary(max_size=300), name=st.sampled_from(["metrics.jsonl", "run.yaml", "logs/jobs", ".locks/000001"])
)
def test_files_that_are_damaged_hide_only_what_they_would_tell(content, name, trained, tmp_path_factory):
    run = unfinished(trained, tmp_path_factory.mktemp("damaged") / "run", Outcome(85, "saved"))
    (run / name).write_bytes(content)
    (run / "logs" / "attempt-01" / "exit.json").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = status_of(run)
    assert found.progress.saved_step == 15


def test_all_runs_are_shown_but_those_set_aside(trained, tmp_path, monkeypatch, without_slurm):
    for name in ("b", "a", "a.old-1"):
        shutil.copytree(trained, tmp_path / "runs" / name)
    (tmp_path / "runs" / "no run").mkdir()
    (tmp_path / "runs" / "file").touch()
    assert [run.name for run in runs_in(tmp_path / "runs")] == ["a", "b"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPCLR_RUNS", raising=False)
    done = hpclr("status")
    assert [line.split()[:2] for line in done.out.splitlines()[1:]] == [["a", "finished"], ["b", "finished"]]
    assert hpclr("status", "--runs-dir", tmp_path / "none").err == f"no runs in {tmp_path / 'none'}\n"
    done = hpclr("status", "runs/no run")
    assert (done.code, "expected the directory of one" in done.err) == (2, True)


def test_everything_for_programs(trained, without_slurm):
    (found,) = json.loads(hpclr("status", "--json", trained).out)
    assert (found["run"], found["state"], found["live"]) == (str(trained), "finished", False)
    assert (found["step"], found["steps"], found["outcome"]["code"]) == (15, 15, 0)


def test_what_others_have_written_cannot_drive_the_terminal(trained, tmp_path, without_slurm):
    run = unfinished(trained, tmp_path / "run\x1b[31m", Outcome(1, "\x1b]0;title\x07"))
    done = hpclr("status", run)
    assert "\x1b" not in done.out
    assert "\\x1b[31m" in done.out
    assert "\\x1b]0;title\\x07" in done.out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2.0 h"), (172_800, "2.0 d")],
)
def test_durations(seconds, text):
    assert command._duration(seconds) == text


def queued_job(number: str, state: str) -> client.QueuedJob:
    return client.QueuedJob(number, "run", "main", state, "None", 1, "", 0, 60, 0, None, "")


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["FAILED", "RUNNING", "PENDING"], "1"),
        (["FAILED", "PENDING", "PENDING"], "1"),
        (["FAILED", "COMPLETED"], "1"),
        (["PENDING", "COMPLETING"], "1"),
        (["PREEMPTED"], "0"),
        ([], None),
    ],
    ids=str,
)
def test_which_job_of_a_run_is_shown(states, expected):
    jobs = {str(number): queued_job(str(number), state) for number, state in enumerate(states)}
    assert current(jobs) == expected


def test_a_slurm_that_does_not_answer(trained, tmp_path, monkeypatch):
    run = unfinished(trained, tmp_path / "run", Outcome(85, "saved"))
    note_jobs(run, ("12",), "submit")
    away_slurm(tmp_path, monkeypatch)
    done = hpclr("status", run)
    assert (done.code, "unknown (Slurm does not say; by its files stopped)  12 " in done.out) == (0, True)
    assert "the states of jobs are not known: squeue has failed" in done.err.replace(" --noheader", "")
    done = hpclr("cancel", run)
    assert (done.code, "Unable to contact" in done.err) == (75, True)
    (found,) = json.loads(hpclr("status", "--json", run).out)
    assert (found["state"], found["live"], found["job"]) == ("unknown", None, "12")
    (run / "summary.json").touch()
    assert (status_of(run).summary, status_of(run).live) == ("finished", False)


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.yaml", "environment.json", "logs/attempt-01/exit.json"])
def test_a_pipe_does_not_hold_up_who_looks(name, trained, tmp_path, without_slurm):
    run = unfinished(trained, tmp_path / "run", Outcome(85, "saved"))
    (run / name).unlink()
    os.mkfifo(run / name)
    if name == "run.yaml":  # it is read where no attempt has recorded the number of steps
        (run / "environment.json").unlink()
    looking = [sys.executable, "-m", "hpclr", "status", "--json", run]
    (found,) = json.loads(subprocess.run(looking, capture_output=True, timeout=20).stdout)
    assert found["saved_step"] == 15


def test_a_name_of_two_lines_is_one_row(trained, tmp_path, without_slurm):
    run = unfinished(trained, tmp_path / "two\nlines", Outcome(1, "failed\nin two ways"))
    _, row, why = hpclr("status", run).out.splitlines()
    assert row.startswith("two\\nlines  failed")
    assert why.endswith("two\\nlines: failed\\nin two ways")


@pytest.mark.parametrize("log", ["local.log", "7_0_log.err"])
def test_why_a_run_has_failed_before_its_first_attempt(log, tmp_path, without_slurm):
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (run / "submission").mkdir()
    (run / "logs" / log).write_text("Loading a module\nhpclr: warning: it is slow\n")
    assert status_of(run).state == "new"
    with (run / "logs" / log).open("a") as file:
        file.write("hpclr: digits.h5: the dataset cannot be opened\n\n")
    assert hpclr("status", run).out.splitlines()[1].split()[:3] == ["run", "failed", "–"]
    assert hpclr("status", run).out.splitlines()[2] == f"{run}: digits.h5: the dataset cannot be opened"
    assert status_of(run).progress.complaint == "digits.h5: the dataset cannot be opened"


# On a real Slurm


class Submitted:
    """Runs with jobs that only wait for their end."""

    def __init__(self, cluster, path: Path) -> None:
        self.cluster, self.path = cluster, path

    def run(self, name: str, jobs: tuple[str, ...]) -> Path:
        run = self.path / "runs" / name
        (run / "logs").mkdir(parents=True)
        (run / "submission").mkdir()
        note_jobs(run, jobs, "submit", self.path / "job.sh")
        return run

    def job(self, *options: str, text: str = JOB) -> str:
        script = self.path / "job.sh"
        script.write_text(text)
        return client.submit(script, options)


@pytest.fixture
def submitted(real_slurm, tmp_path):
    yield Submitted(real_slurm, tmp_path)
    client.cancel([job.id for job in client.queue() if not is_over(job)])


def test_jobs_of_all_kinds_with_one_question(submitted, tmp_path, monkeypatch):
    running = submitted.job()
    submitted.cluster.wait(running, "RUNNING")
    chain = (running, submitted.job(f"--dependency=afternotok:{running}"))
    waiting = submitted.job("--begin=now+1hour")
    runs = [
        submitted.run("chain", chain),
        submitted.run("waiting", (waiting,)),
        submitted.run("forgotten", ("999999",)),
        submitted.run("by-hand", ()),
    ]
    questions = Questions(tmp_path)
    monkeypatch.setenv("PATH", f"{questions.directory}:{os.environ['PATH']}")
    found = statuses(runs)
    assert len(questions.asked()) == 1
    assert [status.summary for status in found] == ["RUNNING", "PENDING (BeginTime)", f"cancelled ({FORGOTTEN})", "new"]
    assert [status.job for status in found] == [running, waiting, "999999", None]
    assert 0 < found[0].time_left <= 600
    assert 3000 < (found[1].starts - datetime.now()).total_seconds() <= 3600
    assert [status.live for status in found] == [True, True, False, False]
    line = hpclr("status", *runs).out.splitlines()[2]
    assert "PENDING (BeginTime), from " in line


def test_elements_of_an_array(submitted, tmp_path, monkeypatch):
    array = submitted.job("--array=0-3%1")
    runs = [submitted.run(f"run{number}", (f"{array}_{number}",)) for number in range(3)]
    end = time.monotonic() + 60
    while status_of(runs[0]).state != "RUNNING":
        assert time.monotonic() < end
        time.sleep(0.1)
    questions = Questions(tmp_path)
    monkeypatch.setenv("PATH", f"{questions.directory}:{os.environ['PATH']}")
    found = statuses(runs)
    assert len(questions.asked()) == 2
    assert [status.summary for status in found] == ["RUNNING", *["PENDING (JobArrayTaskLimit)"] * 2]
    assert [status.job for status in found] == [f"{array}_{number}" for number in range(3)]
    assert list(cancel(runs[1])) == [f"{array}_1"]  # and not the whole array, whose number it has while it waits
    assert [status.state for status in statuses(runs)][::2] == ["RUNNING", "PENDING"]
    assert (status_of(runs[1]).summary, status_of(runs[1]).job) == (f"cancelled ({FORGOTTEN})", f"{array}_1")


def test_cancel_ends_all_jobs_of_a_chain(submitted):
    chain = [submitted.job()]
    chain += [submitted.job(f"--dependency=afternotok:{chain[0]}") for _ in range(2)]
    other = submitted.job()
    submitted.cluster.wait(chain[0], "RUNNING")
    run = submitted.run("chain", tuple(chain))
    with pytest.raises(UsageError, match="hpclr cancel"):
        stop(run)
    done = hpclr("cancel", run)
    assert done.code == 0, done.err
    assert done.out.splitlines()[1:] == [f"job {number}: was PENDING, is cancelled" for number in chain[1:]]
    assert [submitted.cluster.wait(job).state for job in chain] == ["CANCELLED"] * 3
    assert not is_over(client.queue([other])[0])
    with pytest.raises(UsageError, match=f"none of its jobs {', '.join(chain)} that waits or runs"):
        cancel(run)
    assert status_of(run).summary == "cancelled"


def test_a_job_that_is_over_says_nothing_of_who_trains_after_it(submitted, trained, tmp_path):
    number = submitted.job("--hold")
    run = unfinished(trained, tmp_path / "run", Outcome(85, "saved"))
    note_jobs(run, (number,), "submit", submitted.path / "job.sh")
    assert status_of(run).job == number
    cancel(run)
    assert (status_of(run).summary, status_of(run).job) == ("stopped (CANCELLED)", number)
    time.sleep(1)
    with locked(run):
        found = status_of(run)
        assert (found.state, found.job, found.time_left) == ("training", None, None)
    assert (status_of(run).summary, status_of(run).job) == ("stopped", None)


@pytest.mark.parametrize("waits", ["requeued", "chain"])
def test_a_job_that_waits_to_go_on_can_be_asked_to_end(waits, submitted):
    job = submitted.job()
    submitted.cluster.wait(job, "RUNNING")
    jobs = (job,) if waits == "requeued" else (job, submitted.job("--hold", f"--dependency=afternotok:{job}"))
    run = submitted.run("waiting", jobs)
    done = hpclr("stop", run)
    assert (done.code, "hpclr cancel" in done.err) == (2, True)  # it has not begun, as far as it has written
    if waits == "requeued":
        client.requeue(job)
        submitted.cluster.wait(job, "PENDING")
    else:
        (run / "logs" / "progress").write_text(f"{job} 0 0\n")
        client.cancel([job])
    done = hpclr("stop", run)
    assert done.code == 0, done.err
    assert f"Job {jobs[-1]} (PENDING) does not train now, and will not start training again" in done.out
    assert (run / "STOP").read_text().startswith("end by ")


def test_a_job_that_fails_before_it_trains(submitted):
    number = submitted.job(text=FAILS)
    submitted.cluster.wait(number)
    run = submitted.run("wrong", (number,))
    (run / "logs" / f"{number}_0_log.err").write_text("hpclr: no such module\n")
    assert status_of(run).summary == "failed (FAILED)"
    assert f"{run}: no such module\n" in hpclr("status", run).out
    done = hpclr("logs", "-f", run)
    assert (done.code, "the run is failed (FAILED)" in done.err) == (2, True)


def test_the_job_that_has_the_directory_counts_though_it_was_not_noted(submitted):
    """A batch script that the user has submitted by hand; and one whose node is silent."""
    number = submitted.job()
    submitted.cluster.wait(number, "RUNNING")
    run = submitted.run("own", ())
    attempt_with_log(run)
    owner = owned_elsewhere(run, job=Job(number, 0, "test"))
    assert status_of(run).summary == "RUNNING"
    os.utime(run / ".locks" / "000009", (time.time() - 600,) * 2)
    assert status_of(run).summary == "RUNNING (no sign of life for 10 min)"
    owned_elsewhere(run, job=replace(owner.job, id="999999"))
    os.utime(run / ".locks" / "000009", (time.time() - 600,) * 2)
    assert status_of(run).state == "killed"
