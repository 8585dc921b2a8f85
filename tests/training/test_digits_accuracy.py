"""The claim of the method, on real data: a low-rank network that is about as good as the dense one."""

from pathlib import Path
from statistics import mean

import pytest
from training_helpers import hpclr, summary

JOB = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_oialr_is_within_a_point_of_dense_with_a_quarter_of_the_parameters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("datasets").mkdir()
    assert hpclr("data", "prepare", "digits", "datasets/digits.h5", "--valid-fraction", "0.1").code == 0
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
