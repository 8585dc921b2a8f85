"""`hpclr submit` where something is amiss: others who submit, what was left by killed ones, unreadable files, git."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from submit_helpers import TARGET, make_place
from training_helpers import hpclr

from hpclr.cluster import submit as submitting_room
from hpclr.cluster.record import note_jobs, read_submission, submitted
from hpclr.cluster.submit import Resources, prepare, write
from hpclr.cluster.submitting import submitting
from hpclr.config import load_run_file
from hpclr.errors import UsageError


@pytest.fixture
def place(tmp_path, few_digits, monkeypatch):
    """The current directory of a machine without Slurm."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "git"):
        os.symlink(shutil.which(name), tmp_path / "bin" / name)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HPCLR_RUNS", "runs")
    monkeypatch.chdir(tmp_path)
    return make_place(tmp_path, few_digits)


def finding(prepared, what):
    return next(found for found in prepared.checks if found.what == what)


# --- one at a time


def test_nobody_else_submits_meanwhile(place):
    said = rf"just being submitted by process {os.getpid()} on .*, of .*, since .* UTC .*it is alive"
    with submitting(place.run), pytest.raises(UsageError, match=said):
        write(place.prepared())
    assert not place.run.exists()
    assert write(place.prepared()).exists()


def test_who_was_killed_is_taken_over_from(place, capfd):
    program = "import os, sys, pathlib\nfrom hpclr.cluster.submitting import submitting\n"
    program += "with submitting(pathlib.Path(sys.argv[1])): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", program, str(place.run)]).returncode == 9
    assert [entry.name for entry in place.run.iterdir()] == [".lock-submit"]
    write(place.prepared())
    assert "that process has ended" in capfd.readouterr().err
    assert [entry.name for entry in place.run.iterdir()] == ["submission"]


@pytest.mark.parametrize("content", [b"", b"{"])
def test_a_record_that_cannot_be_read_is_nobody_gone(content, place):
    place.run.mkdir(parents=True)
    (place.run / ".lock-submit").write_bytes(content)
    with pytest.raises(UsageError, match=r"remove .*\.lock-submit if you know that it is gone"):
        write(place.prepared())


def test_a_submission_that_was_only_moved_aside_is_put_back(place):
    write(place.prepared())
    was = place.listing()
    place.submission.rename(place.run / ".tmp-submission-old-1")
    shutil.copytree(place.run / ".tmp-submission-old-1", place.run / ".tmp-submission-new-2")  # was not in place yet
    with submitting(place.run):
        pass
    assert place.listing() == was
    shutil.copytree(place.submission, place.run / ".tmp-submission-old-3")
    with submitting(place.run):
        pass
    assert place.listing() == was


def test_numbers_of_jobs_are_noted_whole_or_not_at_all(tmp_path):
    """On a disk that has room for a part of the line."""
    (tmp_path / "logs").mkdir()
    note_jobs(tmp_path, ("1",), "submit", "/x/job.sh")
    before = (tmp_path / "logs" / "jobs").read_bytes()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20,) * 2)
        try:
            note_jobs(tmp_path, ("2",), "submit")
        except OSError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert (tmp_path / "logs" / "jobs").read_bytes() == before
    note_jobs(tmp_path, ("3",), "resume")
    assert [(entry.jobs, entry.script) for entry in submitted(tmp_path)] == [(("1",), "/x/job.sh"), (("3",), "")]


# --- what is asked for


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--runtime", "bubblewrap"), "--runtime: needs --container"),
        (("--bind", "/x"), "--bind: needs --container"),
        (("--attempts", 3, "--chain", 2), "--attempts and --chain exclude one another"),
        (("--", "--ntasks=3"), "--ntasks-per-node N, the number on each node, before --"),
        (("--", "--time=3"), "hpclr's own option --time, before --"),
    ],
)
def test_options_that_would_count_for_nothing_are_refused(words, said, place):
    done = place.submit("--dry-run", *words)
    assert (done.code, said in done.err) == (2, True), done.err


def test_gpus_that_would_be_idle(place):
    found = finding(place.prepared(Resources(gpus_per_node=2, time="10"), train={"device": "cpu"}), "processes")
    assert (found.sure, "train.device is cpu: the GPUs would be idle" in found.text) == (False, True)
    assert "1 × 1 process by srun" in finding(place.prepared(Resources(ntasks_per_node=1)), "processes").text


def in_image(place, runtime: str, image: str = "image", binds: tuple[str, ...] = ()):
    (place.path / "image").mkdir(exist_ok=True)
    (place.path / "image.sif").touch()
    resources = Resources(ntasks_per_node=2, container=image, runtime=runtime, binds=binds)
    return finding(place.prepared(resources), "image")


def test_a_container_is_looked_at(place):
    for runtime in ("bubblewrap", "charliecloud"):
        with pytest.raises(UsageError, match=f"{runtime} needs a directory, found a file"):
            in_image(place, runtime, "image.sif")
    assert in_image(place, "apptainer", "image.sif").sure
    assert "there is no python in it" in in_image(place, "bubblewrap").text
    missing = in_image(place, "apptainer", "image.sif", (f"{place.path}/nowhere:/x",))
    assert (missing.sure, f"{place.path}/nowhere, to be bound, is not here" in missing.text) == (False, True)
    (place.path / "own" / "bin").mkdir(parents=True)
    (place.path / "own" / "bin" / "python").symlink_to("nowhere/outside")
    assert in_image(place, "bubblewrap", binds=(f"{place.path}/own:/opt/hpclr",)).sure
    (place.path / "image" / "usr").mkdir()
    (place.path / "own" / "bin").rename(place.path / "image" / "usr" / "bin")
    assert in_image(place, "charliecloud").sure


# --- code


@pytest.mark.parametrize("wrong", ["diff*) exit 128", "rev-parse*) exit 128", "diff*) sleep 9"])
def test_a_git_that_does_not_tell_is_not_taken_for_no_changes(wrong, place, monkeypatch):
    monkeypatch.setattr("hpclr.cluster.snapshot._PATIENCE", 2.0)
    who = ("-c", "user.name=x", "-c", "user.email=x")
    for words in (["init"], ["add", "net.py"], ["commit", "-m", "x"]):
        subprocess.run(["git", *who, *words], check=True, capture_output=True)
    real = os.readlink(place.path / "bin" / "git")
    (place.path / "bin" / "git").unlink()
    (place.path / "bin" / "git").write_text(
        f'#!/bin/bash\ncase $3 in {wrong} ;; esac\nexec {real} "$@"\n'.replace("sleep", "exec /bin/sleep")
    )
    (place.path / "bin" / "git").chmod(0o755)
    prepared = place.prepared(**TARGET)
    assert not finding(prepared, "changes").sure
    write(prepared)
    assert read_submission(place.run).changes == "unknown"


@pytest.fixture
def nobody():
    """A user who may not read everything, and a directory that he may enter."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        yield Path(directory)
        os.seteuid(before)


@pytest.mark.parametrize("closed", ["net.py", "helpers.py", "helpers/deep.py", "helpers/data.txt", "helpers/priv"])
def test_code_that_cannot_be_read_is_named(closed, place, nobody, few_digits, monkeypatch):
    if os.geteuid() == 65534:
        os.seteuid(0)
    there = make_place(nobody, few_digits)
    if "/" in closed:
        (nobody / "helpers.py").unlink()
        (nobody / "helpers").mkdir()
        for name in ("__init__.py", "deep.py", "data.txt"):
            (nobody / "helpers" / name).touch()
        (nobody / "helpers" / "priv").mkdir()
    run = load_run_file(there.write(**TARGET))
    os.chmod(nobody / closed, 0)
    monkeypatch.chdir(nobody)
    if os.geteuid() == 0:
        os.seteuid(65534)
    with pytest.raises(UsageError, match=rf"{nobody / closed}: this code would be copied .* Make it readable"):
        prepare(run, Path("/tmp"), Resources(ntasks_per_node=2), ["hpclr"])
    os.seteuid(os.getuid())
    os.chmod(nobody / closed, 0o755)


def test_runs_in_a_closed_directory(place, nobody, few_digits, monkeypatch):
    os.seteuid(os.getuid())
    there = make_place(nobody, few_digits)
    (nobody / "closed").mkdir(mode=0)
    run = load_run_file(there.write())
    monkeypatch.chdir(nobody)
    if os.getuid() == 0:
        os.seteuid(65534)
    with pytest.raises(UsageError, match="closed/runs/run"):
        prepare(run, Path("closed/runs"), Resources(ntasks_per_node=2), ["hpclr"])
    os.seteuid(os.getuid())
    os.chmod(nobody / "closed", 0o755)


# --- resume


def test_a_run_whose_data_is_gone_is_not_resumed(place):
    write(place.prepared())
    (place.path / "digits.h5").unlink()
    done = hpclr("resume", place.run)
    assert (done.code, "digits.h5: the dataset cannot be opened" in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    ("asked", "again"),
    [
        (None, []),
        ("singleton", []),
        ("afterok:1", ["--dependency="]),
        ("afterok:1:2,singleton,after:3+5", ["--dependency=singleton"]),
        ("afterany:1?afterok:2", ["--dependency="]),
    ],
)
def test_a_run_does_not_wait_again_for_jobs_that_are_gone(asked, again, place):
    options = () if asked is None else (f"--dependency={asked}",)
    script = write(place.prepared(Resources(ntasks_per_node=2, options=options)))
    assert submitting_room._fresh_dependency(script) == again
