"""One process of several fails in some phase of a save or of a load: all end or go on alike, nothing half is kept."""

import re
import shutil
import time

import pytest
from process_helpers import (  # noqa: F401 - the_tasks and the_team are fixtures
    FLOAT64,
    Change,
    errors,
    the_tasks,
    the_team,
)
from training_helpers import assert_same_run, hpclr, records, steps_kept

from hpclr.checkpoint import CheckpointStore

SOON = 10  # seconds in which all processes know
SECTIONS = {
    "data": {"batch_size": 60},
    "train": FLOAT64,
    "checkpoint": {"every": 2, "keep": 9},
    "parallel": {"timeout": 5, "verify_every": None},
}

# Runs FAULT when the phase `{place}` is come to for the `{time}`th time, or at every time from then on.
AT = """
import errno, importlib, os, signal

module, _, name = "{place}".partition(":")
owner, attribute = importlib.import_module(module), name
if "." in name:
    owner, attribute = getattr(owner, name.split(".")[0]), name.split(".")[1]
original, times = getattr(owner, attribute), 0

def faulty(*arguments, **options):
    global times
    times += 1
    if times >= {time}:
        with open("fault-began", "a"):
            pass
        {fault}
    return original(*arguments, **options)

setattr(owner, attribute, faulty)
"""
EIO = "raise OSError(errno.EIO, os.strerror(errno.EIO))"
SAVING = "hpclr.checkpoint.store:CheckpointStore.save"

# phase of a save → where it is, and which of three processes come through it
PHASES = {
    "synchronising buffers": ("hpclr.parallel.replica:Replica.synchronise_buffers", (0, 1, 2)),
    "random states": ("hpclr.training.state:random_states", (0, 1, 2)),
    "copying": ("hpclr.checkpoint.background:HostCopy.take", (0,)),
    "writing": ("hpclr.checkpoint.store:write_tree", (0,)),
    "renaming": ("hpclr.checkpoint.store:synchronise", (0,)),
    "committing": ("hpclr.checkpoint.store:write_sidecar", (0,)),
}


def fault(place: str, time: int, statement: str) -> str:
    return AT.format(place=place, time=time, fault=statement)


@pytest.mark.parametrize(
    ("phase", "rank"), [(phase, rank) for phase, (_, ranks) in PHASES.items() for rank in ranks if rank < 2]
)
def test_a_bug_in_a_save_ends_all_with_one_message(phase, rank, team):
    """A fault that no other try mends: whoever meets it, all end with its message, and the step is not saved."""
    code = fault(PHASES[phase][0], 3, "raise ValueError('no such thing')")
    started = team.srun(3, changes={rank: Change(before=code)}, **SECTIONS)
    codes = started.ended()
    assert codes == [1, 1, 1], started.console
    assert time.time() - (team.bench.path / "fault-began").stat().st_mtime < SOON
    (said,) = errors(started.console)
    assert "ValueError: no such thing" in said
    for other in range(3):
        assert "ValueError: no such thing" in started.log(other)
    assert_loads(started.run)


def assert_loads(run) -> None:
    """Every checkpoint there is committed and good."""
    store = CheckpointStore(run / "checkpoints")
    assert store.steps()
    assert hpclr("verify", run).code == 0


@pytest.mark.parametrize("place", ["hpclr.checkpoint.store:write_tree", "hpclr.checkpoint.store:write_sidecar"])
def test_a_disk_that_fails_is_told_to_all_and_training_goes_on(place, team):
    code = fault(place, 3, f"if times < 5: {EIO}")
    started = team.srun(3, changes={0: Change(before=code)}, **SECTIONS)
    assert started.ended() == [0, 0, 0], started.console
    for rank in range(3):
        assert re.search(r"of step \d+ could not be saved: Input/output error", started.log(rank))
        assert "Training goes on" in started.log(rank)
    assert len(records(started.run, "train")) == 13
    assert max(steps_kept(started.run)) == 13
    assert_loads(started.run)


FAILPOINTS = ("before_data", "in_data", "after_data", "after_digest", "after_rename", "before_commit", "after_commit")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILPOINTS)
def test_killed_while_a_save_is_written(name, team):
    """The first process dies in the background of a step; the run goes on from the checkpoint before, or this one."""
    code = fault(SAVING, 4, f"os.environ['HPCLR_FAILPOINT'] = '{name}'")
    started = team.srun(2, changes={0: Change(before=code)}, **SECTIONS)
    assert started.ended()[0] == -9, started.console
    left = max(CheckpointStore(started.run / "checkpoints").steps())
    assert left == (6 if name == "after_commit" else 4)
    continued = team.srun(2, **SECTIONS)
    assert continued.ended() == [0, 0], continued.console
    assert f"continuing from step {left}" in continued.console
    shutil.move(team.bench.run, team.bench.path / "killed")
    whole = team.srun(2, **SECTIONS)
    assert whole.ended() == [0, 0], whole.console
    assert_same_run(team.bench.path / "killed", team.bench.run)


# phase of a load → where it is, what goes wrong there, the exit code, what is said
LOADS = {
    "looking": ("hpclr.checkpoint.store:CheckpointStore.load_newest", EIO, (0,)),
    "reading": ("hpclr.checkpoint.store:read_whole", EIO, (0, 1)),
    "restoring": ("hpclr.training.run:restore", "raise RuntimeError('shapes differ')", (0, 1)),
}


@pytest.mark.parametrize(("phase", "rank"), [(phase, rank) for phase in LOADS for rank in LOADS[phase][2]])
def test_a_fault_in_a_load_ends_all_with_one_message(phase, rank, team):
    short = SECTIONS | {"train": FLOAT64 | {"steps": 4}}
    assert team.srun(2, **short).ended() == [0, 0]
    kept = steps_kept(team.bench.run)
    place, statement, _ = LOADS[phase]
    started = team.srun(2, changes={rank: Change(before=fault(place, 1, statement))}, **SECTIONS)
    codes = started.ended()
    assert time.time() - (team.bench.path / "fault-began").stat().st_mtime < SOON
    assert len(set(codes)) == 1, started.console
    assert codes[0] in (1, 2, 75), started.console
    (said,) = errors(started.console)
    assert ("shapes differ" if phase == "restoring" else "Input/output error") in said
    assert steps_kept(team.bench.run) == kept
    continued = team.srun(2, **SECTIONS)
    assert continued.ended() == [0, 0], continued.console
    assert "continuing from step 4" in continued.console
