"""Answers as real Slurm 22.05 gave them."""

import os

import pytest

from hpclr.slurm.jobs import Job, has_ended, this_job

CONFIG = "Configuration data as of 2026-01-01T12:00:00\nAccountingStorageType = none\nClusterName             = ci\n"
GONE = "slurm_load_jobs error: Invalid job id specified"


def line(number: int, state: str, restarts: int) -> str:
    return f"{number!s:<20}{state:<30}{restarts!s:<12}\n"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Puts commands on the path that answer as they are told; returns a function that tells them, and their log."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    asked = tmp_path / "asked"

    def answer(out: str = "", err: str = "", code: int = 0, config: str = CONFIG, before: str = ""):
        (tmp_path / "out").write_text(out)
        (tmp_path / "config").write_text(config)
        for name, text in {
            "squeue": f'echo "$@" >> {asked}\n{before}\ncat {tmp_path}/out; echo "{err}" >&2; exit {code}',
            "scontrol": f"cat {tmp_path}/config",
        }.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        return asked

    return answer


@pytest.mark.parametrize(
    ("state", "restarts", "ended"),
    [
        ("RUNNING", 1, False),
        ("RUNNING", 2, True),  # requeued, and running again
        ("SUSPENDED", 1, False),
        ("STOPPED", 1, False),
        ("COMPLETING", 1, False),
        ("COMPLETING", 2, False),  # requeued, but its processes may still be there
        ("PENDING", 2, True),
        ("REQUEUED", 2, True),
        ("REQUEUE_HOLD", 2, True),
        *[(state, 1, True) for state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")],
        *[(state, 1, True) for state in ("BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "REVOKED")],
        ("STAGE_OUT", 2, None),
        ("INVENTED", 1, None),
    ],
)
def test_what_the_states_mean(state, restarts, ended, slurm):
    asked = slurm(line(44, "FAILED", 9) + line(4, state, restarts) + line(5, "FAILED", 9))
    assert has_ended(Job("4", 1, "ci"), own=False) is ended
    assert "--all --states=all" in asked.read_text()
    assert "--jobs=4 " in asked.read_text()


@pytest.mark.parametrize(
    "listing", ["", "4\n", "4 RUNNING\n", "4 RUNNING N/A\n", "4 R\x00 1\n", "5 FAILED 1\n", "4 FAILED ²\n"]
)
def test_an_answer_that_is_not_understood_says_nothing(listing, slurm):
    slurm(listing)
    assert has_ended(Job("4", 1, "ci"), own=True) is None


def test_a_job_that_slurm_has_forgotten(slurm):
    """Of another user's, it may only say so."""
    slurm(err=GONE, code=1)
    assert has_ended(Job("4", 1, "ci"), own=True) is True
    assert has_ended(Job("4", 1, "ci"), own=False) is None


def test_a_controller_that_cannot_be_reached_says_nothing(slurm):
    slurm(err="slurm_load_jobs error: Unable to contact slurm controller (connect failure)", code=1)
    assert has_ended(Job("4", 1, "ci"), own=True) is None


def test_a_controller_that_does_not_answer_is_not_waited_for(slurm, monkeypatch):
    monkeypatch.setattr("hpclr.slurm.jobs._PATIENCE", 0.2)
    slurm(line(4, "FAILED", 1), before="exec sleep 20")
    assert has_ended(Job("4", 1, "ci"), own=True) is None


@pytest.mark.parametrize("job", [Job("4", 1, "other"), Job("4", 1, ""), Job("4 --me", 1, "ci"), Job("", 1, "ci")])
def test_other_clusters_and_no_job_are_not_asked_about(job, slurm):
    asked = slurm(line(4, "FAILED", 1))
    assert has_ended(job, own=True) is None
    assert not asked.exists()


def test_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert has_ended(Job("4", 1, "ci"), own=True) is None


def test_settings_of_the_user_do_not_change_the_question(slurm, monkeypatch):
    for name in ("SQUEUE_FORMAT", "SQUEUE_STATES", "SLURM_CLUSTERS"):
        monkeypatch.setenv(name, "x")
    slurm(line(4, "FAILED", 1), before='test -z "$SQUEUE_FORMAT$SQUEUE_STATES$SLURM_CLUSTERS" || exit 1')
    assert has_ended(Job("4", 1, "ci"), own=False) is True


@pytest.mark.parametrize(
    ("environ", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "", "SLURM_CLUSTER_NAME": "ci"}, None),
        ({"SLURM_JOB_ID": "4", "SLURM_CLUSTER_NAME": "ci"}, Job("4", 0, "ci")),
        ({"SLURM_JOB_ID": "4", "SLURM_RESTART_COUNT": "2"}, Job("4", 2, "")),
        ({"SLURM_JOB_ID": "10", "SLURM_JOB_ID_HET_GROUP_0": "9", "SLURM_CLUSTER_NAME": "ci"}, Job("9", 0, "ci")),
        ({"SLURM_JOB_ID": "5", "SLURM_ARRAY_JOB_ID": "2", "SLURM_ARRAY_TASK_ID": "1"}, Job("5", 0, "")),
    ],
)
def test_this_job(environ, job):
    assert this_job(environ) == job


def test_how_a_job_is_called():
    assert str(Job("4", 2, "ci")) == "job 4 (restart 2)"
