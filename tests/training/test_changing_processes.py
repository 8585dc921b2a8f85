"""The number of processes changes from attempt to attempt, in the middle of an epoch; every sample is seen once."""

from pathlib import Path

import pytest
from process_helpers import (  # noqa: F401 - the_tasks and the_team are fixtures
    FLOAT64,
    OBSERVE,
    assert_same_result,
    own_model,
    seen,
    the_tasks,
    the_team,
)
from training_helpers import hpclr, steps_kept

STEPS, AN_EPOCH, SAMPLES = 15, 5, 273


@pytest.fixture(scope="session")
def pieces(tmp_path_factory) -> list[str]:
    """Three files of 91 pictures to train on, each a chunk: four batches of 68, and a last one of a single picture."""
    place = tmp_path_factory.mktemp("pieces")
    paths = [place / f"{seed}.h5" for seed in range(3)]
    for seed, path in enumerate(paths):
        done = hpclr(
            *("data", "prepare", "digits", path, "--valid-fraction", "0.1", "--limit", "101", "--seed", str(seed))
        )
        assert done.code == 0, done.err
    return [str(path) for path in paths]


def attempts(team, pieces: list[str], shuffle: str, plan: list[tuple[int, int, int]]) -> Path:
    """A run of several attempts: (processes, step of this attempt after which to stop, workers)."""
    sections = {
        "model": own_model(team.bench),
        "data": {"path": pieces, "batch_size": 68, "shuffle": shuffle, "window": 2},
        "train": FLOAT64 | {"steps": STEPS},
        "parallel": {"timeout": 30, "verify_every": 1},
    }
    total = 0
    for number, (size, steps, workers) in enumerate(plan):
        total += steps
        last = number + 1 == len(plan)
        asked = {} if last else {"TROUBLE": f"SIGTERM:{size - 1}:{steps - 1}"}
        started = team.srun(
            size,
            *(f"data.workers={workers}", f"data.in_memory={'false' if workers else 'auto'}"),
            before=OBSERVE,
            variables={"SEEN": f"{len(plan)}-attempts", **asked},
            **sections,
        )
        assert started.ended() == [0 if last else 85] * size, started.console
        assert max(steps_kept(started.run)) == total
    return started.run


PLANS = {
    "chunks": [(4, 3, 0), (2, 3, 0), (4, 6, 0), (1, 3, 2)],
    "samples": [(1, 2, 1), (4, 4, 1), (1, 1, 0), (2, 5, 2), (4, 3, 0)],
}


@pytest.mark.parametrize("shuffle", ["chunks", pytest.param("samples", marks=pytest.mark.slow)])
def test_every_sample_of_an_epoch_is_seen_once(shuffle, team, pieces):
    one = attempts(team, pieces, shuffle, [(1, STEPS, 0)]).rename(team.bench.path / "one")
    many = attempts(team, pieces, shuffle, PLANS[shuffle])
    assert_same_result(one, many)

    steps = seen(team.bench, f"{len(PLANS[shuffle])}-attempts")
    assert steps == seen(team.bench, "1-attempts")
    assert len(steps[AN_EPOCH - 1]) == 1
    for first in range(0, STEPS, AN_EPOCH):
        samples = [sample for step in range(first, first + AN_EPOCH) for sample in steps[step]]
        assert sorted(samples) == list(range(SAMPLES))
