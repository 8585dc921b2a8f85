"""The claim of the method, on real data: a low-rank network that is about as good as the dense one."""

from pathlib import Path
from statistics import mean

import pytest
from training_helpers import hpclr, summary

JOBS = Path(__file__).parents[2] / "jobs"
JOB = JOBS / "quickstart.yaml"


@pytest.fixture
def digits_here(tmp_path, monkeypatch):
    """A directory to work in, with the data that the jobs name."""
    monkeypatch.chdir(tmp_path)
    Path("datasets").mkdir()
    assert hpclr("data", "prepare", "digits", "datasets/digits.h5", "--valid-fraction", "0.1").code == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_oialr_is_within_a_point_of_dense_with_a_quarter_of_the_parameters(digits_here):
    found: dict[str, list[float]] = {"oialr": [], "dense": []}
    for seed in (0, 1, 2):
        for method, accuracies in found.items():
            name = f"{method}-{seed}"
            done = hpclr("train", JOB, f"name={name}", f"method.name={method}", f"train.seed={seed}", "train.threads=1")
            assert done.code == 0, done.err
            run = summary(Path("runs") / name)
            accuracies.append(run["test"]["accuracy"])
            if method == "oialr":
                assert run["sizes"]["trainable"] <= 0.25 * run["sizes"]["dense"]
    assert mean(found["dense"]) > 0.95
    assert mean(found["oialr"]) >= mean(found["dense"]) - 0.01, found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_without_settings_it_is_within_half_a_point_of_the_tuned_and_smaller(digits_here):
    found: dict[Path, list[float]] = {JOB: [], JOBS / "auto.yaml": []}
    for seed in (0, 1, 2):
        stored = []
        for job, accuracies in found.items():
            name = f"{job.stem}-{seed}"
            done = hpclr("train", job, f"name={name}", f"train.seed={seed}", "train.threads=1")
            assert done.code == 0, done.err
            run = summary(Path("runs") / name)
            accuracies.append(run["test"]["accuracy"])
            stored.append(run["sizes"]["stored"] / run["sizes"]["dense"])
        assert stored[1] < 0.4 < stored[0]
    tuned, auto = (mean(accuracies) for accuracies in found.values())
    assert auto >= tuned - 0.005, found
