"""Runs as jobs of a real Slurm: submitted, stopped, requeued, resumed, failed; the results compared to the bit."""

import json
import subprocess
import time

import pytest
from job_helpers import LAUNCHERS, LIMIT, script
from training_helpers import assert_same_run

from hpclr.slurm import client


@pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=() if name == "srun" else pytest.mark.slow) for name in LAUNCHERS]
)
def test_a_run_on_two_nodes_is_one_on_this_machine(launcher, jobs):
    job = jobs.submit(script(launcher), train={"steps": 10})
    jobs.ends(job, "COMPLETED")
    assert jobs.codes() == [0]
    hosts = {json.loads(path.read_text().rstrip("\0"))["host"] for path in jobs.run.glob("logs/attempt-01/*.heartbeat")}
    assert hosts == {"n1", "n2"}
    assert (jobs.run / "logs" / f"{job}_0_log.out").read_text().strip().endswith(str(jobs.run))
    assert_same_run(jobs.local(), jobs.run)


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
    jobs.assert_each_sample_once()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_signal_to_the_processes_is_a_request(launcher, jobs):
    """What `--signal` without B: sends, and `scancel --signal`: it reaches neither this script nor who is its child.

    Of mpirun these are the daemons of the other nodes, which end of it: the first processes may still save, or not.
    """
    job = jobs.submit(script(launcher, pause=0.05), checkpoint={"every": 15})
    jobs.await_step(20)
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    assert jobs.ends(job, "COMPLETED").restarts == 1
    assert jobs.codes() in ([85, 0], *([[75, 0]] if launcher == "mpirun" else []))
    assert "signal USR1: the run" not in jobs.said(job)
    assert "SIGUSR1 received: the run is saved at step" in jobs.said(job) or launcher == "mpirun"
    jobs.assert_each_sample_once()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_that_somebody_requeues(launcher, jobs):
    """Slurm ends it as it ends one that is cancelled; the run has some seconds to save."""
    job = jobs.submit(script(launcher, pause=0.05))
    jobs.await_step(20)
    client.requeue(job)
    assert jobs.ends(job, "COMPLETED").restarts == 1
    assert jobs.codes() == [85, 0]
    jobs.assert_each_sample_once()


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
    jobs.assert_each_sample_once()


@pytest.mark.slow
def test_what_fails_the_same_way_is_tried_twice(jobs):
    job = jobs.submit(script("srun", trouble="kill:3:always"))
    found = jobs.ends(job, "FAILED")
    assert (found.exit_code, found.restarts, jobs.codes()) == (1, 1, [75, 75])
    assert "two starts in a row have not come beyond step 0 (exit code 75)" in jobs.said(job)


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
    assert "Slurm ends the job, which somebody has cancelled or requeued; saved at step" in jobs.said(job)


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
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_node_that_is_lost(node, jobs):
    """Slurm itself requeues the job, on other nodes; n1 is where the script runs."""
    reference = jobs.reference(script("srun"))
    job = jobs.submit(script("srun", pause=0.1), checkpoint={"every": 10})
    jobs.await_step(35)
    jobs.cluster.do("kill-node", node)
    try:
        assert jobs.ends(job, "COMPLETED").restarts == 1
    finally:
        jobs.cluster.do("start-node", node)
    assert_same_run(reference, jobs.run)
    jobs.assert_each_sample_once()


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
    """For a minute, so that the script finds none when it wants to requeue."""
    job = jobs.submit(script("srun", pause=0.1))
    jobs.await_step(5)
    client.signal(job, "USR1")
    jobs.cluster.do("kill-controller")
    try:
        with pytest.raises(client.SlurmError, match="Unable to contact slurm controller") as error:
            client.submit(jobs.run / "submission" / "job.sh")
        assert error.value.exit_code == 75
        time.sleep(60)
    finally:
        jobs.cluster.do("start-controller")
    assert jobs.ends(job, "COMPLETED").restarts == 1
    assert jobs.codes() == [85, 0]
