"""What goes wrong in one process ends all of them: at once, with one message that names it, and nobody left behind."""

import os
import signal
import time

import pytest
from process_helpers import (  # noqa: F401 - the_tasks and the_team are fixtures
    FLOAT64,
    LAUNCHERS,
    Change,
    assert_same_result,
    distance,
    errors,
    own_model,
    the_tasks,
    the_team,
)
from training_helpers import hpclr, records, steps_kept

from hpclr.parallel.watch.heartbeat import process_state

TIMEOUT = 5  # parallel.timeout of these runs, seconds
SLACK = 20  # seconds in which processes of a busy machine find out and end, beyond that

# trouble → exit code of the attempt, what the message says, seconds until all have ended
FAILURES = {
    "SIGKILL": (75, "died without a word", SLACK),
    "exit": (75, "died without a word", SLACK),
    "bug": (1, "unexpected ValueError: a bug in the model", SLACK),
    "SIGSTOP": (75, "does not answer: it was last seen", TIMEOUT + SLACK),
    "hang": (75, "it is computing gradients at step 4", TIMEOUT + SLACK),
}


def failing(team, **sections):
    """A run of 13 steps that saves every other one."""
    parallel = {"timeout": TIMEOUT, "verify_every": None}
    return {
        "model": own_model(team.bench),
        "parallel": parallel,
        "train": FLOAT64,
        "checkpoint": {"every": 2},
    } | sections


def check_record(started, what: str, rank: int) -> None:
    """The attempt's record says who failed, where and why."""
    code, words, _ = FAILURES[what]
    outcome = started.outcome()
    assert outcome["code"] == code, outcome
    assert outcome["rank"] == rank, outcome
    assert outcome["message"].startswith(f"rank {rank} on {os.uname().nodename} (pid ")
    assert words in outcome["message"]


def check_continues(team, size: int, **sections) -> None:
    """The run goes on after the failure, in fewer processes, and gives the result of one that never failed."""
    failed_at = max(steps_kept(team.bench.run))
    continued = team.srun(size, **sections)
    assert continued.ended() == [0] * size, continued.console
    assert f"continuing from step {failed_at} " in continued.console
    continued.run.rename(team.bench.path / "continued")
    one = team.srun(1, **sections)
    assert one.ended() == [0], one.console
    assert_same_result(one.run, team.bench.path / "continued")


def tells_where_it_was(log: str) -> bool:
    """Whether a log ends with the stacks of a process that was stuck, or with that of one whose collective broke."""
    return "What each thread of this process was doing" in log or "Traceback (most recent call last)" in log


@pytest.mark.parametrize(
    ("what", "rank"),
    [
        ("SIGKILL", 2),
        ("bug", 2),
        ("SIGSTOP", 2),
        ("SIGKILL", 0),
        *(
            pytest.param(*place, marks=pytest.mark.slow)
            for place in [("exit", 2), ("bug", 0), ("hang", 2), ("hang", 0)]
        ),
    ],
)
def test_a_failing_task_of_srun_ends_all(what, rank, team):
    """Here nobody looks after the processes: each of the others notices by itself."""
    code, _, limit = FAILURES[what]
    sections = failing(team)
    started = team.srun(4, **sections, variables={"TROUBLE": f"{what}:{rank}:4"})
    started.await_step(4)
    began = time.monotonic()
    others = [other for other in range(4) if other != rank or what in ("bug", "hang")]
    assert started.ended(*others) == [code] * len(others), started.console
    assert time.monotonic() - began < limit
    check_record(started, what, rank)
    said = errors(started.console)
    assert len(said) == 1, started.console
    assert said[0].removeprefix("hpclr: ") == started.outcome()["message"]
    assert all(tells_where_it_was(started.log(other)) for other in others)
    if what == "hang":
        assert "in trouble" in started.log(rank)
    if what == "SIGSTOP":
        os.kill(started.pids[rank], signal.SIGKILL)
    if what == "bug":
        assert 'raise ValueError("a bug in the model")' in started.log(rank)
    if (what, rank) in (("SIGKILL", 2), ("hang", 0)):
        check_continues(team, 2, **sections)


QUICK = [("launch torchrun", "SIGKILL", 1), ("launch mpirun", "bug", 1)]
GRID = [
    (launcher, what, rank)
    for launcher in LAUNCHERS
    for what in FAILURES
    for rank in ((0, 1) if what in ("SIGKILL", "bug") else (1,))
    if (launcher, what, rank) not in QUICK
]


@pytest.mark.parametrize(
    ("launcher", "what", "rank"), [*QUICK, *(pytest.param(*place, marks=pytest.mark.slow) for place in GRID)]
)
def test_a_failing_process_ends_the_launch(launcher, what, rank, team):
    code, words, limit = FAILURES[what]
    workers = int((launcher, what) in (("torchrun", "SIGKILL"), ("launch mpirun", "hang")))
    sections = failing(team, data={"workers": workers})
    started = team.launch(launcher, 2, **sections, variables={"TROUBLE": f"{what}:{rank}:4"})
    started.await_step(4)
    began = time.monotonic()
    done = started.ended()
    took = time.monotonic() - began
    check_record(started, what, rank)
    if launcher.startswith("launch"):  # else torchrun makes it 1, and both say much of their own
        assert done.code == code, done.err
        assert len(errors(done.err)) == 1, done.err
        assert words in done.err
        assert took < limit + 12  # for a stopped process, see launch._AFTERMATH
    else:  # mpirun may end a survivor before its message has come through
        assert done.code != 0
        assert sum(words in line for line in errors(done.err)) <= 1, done.err
    assert started.left() == []


READER = """
import os, time
from hpclr.data.stream import BatchStream
take = BatchStream.__next__

def stuck(self):
    if self._step == 4 and os.environ["SLURM_PROCID"] == "1":
        time.sleep(1000)
    return take(self)

BatchStream.__next__ = stuck
"""


def test_a_reader_that_hangs_is_named(team):
    started = team.srun(2, **failing(team), before=READER)
    assert started.ended() == [75, 75], started.console
    assert "rank 1 on" in started.outcome()["message"]
    assert "it is reading data at step 4" in started.outcome()["message"]
    assert "in stuck" in started.log(1)


# ---- before training


def refused(started, *texts: str, code: int = 2, messages: int = 1) -> None:
    """All processes have ended with this exit code, and the console has this many messages, with these texts."""
    assert started.ended() == [code] * len(started.pids), started.console
    said = errors(started.console)
    assert len(said) == messages, started.console
    for text in texts:
        assert text in said[0]


def test_a_batch_that_cannot_be_shared_equally(team):
    started = team.srun(2, data={"batch_size": 63})
    refused(started, "data.batch_size is 63, which 2 processes cannot share equally", messages=2)
    assert not team.bench.run.exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_mistake_that_all_make_is_told_once(launcher, team):
    done = team.launch(launcher, 4, data={"batch_size": 63}).ended()
    assert done.code == (1 if launcher == "torchrun" else 2), done.err
    assert len(errors(done.err)) == 1, done.err
    assert not team.bench.run.exists()


def test_other_run_file_on_one_rank(team):
    changes = {2: Change(arguments=["train.seed=1"])}
    refused(team.srun(4, changes=changes), "run file: rank 2 (", "has", "ranks 0-1, 3 (", "have")
    assert not team.bench.run.exists()


@pytest.fixture
def elsewhere(team):
    """A directory for one rank that is like the current one, but for what a test changes there."""
    place = team.bench.path / "elsewhere"
    place.mkdir()
    return place


def test_other_code_on_one_rank(team, elsewhere):
    model = own_model(team.bench)
    (elsewhere / "own.py").write_text((team.bench.path / "own.py").read_text() + "# changed\n")
    changes = {1: Change(directory=elsewhere)}
    started = team.srun(2, "--runs-dir", team.bench.path / "runs", model=model, changes=changes)
    refused(started, "code: rank 0 (", "rank 1 (")


def test_other_data_on_one_rank(team, elsewhere):
    for number, place in enumerate((team.bench.path, elsewhere)):
        prepared = ("data", "prepare", "digits", place / "same.h5", "--valid-fraction", "0.1", "--limit", 300 + number)
        assert hpclr(*prepared).code == 0
    changes = {1: Change(directory=elsewhere)}
    started = team.srun(2, "--runs-dir", team.bench.path / "runs", data={"path": "same.h5"}, changes=changes)
    refused(started, "the data's digest: rank 0 (", "rank 1 (")


def test_a_run_directory_that_one_rank_does_not_see(team, elsewhere):
    changes = {1: Change(arguments=["--runs-dir", str(elsewhere)])}
    started = team.srun(2, parallel={"timeout": 2}, changes=changes)
    assert started.ended() == [75, 75], started.console
    assert "rank 1 of 2 did not come to the meeting within 2 s" in started.console
    assert "whether its node sees the same directory" in started.console


def test_a_model_that_one_rank_cannot_make(team):
    started = team.srun(2, model=own_model(team.bench), variables={"TROUBLE": "refuse:1:0"})
    refused(started, "rank 1 of 2: model.target: own:make cannot be called with {}: RuntimeError: no licence here")


def test_what_a_start_that_was_killed_has_left_does_not_stop_the_next(team):
    (team.bench.run / "logs" / "attempt-01").mkdir(parents=True)
    for name in (".nonce-0123456789abcdef", ".meeting-0123456789abcdef.json"):
        (team.bench.run / name).touch()
    late = {1: Change(before="import time; time.sleep(0.7)")}  # comes when the first has begun to use the directory
    started = team.srun(2, changes=late, train={"steps": 2}, method={"name": "dense"})
    assert started.ended() == [0, 0], started.console


def test_a_second_job_in_the_same_run_directory_is_refused(team):
    sections = failing(team)
    first = team.srun(2, **sections, variables={"TROUBLE": "slow:0:1"})
    first.await_step(2)
    refused(team.srun(2, **sections), f"is in use by job 4711 (restart 0), process {first.pids[0]} on")
    fresh = team.srun(2, "--fresh", **sections)
    refused(fresh, f"is in use by job 4711 (restart 0), process {first.pids[0]} on")
    assert first.ended() == [0, 0], first.console
    assert [record["step"] for record in records(first.run, "train")] == list(range(1, 14))
    assert len(list(first.run.glob("logs/attempt-*"))) == 1
    assert not list(first.run.parent.glob("run.old-*"))


FULL = """
import errno, os, resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from hpclr.checkpoint import CheckpointStore
if os.environ["SLURM_PROCID"] == "0":
    save = CheckpointStore.save

    def limited(self, step, *more, **others):
        if step == 4:  # as on a disk without room for another file
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
        return save(self, step, *more, **others)

    CheckpointStore.save = limited
"""


def test_a_checkpoint_that_cannot_be_written_ends_all_with_the_message_of_the_first(team):
    sections = failing(team)
    started = team.srun(4, **sections, before=FULL)
    assert started.ended() == [75] * 4, started.console
    (said,) = errors(started.console)
    assert "of step 13 could not be saved: File too large" in said
    assert "rank 0 on" in said
    assert started.outcome()["code"] == 75
    assert max(steps_kept(started.run)) == 2
    continued = team.srun(2, **sections)
    assert continued.ended() == [0, 0], continued.console
    assert process_state(started.pids[0]) == ""
