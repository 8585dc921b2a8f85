"""Slurm's commands as hpclr uses them: answers of several versions, and a real Slurm."""

import contextlib
import os
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpclr.errors import UsageError
from hpclr.slurm import client
from hpclr.slurm.client import SlurmError

JOB_22_05 = """JobId=12 JobName=it is JobState=FAILED
   UserId=me(1000) GroupId=me(1000) MCS_label=N/A
   Priority=4294901735 Nice=0 Account=(null) QOS=(null)
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:07 TimeLimit=1-00:00:00 TimeMin=N/A
   SubmitTime=2026-11-21T11:35:03 EligibleTime=2026-11-21T11:35:09
   StartTime=2026-11-21T11:35:09 EndTime=2026-11-22T11:35:09 Deadline=N/A
   Partition=main AllocNode:Sid=localhost:29928
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=n[1-2]
   BatchHost=n1
   NumNodes=2 NumCPUs=4 NumTasks=4 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   Command=/home/me/JobState=FAILED
   WorkDir=/home/me
   Comment=JobState=FAILED Restarts=9
   Power=
"""
# Also an element of an array; of 24 are the tree of resources and no Power.
JOB_24_05 = """JobId=13 ArrayJobId=12 ArrayTaskId=0 ArrayTaskThrottle=2 JobName=run
   UserId=me(1000) GroupId=me(1000) MCS_label=N/A
   JobState=OUT_OF_MEMORY Reason=OutOfMemory Dependency=(null)
   Requeue=0 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:9
   RunTime=00:05:00 TimeLimit=UNLIMITED TimeMin=N/A
   StartTime=2026-11-21T11:35:09 EndTime=Unknown Deadline=N/A
   NodeList=(null)
   ReqTRES=cpu=4,mem=8G,node=2,billing=4
   AllocTRES=cpu=4,mem=8G,node=2,billing=4

"""


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Puts commands on PATH that answer as told; their environment and arguments are kept in a file."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def answer(command: str, out: str = "", *, err: str = "", code: int = 0, before: str = "") -> Path:
        (tmp_path / "out").write_text(out)
        (tmp_path / "err").write_text(err)
        asked = tmp_path / "asked"
        show = f'(printf "%s\\n" "$@"; env) >{asked}; cat {tmp_path}/out; cat {tmp_path}/err >&2'
        (tmp_path / command).write_text(f"#!/bin/sh\n{before}\n{show}\nexit {code}\n")
        (tmp_path / command).chmod(0o755)
        return asked

    return answer


def listing(*jobs: tuple[str, ...]) -> str:
    return "".join("".join(f"{value}\x1f" for value in job) + "\n" for job in jobs)


def test_a_listing_of_jobs(answers):
    waits = ("8", "a|b\nc", "main,gpu", "PENDING", "Nodes required for job are DOWN", "2-4", "", "0:00", "2-00:00:00")
    runs = ("9", "", "main", "INVENTED", "None", "2", "n[1-2]", "1:02", "UNLIMITED")
    waits += ("1", "N/A", "afternotok:7(unfulfilled)", "/runs/a b/submission/job.sh arg")
    out = listing(waits, (*runs, "0", "2026-11-21T11:35:09", "(null)", "(null)"))
    answers("squeue", out + "a line that is not understood\n")
    first, second = client.queue()
    assert (first.id, first.name, first.partition, first.state) == ("8", "a|b\nc", "main,gpu", "PENDING")
    assert (first.nodes, first.time_left, first.restarts, first.start) == (2, 2 * 86400, 1, None)
    assert (first.reason, first.dependency) == ("Nodes required for job are DOWN", "afternotok:7(unfulfilled)")
    assert (second.state, second.time_used, second.time_left, second.dependency) == ("INVENTED", 62, None, "")
    assert second.start == datetime(2026, 11, 21, 11, 35, 9)
    assert (first.command, second.command) == ("/runs/a b/submission/job.sh arg", "")


def test_jobs_that_slurm_has_forgotten(answers):
    answers("squeue", err="slurm_load_jobs error: Invalid job id specified\n", code=1)
    answers("scontrol", err="slurm_load_jobs error: Invalid job id specified\n", code=1)
    assert client.queue(["4"]) == []
    assert client.details("4") is None


def test_what_is_asked_is_not_changed_by_settings(answers, monkeypatch):
    for name in ("SQUEUE_FORMAT", "SQUEUE_STATES", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT", "SBATCH_PARTITION"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    asked = answers("squeue")
    client.queue(["4", "5"], names=["run"])
    lines = asked.read_text().splitlines()
    assert {"--jobs=4,5", "--name=run", "--me", "LC_ALL=C", "SLURM_CONF=/etc/slurm.conf"} <= set(lines)
    assert not [line for line in lines if line.endswith("=x")]


def test_details_of_a_job(answers):
    answers("scontrol", JOB_22_05)
    job = client.details("12")
    assert (job.state, job.restarts, job.exit_code, job.time_limit) == ("RUNNING", 2, 0, 86400)
    assert (job.start, job.end) == (datetime(2026, 11, 21, 11, 35, 9), datetime(2026, 11, 22, 11, 35, 9))
    assert (job.node_list, job.fields["BatchHost"]) == ("n[1-2]", "n1")


def test_details_of_an_element_of_an_array(answers):
    answers("scontrol", JOB_22_05 + "\n" + JOB_24_05)
    job = client.details("13")
    assert (job.state, job.exit_code, job.time_limit, job.end) == ("OUT_OF_MEMORY", 137, None, None)
    assert client.details("12").state == "RUNNING"


@pytest.mark.parametrize("text", ["", "nonsense", "JobId=12", JOB_24_05])
def test_details_that_are_not_understood(text, answers):
    answers("scontrol", text)
    with pytest.raises(SlurmError, match="not understood"):
        client.details("12")


@pytest.mark.parametrize(
    ("resources", "gpus"),
    [
        ("(null)", 0),
        ("gpu:4", 4),
        ("gpu:a100:4(S:0-1)", 4),
        ("craynetwork:4,gpu:h100:2(S:0),gpu:a100:1", 3),
        ("mps:400,shard:8", 0),
        ("gpu:nvidia_a100_1g.5gb:7", 7),
    ],
)
def test_partitions(resources, gpus, answers, tmp_path):
    limits = "PartitionName=big Default=YES MaxNodes=8 MaxTime=2-00:00:00 State=DOWN TotalNodes=16\n"
    nodes = f"big|64|128000|(null)\nbig|128+|256000+|{resources}\nbigger|256|512000|gpu:8\n"
    answers("scontrol", limits)
    (tmp_path / "nodes").write_text(nodes)
    answers("sinfo", limits, before=f"exec cat {tmp_path}/nodes")
    assert client.partitions() == [client.Partition("big", True, False, 2 * 86400, 8, 16, 128, 256000, gpus)]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1-02:03:04", 93784),
        ("02:03:04", 7384),
        ("03:04", 184),
        ("30", 1800),
        ("1-02", 93600),
        ("1-02:03", 93780),
        ("365-00:00:00", 31536000),
        *[(text, None) for text in ("UNLIMITED", "INVALID", "NOT_SET", "N/A", "", "1:2:3:4", "-5", "٣")],
    ],
)
def test_times(text, seconds):
    assert client.seconds_of(text) == seconds


@pytest.mark.parametrize("out", ["123\n", "123;cluster\n", "Your project has 5 hours left\n123\n"])
def test_the_number_of_a_submitted_job(out, answers):
    answers("sbatch", out)
    assert client.submit(Path("job.sh")) == "123"


def test_a_submission_that_is_refused(answers):
    words = "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed"
    answers("sbatch", err=words, code=1)
    with pytest.raises(SlurmError) as error:
        client.submit(Path("job.sh"))
    assert error.value.exit_code == 1
    assert words.replace("\n", "; ") in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "slurm_load_jobs error: Socket timed out on send/recv operation",
        "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received",
    ],
)
def test_a_controller_that_is_away_may_come_back(words, answers):
    answers("squeue", err=words, code=1)
    with pytest.raises(SlurmError) as error:
        client.queue()
    assert error.value.exit_code == 75


def test_a_command_that_hangs(answers, monkeypatch):
    monkeypatch.setattr(client, "_PATIENCE_OF_SBATCH", 0.2)
    answers("sbatch", before="exec sleep 20")
    with pytest.raises(SlurmError, match="whether the job was submitted is not known") as error:
        client.submit(Path("job.sh"))
    assert error.value.exit_code == 75


def test_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not client.is_installed()
    with pytest.raises(UsageError, match="squeue cannot be run here"):
        client.queue()


@given(st.text())
def test_any_answer_is_taken_or_refused(text):
    """No line of Slurm's, of whatever version, is worth a traceback."""
    client._queued_job(text)
    client._gpus(text)
    client.seconds_of(text)
    client._time(text)
    with contextlib.suppress(SlurmError):
        client._details("12", "JobId=12\n" + text)


# --- a real one


def submitted(tmp_path, text: str = "true", *options: str) -> str:
    file = tmp_path / "job.sh"
    file.write_text(f"#!/bin/bash\n#SBATCH --output={tmp_path}/out\n#SBATCH --open-mode=append\n{text}\n")
    return client.submit(file, options)


def test_a_job_from_its_submission_to_its_end(real_slurm, tmp_path):
    job = submitted(tmp_path, "exit 3", "--job-name=it is a name", "--hold", "--nodes=2", "--time=1-00:00:00")
    waiting = client.queue([job])[0]
    assert (waiting.id, waiting.name, waiting.state, waiting.reason) == (job, "it is a name", "PENDING", "JobHeldUser")
    assert (waiting.nodes, waiting.time_left, waiting.restarts, waiting.node_list) == (2, 86400, 0, "")
    assert [found.id for found in client.queue(names=["it is a name"])] == [job]
    client._call("scontrol", "release", job)
    ended = real_slurm.wait(job)
    assert (ended.state, ended.reason, ended.exit_code) == ("FAILED", "NonZeroExitCode", 3)
    assert client.queue([job])[0].state == "FAILED"


def test_signal_requeue_and_cancel(real_slurm, tmp_path):
    job = submitted(tmp_path, "trap 'echo USR1; exit 0' USR1; echo $SLURM_RESTART_COUNT; while :; do sleep 0.1; done")
    real_slurm.wait(job, "RUNNING")
    client.requeue(job)
    assert client.details(job).restarts == 1
    client.cancel([job])
    assert real_slurm.wait(job).state == "CANCELLED"
    client.cancel([job])
    other = submitted(tmp_path, f"trap 'exit 7' USR1; touch {tmp_path}/ready; while :; do sleep 0.1; done")
    while not (tmp_path / "ready").exists():
        pass
    client.signal(other, "USR1")
    assert real_slurm.wait(other).exit_code == 7


def test_what_the_cluster_has(real_slurm):
    main, short = client.partitions()
    assert main == client.Partition("main", True, True, 7 * 86400, None, 4, 4, 4000, 2)
    assert (short.name, short.default, short.max_time, short.max_nodes) == ("short", False, 600, 1)
    assert client.version().split(".")[0].isdecimal()


def test_what_slurm_refuses(real_slurm, tmp_path):
    with pytest.raises(SlurmError, match="invalid partition specified: nowhere"):
        submitted(tmp_path, "true", "--partition=nowhere")
    file = tmp_path / "job.sh"
    with pytest.raises(SlurmError, match="Requested node configuration is not available"):
        client.dry_run(file, ["--cpus-per-task=5"])
    assert "to start at" in client.dry_run(file)
    assert client.queue(["4000000"]) == []
    assert client.details("4000000") is None
    with pytest.raises(SlurmError, match="Invalid job id specified"):
        client.requeue("4000000")
