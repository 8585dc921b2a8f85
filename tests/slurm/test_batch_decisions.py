"""What a batch script does after its processes have ended, and with signals: run for real, by bash, without Slurm."""

import random
import shlex
import signal
import time
from dataclasses import replace

import pytest
from script_helpers import PLAIN, Place

from hpclr.parallel.watch.outcome import read_outcome

REQUEUED = 85  # what the script itself then ends with, which Slurm does not look at


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, PLAIN)


def chain(place):
    place.script = replace(place.script, chain=True)
    return place


@pytest.mark.parametrize(
    ("ends", "code", "requeues"),
    [
        ("attempt 0; exit 0", 0, 0),
        ("attempt 0; exit 1", 0, 0),  # what the processes have recorded counts, whatever the launcher makes of it
        ("attempt 85; exit 1", REQUEUED, 1),
        ("attempt 75; exit 1", REQUEUED, 1),
        ("attempt 75; exit 0", REQUEUED, 1),
        ("attempt 1; exit 85", 1, 0),
        ("attempt 2; exit 1", 2, 0),
        ("attempt ''; exit 1", 1, 0),  # they could not record it
        ("attempt ''; exit 0", REQUEUED, 1),
        ("attempt ''; { /bin/sleep 0.1; attempt 2; } & exit 0", 2, 0),  # the launcher was lost, and knows nothing
        ("attempt ''; kill -KILL $$", REQUEUED, 1),
        ('cp "$OUTCOMES/2/exit.json" "$HPCLR_LAUNCH"; exit 1', 2, 0),  # failed before there was an attempt
        ("exit 0", 0, 0),  # nothing was left to do
        ("exit 3", 3, 0),
        ("exit 75", REQUEUED, 1),
        ("exit 85", REQUEUED, 1),
        ("exit 137", REQUEUED, 1),
        ('echo \'{"code": 0}\' >"$HPCLR_LAUNCH/exit.json"; exit 3', 3, 0),
    ],
)
def test_the_outcome_decides(ends, code, requeues, place):
    end = place.start(ends)
    assert (end.code, end.requeues) == (code, requeues), end.said
    assert not list((place.run / "logs").glob(".launch-*"))
    assert place.stop_file() is None


@pytest.mark.parametrize(
    ("request_", "code", "expected", "requeues"),
    [
        ("end by mia\n", 85, 0, 0),
        ("end\n", 85, 0, 0),
        ("end by mia\n", 75, 75, 0),
        ("end by mia\n", 1, 1, 0),
        ("requeue the limit\n", 85, REQUEUED, 1),
        ("ending is not end\n", 85, REQUEUED, 1),
        ("", 85, REQUEUED, 1),
    ],
)
def test_whoever_asks_to_end_is_obeyed(request_, code, expected, requeues, place):
    end = place.start(f"printf '{request_}' >\"$RUN/STOP\"; attempt {code}; exit 1")
    assert (end.code, end.requeues) == (expected, requeues), end.said
    assert ("To go on: hpclr resume " in end.said) == (requeues == 0 and code != 1)


def test_the_number_of_starts_is_limited(place):
    assert place.start("checkpoint 1; exit 85", restart=18).requeues == 1
    end = place.start("checkpoint 2; exit 85", restart=19)
    assert (end.code, end.requeues) == (1, 0)
    assert "the last of 20 starts" in end.said


@pytest.mark.parametrize(
    ("steps", "goes_on"),
    [
        ([0], True),
        ([0, 0], False),
        ([5, 5], True),
        ([5, 5, 5], False),
        ([0, 5, 5, 9, 9], True),
        ([0, 5, 5, 9, 9, 9], False),
    ],
)
def test_without_progress_there_are_two_starts(steps, goes_on, place):
    for restart, step in enumerate(steps):
        end = place.start(
            f"{f'checkpoint {step};' if step else ''} attempt {85 if step % 2 else 75}; exit 1", restart=restart
        )
        expected = goes_on or restart + 1 < len(steps)
        assert (end.code, end.requeues) == ((REQUEUED, 1) if expected else (1, 0)), end.said
    assert ("two starts in a row" in end.said) == (not goes_on)
    lines = (place.run / "logs" / "progress").read_text().splitlines()
    assert lines == [f"7 {restart} {before}" for restart, before in enumerate([0, *steps[:-1]])]


LOST = "attempt ''; kill -KILL 0"  # the node, with script and processes


def test_a_run_that_costs_its_node_is_not_started_for_ever(place):
    """Slurm starts the job again by itself, without asking the script."""
    assert place.start(LOST).code == place.start(LOST, restart=1).code == -signal.SIGKILL
    end = place.start('touch "$RUN/started"', restart=2)
    assert (end.code, end.requeues, (place.run / "started").exists()) == (1, 0, False)
    assert "not started again: two starts in a row have not come beyond step 0" in end.said
    outcomes = [read_outcome(place.run / "logs" / f"attempt-0{number}") for number in (1, 2)]
    assert outcomes[0] is None
    assert outcomes[1].name == "retry"
    assert "two starts in a row" in outcomes[1].message


def test_a_run_that_gets_further_is_started_again_however_it_ended(place):
    for restart in range(4):
        assert place.start(f"checkpoint {restart + 1}; {LOST}", restart=restart).code == -signal.SIGKILL
    assert place.start("exit 0", restart=4).code == 0


def test_the_number_of_starts_is_limited_whoever_starts_it(place):
    end = place.start('touch "$RUN/started"', restart=20)
    assert (end.code, end.requeues, (place.run / "started").exists()) == (1, 0, False)
    assert "not started again: the last of 20 starts has ended" in end.said


def test_who_goes_on_is_told_a_command_that_works(place):
    end = place.start('echo end by mia >"$RUN/STOP"; attempt 85; exit 1')
    assert shlex.split(end.said.partition("To go on: ")[2]) == ["hpclr", "resume", str(place.run)]


def test_a_checkpoint_counts_once_it_is_committed(place):
    unfinished = 'touch "$RUN/checkpoints/step-00000009.h5" "$RUN/checkpoints/step-00000008.h5.sha256"'
    place.start(f'{unfinished} "$RUN/checkpoints/.tmp-step-00000007.h5.sha256"; exit 85')
    assert not place.start("exit 85", restart=1).requeues


def test_submitting_anew_forgets_starts_without_progress(place):
    for restart in (0, 1):
        end = place.start("exit 85", restart=restart)
    assert not end.requeues
    assert place.start("exit 85").requeues


def test_a_start_that_was_killed_leaves_nothing_behind(place):
    (place.run / "logs" / ".launch-7-abcdef").mkdir()
    (place.run / "logs" / ".launch-70-abcdef").mkdir()
    place.start("exit 0", restart=1)
    assert [path.name for path in (place.run / "logs").glob(".launch-*")] == [".launch-70-abcdef"]


def test_the_script_is_left_beside_its_logs(place):
    place.start("exit 0")
    assert (place.run / "logs" / "7_submission.sh").read_text() == place.script.text()


# --- a chain of jobs

FOLLOWER = {"SLURM_JOB_DEPENDENCY": "afternotok:6(unfulfilled)"}


def test_in_a_chain_the_next_job_goes_on(place):
    end = chain(place).start("checkpoint 3; attempt 85; exit 1")
    assert (end.code, end.requeues) == (85, 0)
    end = place.start("checkpoint 6; attempt 85; exit 1", **FOLLOWER)
    assert (end.code, end.requeues) == (85, 0)
    assert (place.run / "logs" / "progress").read_text() == "7 0 0\n7 0 3\n"


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_chain_that_is_over_is_not_continued(code, place):
    """Slurm starts the job after one that was cancelled because it was no longer needed."""
    assert chain(place).start(f"attempt {code}; exit 1").code == code
    for _ in range(2):
        end = place.start('touch "$RUN/started"', **FOLLOWER)
        assert end.code == code
        assert f"exit code {code}" in end.said
    assert not (place.run / "started").exists()
    assert place.start("attempt 85; exit 1").code == 85  # a new chain


def test_a_chain_ends_without_progress(place):
    assert chain(place).start("attempt 75; exit 1").code == 85
    assert place.start("attempt 75; exit 1", **FOLLOWER).code == 1
    assert place.start("attempt 75; exit 1", **FOLLOWER).code == 1


def test_who_cancels_a_link_is_told_how_to_end_the_chain(place):
    chain(place).squeue = "echo '7 CANCELLED by 0 None'"
    end = place.start("attempt 85; exit 1")
    assert (end.code, end.requeues) == (85, 0)
    said = end.said.partition("If cancelled: the next job of the chain goes on, if there is one; ")[2]
    assert shlex.split(said)[:4] == ["hpclr", "cancel", str(place.run), "ends"]


# --- signals


@pytest.mark.parametrize("number", ["USR1", "USR2", "TERM"])
@pytest.mark.parametrize(
    ("program", "does"), [("module", "exit 0"), ("module", "exit 1"), ("mkdir", 'exec /bin/mkdir "$@"')]
)
def test_a_signal_before_the_launch_costs_no_start(program, does, number, place):
    """Also where it ends, with the script's first commands, what those do; the next start has a step to go on from."""
    place.script = replace(place.script, modules=["a"])
    place.program("module", "true")
    place.program(program, f"kill -{number} $PPID; {does}")
    end = place.start('touch "$RUN/started"')
    assert (end.code, end.requeues, (place.run / "started").exists()) == (REQUEUED, 1, False), end.said
    assert f"signal {number}: the processes are not started" in end.said
    assert (place.run / "logs" / "progress").read_text() == ""
    assert place.stop_file() is None


def test_signals_before_every_launch_come_to_an_end(place):
    place.program("mkdir", 'kill -TERM $PPID; exec /bin/mkdir "$@"')
    assert place.start("exit 0", restart=18).requeues == 1
    end = place.start("exit 0", restart=19)
    assert (end.code, end.requeues) == (1, 0)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_becomes_a_request(number, place):
    end = place.signalled("until_stop; checkpoint 1; attempt 85; exit 1", number)
    assert (end.code, end.requeues) == (REQUEUED, 1), end.said
    assert place.stop_file() == f"requeue signal {number.name[3:]} from Slurm\n"
    assert not list(place.run.glob(".tmp-*"))


@pytest.mark.parametrize(("ends", "code"), [("attempt 1; exit 9", 1), ("exit 4", 4), ("sleep 0; exit 4", 4)])
def test_many_signals_do_not_confuse_it(ends, code, place):
    """Also those that come while, or just after, the launcher ends."""
    end = place.signalled(f"until_stop; {ends}", *[signal.SIGUSR1, signal.SIGTERM] * 20)
    assert (end.code, end.requeues) == (code, 0), end.said


@pytest.mark.parametrize("attempt", range(10))
def test_signals_that_do_not_cease(attempt, place):
    """However they fall: bash itself at times confuses what it was waiting for with the signals that ended the wait."""
    process = place.launch("until_stop; for n in {1..2000}; do :; done; exit 4")
    while process.poll() is None:
        for number in (signal.SIGUSR1, signal.SIGTERM) * 3:
            if (place.run / "running").exists():
                process.send_signal(number)
        time.sleep(0.001 * random.Random(attempt).random())
    end = place.ended(process)
    assert (end.code, end.requeues) == (4, 0), end.said


def test_a_signal_to_all_processes_is_the_launchers(place):
    end = place.start("trap 'echo heard >\"$RUN/heard\"; exit 3' USR1; kill -USR1 0; exit 4")
    assert (end.code, end.requeues, (place.run / "heard").exists()) == (3, 0, True), end.said


def test_a_request_that_is_there_already_stays(place):
    ends = 'touch "$RUN/running"; echo end by mia >"$RUN/STOP"; /bin/sleep 0.3; attempt 85; exit 1'
    end = place.signalled(ends, signal.SIGUSR1)
    assert (end.code, end.requeues) == (0, 0)
    assert not list(place.run.glob(".tmp-*"))


@pytest.mark.parametrize("old", ["end by mia\n", "requeue preempted\n"])
def test_a_request_from_before_is_none(old, place):
    """Also where the processes do not come so far that they remove it."""
    for ends in ("attempt 75; exit 1", "sleep 0; exit 85"):
        (place.run / "STOP").write_text(old)
        end = place.start(ends)
        assert (end.code, end.requeues) == (REQUEUED, 1), end.said


def test_a_signal_becomes_a_request_though_there_is_an_old_one(place):
    (place.run / "STOP").write_text("end by mia\n")
    end = place.signalled(
        'touch "$RUN/running"; until grep -q USR1 "$RUN/STOP"; do sleep 0; done; exit 85', signal.SIGUSR1
    )
    assert (end.code, end.requeues, place.stop_file()) == (REQUEUED, 1, "requeue signal USR1 from Slurm\n")


def test_a_request_that_was_obeyed_is_gone(place):
    assert place.start('echo end by mia >"$RUN/STOP"; attempt 85; exit 1').code == 0
    assert place.stop_file() is None


@pytest.mark.parametrize(("request_", "starts"), [("end by mia\n", False), ("requeue preempted\n", True)])
def test_a_job_that_was_asked_to_end_and_lost_its_node_ends(request_, starts, place):
    """Slurm has requeued it, without a word from the script."""
    place.start(f"checkpoint 5; {LOST}")
    (place.run / "STOP").write_text(request_)
    end = place.start('touch "$RUN/started"; exit 0', restart=1)
    assert (end.code, (place.run / "started").exists()) == (0, starts)
    assert ("saved at step 5, and not started again" in end.said) == (not starts)
    outcome = read_outcome(place.run / "logs" / "attempt-01")
    assert (outcome is None) == starts
    assert starts or (outcome.name, "saved at step 5" in outcome.message) == ("saved", True)
    assert (place.stop_file() is None) == (not starts)


def test_what_ends_a_job_that_was_requeued_is_no_request_to_the_next_start(place):
    """Slurm ends a job with SIGTERM as soon as its requeue is granted."""
    place.scontrol = "kill -TERM $(sed -n 's/^PPid:[^0-9]*//p' /proc/$PPID/status)"  # of `timeout`, of the script
    end = place.start("exit 85")
    assert (end.code, end.requeues, place.stop_file()) == (REQUEUED, 1, None)


# --- what Slurm says


@pytest.mark.parametrize(
    ("answer", "requeues"),
    [
        ("7 RUNNING None", 1),
        ("7 COMPLETING None", 0),
        ("7 CANCELLED by 0 None", 0),
        ("7 COMPLETING TimeLimit", 1),
        ("70 COMPLETING None", 1),  # another element of an array
        ("", 1),
    ],
)
def test_a_job_that_was_cancelled_is_not_requeued(answer, requeues, place):
    place.squeue = f"echo '{answer}'"
    assert place.start("attempt 85; exit 1").requeues == requeues


def test_a_controller_that_is_away_is_waited_for(place):
    place.scontrol = f'[ $(grep -c requeue "{place.path}/asked") -ge 4 ]'
    end = place.start("exit 85")
    assert (end.code, end.requeues) == (REQUEUED, 4)


def test_a_site_that_forbids_requeueing(place):
    place.scontrol = "echo 'Requested operation is presently disabled' >&2; false"
    place.script = replace(place.script, patience=0)
    end = place.start("exit 85")
    assert (end.code, end.requeues) == (1, 1)
    assert "presently disabled" in end.said
    assert "To go on: scontrol requeue 7." in end.said


@pytest.mark.parametrize(
    ("end_time", "answer", "deadline"),
    [
        ("1800000000", "", "1800000000"),
        ("", "7 2027-01-15T08:00:00", "1800000000"),
        ("UNLIMITED", "7 2027-01-15T08:00:00", "1800000000"),
        ("", "6 2027-01-15T07:00:00\n7 2027-01-15T08:00:00", "1800000000"),
        ("", "7 N/A", "unset"),
        ("", "7 2nonsense", "unset"),
        ("", "", "unset"),
    ],
)
def test_the_deadline(end_time, answer, deadline, place):
    place.squeue = f"printf '%b\\n' '{answer}'"
    ends = 'echo "${HPCLR_DEADLINE-unset}" >"$RUN/deadline"'
    assert place.start(ends, SLURM_JOB_END_TIME=end_time, TZ="UTC").code == 0
    assert (place.run / "deadline").read_text().strip() == deadline
