"""A run that is asked to stop, by the file STOP or by the clock: saved at a step, left by all, continued to the bit."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from process_helpers import (  # noqa: F401 - the_tasks and the_team are fixtures
    LAUNCHERS,
    Change,
    errors,
    own_model,
    the_tasks,
    the_team,
)
from test_run_lock import plant, record_of
from training_helpers import assert_same_run, hpclr, records, steps_kept

from hpclr.checkpoint import CheckpointStore
from hpclr.cluster.control import request_stop
from hpclr.errors import UsageError
from hpclr.parallel.watch.heartbeat import read_heartbeat
from hpclr.training import stopping
from hpclr.training.assembly import assemble
from hpclr.training.stopping import StopRequests

STEPS = 12  # checks after 3, 6 (the conversion) and 9; validations after 4, 8 and 12
EARLIER = 2**22 + 1  # no process has this number

# A model that calls `act` in every pass, with whether it trains and the step, counted from the start of the attempt.
STEERED = """
from torch import nn

act = None

class Net(nn.Sequential):
    step = -1  # a look at the smallest piece comes first

    def forward(self, x):
        self.step += self.training
        if act is not None:
            act(self.training, self.step)
        return super().forward(x)

def make():
    return Net(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.1), nn.ReLU(), nn.Linear(32, 10))
"""


class Steered:
    """Runs whose model acts, and a reference that nobody disturbs."""

    def __init__(self, bench) -> None:
        self.bench, self.stop_file = bench, bench.run / "STOP"

    def sections(self, steps: int = STEPS, **more):
        return {"model": {"target": "steered:make"}, "train": {"steps": steps}} | more

    def reference(self, steps: int = STEPS) -> Path:
        return self.bench.train(**self.sections(steps)).rename(self.bench.path / "reference")

    def train(self, act=None, steps: int = STEPS, **more):
        file = self.bench.write(**self.sections(steps, **more))
        if act is not None:
            sys.modules["steered"].act = act  # imported by the reference
        try:
            return hpclr("train", file)
        finally:
            sys.modules["steered"].act = None

    def ask(self, text: str = "end by mia\n") -> None:
        self.stop_file.write_text(text)

    def outcome(self):
        return json.loads(max(self.bench.run.glob("logs/attempt-*/exit.json")).read_text())


@pytest.fixture
def steered(bench, monkeypatch):
    (bench.path / "steered.py").write_text(STEERED)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(bench.path)
    monkeypatch.delenv("HPCLR_DEADLINE", raising=False)
    yield Steered(bench)
    sys.modules.pop("steered", None)


@pytest.fixture
def always_looking(monkeypatch):
    """Steps take a millisecond here, and the file is looked for in each."""
    monkeypatch.setattr(stopping, "_POLL", 0.0)


def in_step(number: int, then):
    return lambda training, step: then() if training and step == number else None


def until(seconds: float) -> str:
    """HPCLR_DEADLINE for a job that ends in so many seconds."""
    return f"{time.time() + seconds:.3f}"


# The file


@pytest.mark.usefixtures("always_looking")
@pytest.mark.parametrize("step", [1, 4, 6, STEPS])
def test_the_file_stops_a_run_at_the_end_of_the_step(step, steered):
    """In any step, at a validation, at the conversion; in the last one there is nothing left to stop."""
    reference = steered.reference()
    done = steered.train(in_step(step, steered.ask))
    assert steered.stop_file.read_text() == "end by mia\n"  # for whoever started the run
    if step == STEPS:
        assert done.code == 0
    else:
        assert done.code == 85
        message = f"STOP (end: by mia): the run is saved at step {step} of {STEPS}; the same command continues it"
        assert message in done.err
        outcome = steered.outcome()
        assert (outcome["code"], outcome["outcome"], outcome["step"]) == (85, "saved", step)
        assert outcome["message"] == message
        assert max(steps_kept(steered.bench.run)) == step
        assert steered.train().code == 0
        assert not steered.stop_file.exists()
    assert_same_run(reference, steered.bench.run)


@pytest.mark.usefixtures("always_looking")
def test_asked_during_a_validation(steered):
    """It is completed and recorded, once."""
    reference = steered.reference()
    done = steered.train(lambda training, step: None if training or step != 4 else steered.ask())
    assert done.code == 85
    assert steered.outcome()["step"] == 5
    assert [record["step"] for record in records(steered.bench.run, "valid")] == [4]
    assert steered.train().code == 0
    assert_same_run(reference, steered.bench.run)


@pytest.mark.usefixtures("always_looking")
@pytest.mark.parametrize(("saved", "background"), [(0, True), (5, True), (5, False)])
def test_asked_during_a_save(saved, background, steered):
    """It is completed. At step 0 nothing has been trained yet, and then nothing is."""
    reference = steered.reference()
    save = CheckpointStore.save

    def asking(self, step, *arguments, **options):
        if step == saved:
            steered.ask()
        return save(self, step, *arguments, **options)

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(CheckpointStore, "save", asking)
        done = steered.train(checkpoint={"every": 5, "background": background})
    assert done.code == 85
    assert saved in steps_kept(steered.bench.run)
    left_at = steered.outcome()["step"]
    assert left_at == max(steps_kept(steered.bench.run))
    if saved == 0:
        assert f"STOP (end: by mia): nothing was trained, and the run is saved at step 0 of {STEPS}" in done.err
    else:
        assert left_at == 6 or (background and left_at in (7, 8))  # the save runs beside the steps
    assert steered.train().code == 0
    assert_same_run(reference, steered.bench.run)


@pytest.mark.usefixtures("always_looking")
def test_of_a_job_the_batch_script_says_what_follows(steered):
    steered.reference()
    steered.train(in_step(2, lambda: steered.ask("requeue signal USR1 from Slurm\n")))
    said = f"STOP (requeue: signal USR1 from Slurm): the run is saved at step 2 of {STEPS}"
    assert steered.outcome()["message"] == said


@pytest.mark.usefixtures("always_looking")
def test_a_file_left_from_before_stops_nothing(steered):
    """Neither before there is a run nor in one that continues, nor in one that is finished."""
    steered.bench.run.mkdir(parents=True)
    for steps in (3, 3, 5):
        steered.ask("requeue preempted\n")
        assert steered.bench.train(**steered.sections(steps)) == steered.bench.run
        assert not steered.stop_file.exists()
    assert [record["step"] for record in records(steered.bench.run, "train")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("old", [False, True])
def test_a_request_counts_that_is_made_while_the_run_starts(old, steered, monkeypatch):
    reference = steered.reference()
    steered.bench.run.mkdir(parents=True)
    if old:
        steered.ask("requeue preempted\n")

    def asked_meanwhile(*arguments, **options):
        request_stop(steered.bench.run, "end", "by mia")
        return assemble(*arguments, **options)

    with monkeypatch.context() as changed:
        changed.setattr("hpclr.training.run.assemble", asked_meanwhile)
        done = steered.train()
    assert done.code == 85
    assert "STOP (end: by mia): nothing was trained" in done.err
    assert steered.train().code == 0
    assert_same_run(reference, steered.bench.run)


@pytest.mark.usefixtures("always_looking")
@pytest.mark.parametrize(("old", "code"), [(True, 0), (False, 85)])
def test_a_batch_script_knows_which_request_is_old(old, code, steered, monkeypatch):
    """It has started before the processes, and keeps what was there already."""
    launch = steered.bench.run / "logs" / ".launch-7-abcdef"
    launch.mkdir(parents=True)
    monkeypatch.setenv("HPCLR_LAUNCH", os.path.relpath(launch))
    steered.ask()
    if old:
        (launch / "STOP").hardlink_to(steered.stop_file)
    file = steered.bench.write(train={"steps": 3})
    assert hpclr("train", file).code == code
    assert steered.stop_file.exists() == (not old)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "STOP"),
        (b"\n", "STOP"),
        (b"end\n", "STOP (end)"),
        (b"end by mia", "STOP (end: by mia)"),
        (b"requeue  the time limit\nand more\n", "STOP (requeue: the time limit)"),
        (b"end \x1b[2J\r\xe2\x80\xae\xff\n", "STOP (end: \\x1b[2J\\r\\u202e\N{REPLACEMENT CHARACTER})"),
        (b"end " + b"x" * 10**6, f"STOP (end: {'x' * 196})"),
    ],
)
def test_whatever_the_file_says_is_a_request_and_only_text(content, reason, tmp_path):
    (tmp_path / "STOP").write_bytes(content)
    stop = StopRequests(tmp_path / "STOP")
    assert stop.look()
    assert stop.reason == reason


def test_what_cannot_be_read_is_no_request_and_holds_nothing_up(tmp_path):
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    writer = os.open(tmp_path / "pipe", os.O_RDWR)  # which writes nothing
    try:
        for name in ("nothing", "directory", "directory/nothing", "pipe", "pipe/nothing"):
            assert not StopRequests(tmp_path / name).look()
    finally:
        os.close(writer)


def test_the_disk_is_looked_at_once_a_second(tmp_path):
    stop = StopRequests(tmp_path / "STOP")
    assert not stop.look()
    (tmp_path / "STOP").touch()
    began = time.monotonic()
    while not stop.look():
        time.sleep(0.01)
    assert 0.9 < time.monotonic() - began < 1.5


def test_a_request_counts_also_when_the_file_is_gone_again(tmp_path, always_looking):
    stop = StopRequests(tmp_path / "STOP")
    (tmp_path / "STOP").write_text("end by mia")
    assert stop.look()
    (tmp_path / "STOP").unlink()
    assert stop.look()
    assert stop.reason == "STOP (end: by mia)"


def test_one_interrupt_after_the_file_still_lets_the_run_save(tmp_path):
    (tmp_path / "STOP").write_text("end by mia")
    stop = StopRequests(tmp_path / "STOP")
    with stop.listening():
        assert stop.look()
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pytest.fail("it has interrupted the save")
        assert stop.reason == "STOP (end: by mia)"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# The clock


def test_leaves_before_the_deadline_and_goes_on_to_the_bit(steered, monkeypatch):
    steps = 60
    reference = steered.reference(steps)
    deadline = until(2)
    monkeypatch.setenv("HPCLR_DEADLINE", deadline)
    done = steered.train(lambda training, step: time.sleep(0.05 * training), steps, slurm={"margin": 1})
    assert time.time() < float(deadline)
    assert done.code == 85
    found = re.search(r"the time limit of the job is near \(in 1 s\): the run is saved at step (\d+) of 60", done.err)
    assert found is not None, done.err
    assert 1 < int(found[1]) <= 20
    assert steered.outcome()["step"] == int(found[1])
    assert not steered.stop_file.exists()
    monkeypatch.delenv("HPCLR_DEADLINE")
    assert steered.train(steps=steps).code == 0
    assert_same_run(reference, steered.bench.run)


def test_the_margin_is_a_minute_and_more_unless_it_is_set(steered, monkeypatch):
    steered.reference()
    steps = 40
    monkeypatch.setenv("HPCLR_DEADLINE", until(61.5))
    done = steered.train(lambda training, step: time.sleep(0.05 * training), steps)
    assert done.code == 85
    assert re.search(r"near \(in 6[01] s\): the run is saved at step [1-9]", done.err)
    monkeypatch.setenv("HPCLR_DEADLINE", until(50))
    done = steered.train(steps=steps, slurm={"margin": 70})
    assert done.code == 85
    assert re.search(r"near \(in (50|49) s\): nothing was trained, and the run is saved at step [1-9]", done.err)
    assert steered.train(steps=steps, slurm={"margin": 3}).code == 0


def test_the_margin_grows_with_the_longest_save_and_the_longest_step():
    assert not StopRequests(deadline=time.monotonic() + 63).look()
    assert not StopRequests(deadline=time.monotonic() + 63).look(longest_save=1.0)
    assert StopRequests(deadline=time.monotonic() + 63).look(longest_save=2.0)
    stop = StopRequests(deadline=time.monotonic() + 60.5)
    assert not stop.look()
    time.sleep(0.3)
    assert stop.look()  # 60.2 s are left, and a step takes 0.3
    assert not StopRequests(deadline=time.monotonic() + 60.2).look()


def test_the_margin_is_known_from_the_records_of_earlier_attempts(steered, monkeypatch, always_looking):
    """There is no time for two saves of the usual length, so that nothing is trained or written."""
    reference = steered.reference()
    assert steered.train(in_step(7, steered.ask)).code == 85
    run = steered.bench.run
    before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").iterdir()}
    monkeypatch.setenv("HPCLR_DEADLINE", until(200))
    set_seconds_of_saves(run, first=1000.0, others=80.0)
    done = steered.train()
    assert done.code == 85
    assert "nothing was trained, and the run is saved at step 7 of 12" in done.err
    assert steered.outcome()["step"] == 7
    assert {path: path.stat().st_mtime_ns for path in (run / "checkpoints").iterdir()} == before

    set_seconds_of_saves(run, first=1000.0, others=0.1)  # one that hung is forgotten
    assert steered.train().code == 0
    assert_same_run(reference, run)


def set_seconds_of_saves(run: Path, first: float, others: float) -> None:
    found = records(run)
    saves = [record for record in found if record["kind"] == "save"]
    assert len(saves) > 2
    for record in saves:
        record["seconds"] = first if record is saves[0] else others
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))


def test_a_save_that_takes_long_is_learned_of(steered, monkeypatch):
    """The first one, at step 0, takes 1.2 s; the deadline is 62 s from there."""
    steered.reference()
    save = CheckpointStore.save

    def slow(self, *arguments, **options):
        time.sleep(1.2)
        return save(self, *arguments, **options)

    monkeypatch.setattr(CheckpointStore, "save", slow)
    monkeypatch.setenv("HPCLR_DEADLINE", until(63.2))
    done = steered.train()
    assert done.code == 85
    assert "nothing was trained, and the run is saved at step 0" in done.err


def test_a_deadline_that_has_passed(steered, monkeypatch):
    steered.reference()
    monkeypatch.setenv("HPCLR_DEADLINE", until(-100))
    done = steered.train()
    assert done.code == 85
    assert (
        "the time limit of the job is over (for 100 s): nothing was trained, and the run is saved at step 0" in done.err
    )


@pytest.mark.parametrize(
    "value", ["soon", "3600", "-1", "nan", "inf", "1e10", "1700000000000", " 1700000000", "2026-11-21T08:00:00", "N/A"]
)
def test_a_deadline_that_is_none_is_refused_before_anything_is_written(value, bench, monkeypatch):
    monkeypatch.setenv("HPCLR_DEADLINE", value)
    file = bench.write()
    before = bench.listing()
    done = hpclr("train", file)
    assert done.code == 2
    assert f"HPCLR_DEADLINE is '{value}'; expected the time at which the job ends, in seconds since 1970" in done.err
    assert bench.listing() == before


def test_the_words_are_the_same_at_any_time(monkeypatch):
    """Else each process would say its own."""
    said = set()
    for clock in (1.7e9, 1.7e9 + 1):
        monkeypatch.setattr(stopping.time, "time", lambda clock=clock: clock)
        with pytest.raises(UsageError) as refused:
            stopping.deadline_of({"HPCLR_DEADLINE": "soon"})
        said.add(str(refused.value))
    assert len(said) == 1


def test_an_empty_deadline_is_none(bench, monkeypatch):
    monkeypatch.setenv("HPCLR_DEADLINE", "")
    bench.train(train={"steps": 3})


# Several processes


def last_words(started, size: int) -> list[tuple[int | None, str]]:
    """The step at which each process left, and why."""
    found = [read_heartbeat(started.attempt / f"rank-{rank:04d}.heartbeat") for rank in range(size)]
    return [(record.step, record.message) for record in found]


def test_hpclr_stop_ends_all_processes_after_the_same_step(team):
    sections = {"model": own_model(team.bench, dropout=0.2), "data": {"batch_size": 66}}
    reference = team.srun(3, **sections)
    assert reference.ended() == [0] * 3, reference.console
    reference.run.rename(team.bench.path / "reference")

    started = team.srun(3, **sections, variables={"TROUBLE": "slow:1:1"})
    started.await_step(2)
    done = hpclr("stop", started.run)
    assert done.code == 0, done.err
    assert f"job 4711 (restart 0), process {started.pid(0)} on" in done.out
    assert "asked to stop" in done.out
    assert started.ended() == [85] * 3, started.console
    (said,) = errors(started.console)
    assert re.search(r"STOP \(end: by \w+\): the run is saved at step \d+ of 13", said)
    outcome = started.outcome()
    assert last_words(started, 3) == [(outcome["step"], outcome["message"])] * 3
    assert max(steps_kept(started.run)) == outcome["step"] < 13

    last = team.srun(3, **sections)
    assert last.ended() == [0] * 3, last.console
    assert_same_run(team.bench.path / "reference", last.run)
    assert not (last.run / "STOP").exists()


def test_the_clock_of_the_first_process_counts_for_all(team):
    sections = {"data": {"batch_size": 60}}
    over = {"HPCLR_DEADLINE": until(-100)}
    first = team.srun(2, changes={0: Change(environment=over)}, **sections)
    assert first.ended() == [85, 85], first.console
    message = first.outcome()["message"]
    assert message.startswith("the time limit of the job is over (for 1")
    assert last_words(first, 2) == [(0, message)] * 2
    other = team.srun(2, changes={1: Change(environment=over)}, **sections)
    assert other.ended() == [0, 0], other.console


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_signal_to_another_process_is_named(name, team):
    started = team.srun(2, model=own_model(team.bench), variables={"TROUBLE": f"{name}:1:2"})
    assert started.ended() == [85, 85], started.console
    message = f"{name} received: the run is saved at step 3 of 13; the same command continues it"
    assert started.outcome()["message"] == message
    assert last_words(started, 2) == [(3, message)] * 2


def test_nonsense_is_said_once_by_several_processes(team):
    started = team.srun(2, variables={"HPCLR_DEADLINE": "soon"})
    assert started.ended() == [2, 2]
    assert len(set(errors(started.console))) == 1
    assert not started.run.exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_hpclr_stop_under_every_launcher(launcher, team):
    sections = {"model": own_model(team.bench, dropout=0.2)}
    reference = team.launch(launcher, 2, **sections)
    assert reference.ended().code == 0
    reference.run.rename(team.bench.path / "reference")
    started = team.launch(launcher, 2, **sections, variables={"TROUBLE": "slow:0:1"})
    started.await_step(2)
    assert hpclr("stop", started.run).code == 0
    done = started.ended()
    assert done.code == (1 if launcher == "torchrun" else 85), done.err
    assert started.outcome()["code"] == 85
    assert started.left() == []
    continued = team.launch(launcher, 2, **sections)
    assert continued.ended().code == 0
    assert_same_run(team.bench.path / "reference", continued.run)


# Asking


@pytest.mark.parametrize("case", ["no directory", "no run", "let go", "finished", "dead"])
def test_nothing_trains_there(case, bench):
    said = "no process has it in use"
    if case == "no directory":
        said = "there is no such run directory"
    elif case == "dead":
        plant(bench.run, pid=EARLIER)
        said = f"it was in use by process {EARLIER}"
    elif case == "no run":
        bench.run.mkdir(parents=True)
    else:
        bench.train(train={"steps": 3})
        if case == "let go":
            (bench.run / "summary.json").unlink()
        else:
            said = "it is finished"
    before = bench.listing()
    done = hpclr("stop", bench.run)
    assert done.code == 2
    assert said in done.err
    assert bench.listing() == before


def test_whether_anybody_trains_there_cannot_be_told(bench):
    """Its process ids say nothing here."""
    plant(bench.run, pid=EARLIER, pid_namespace="another host", host="node17")
    done = hpclr("stop", bench.run)
    assert done.code == 0
    assert f"process {EARLIER} on node17" in done.out
    assert "whether it is still alive cannot be told from here" in done.out
    assert re.fullmatch(r"end by \S+\n", (bench.run / "STOP").read_text())


def test_a_record_that_is_not_whole(bench):
    plant(bench.run)
    record_of(bench.run).write_bytes(b"{")
    assert hpclr("stop", bench.run).code == 75
    assert not (bench.run / "STOP").exists()


def test_a_later_request_takes_the_place_of_the_one_before(tmp_path):
    request_stop(tmp_path, "requeue", "preempted")
    request_stop(tmp_path, "end", "by\nmia \x1b[2J\n")
    assert (tmp_path / "STOP").read_text() == "end by mia \\x1b[2J\n"
    assert [path.name for path in tmp_path.iterdir()] == ["STOP"]
