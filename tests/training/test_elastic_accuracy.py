"""What nested training claims, on real data: about dense accuracy at full rank, and more than others once it is cut."""

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
from training_helpers import hpclr, summary

ROOT = Path(__file__).parents[2]
SOURCE = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
FRACTIONS = [1, 0.5, 0.25, 0.125, 0.0625]


def curve(run, fractions):
    """Accuracy at each of these shares of full rank."""
    done = hpclr("evaluate", run, "--rank-fraction", ",".join(map(str, fractions)), "--json")
    assert done.code == 0, done.err
    return [point["score"]["accuracy"] for point in json.loads(done.out)["points"]]


def assert_elastic(nested, cut, noise):
    """No rank is worse than a lower one, nor than the same rank of weights that were trained dense and then cut."""
    assert all(one >= other - noise for one, other in pairwise(nested)), nested
    assert all(one >= other - noise for one, other in zip(nested, cut, strict=True)), (nested, cut)


def test_digits_at_a_sixteenth_of_full_rank(bench):
    sections = {
        "model": {"name": "mlp", "hidden": [64, 64]},
        "train": {"steps": 250},
        "checkpoint": {"every": 1000},
        "validation": {"every_steps": 250},
    }
    curves = []
    for method in ({"name": "dense"}, {"name": "nested", "delay": 0.3, "fractions": FRACTIONS}):
        run = bench.train(method=method, **sections)
        curves.append(curve(run, FRACTIONS))
        assert curves[-1][0] == pytest.approx(summary(run)["test"]["accuracy"], abs=0.005)
        run.rename(bench.path / method["name"])
    dense, nested = curves
    assert_elastic(nested, dense, noise=0.04)  # of 360 pictures to test on
    assert nested[-1] > dense[-1] + 0.1, curves


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.skipif(not SOURCE.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnist_at_every_rank(tmp_path, monkeypatch):
    monkeypatch.chdir(os.environ.get("HPCLR_TEST_RUNS") or tmp_path)
    if not Path("datasets/fashion-mnist.h5").exists():
        Path("datasets").mkdir(exist_ok=True)
        prepared = hpclr(
            "data", "prepare", "fashion-mnist", SOURCE, "datasets/fashion-mnist.h5", "--valid-fraction", "0.1"
        )
        assert prepared.code == 0, prepared.err
    curves = []
    for name, method in (("elastic-dense", "{name: dense}"), ("elastic-nested", "{name: nested, delay: 0.3}")):
        file = ROOT / "jobs" / "fashion-mnist-vit.yaml"
        done = hpclr("train", file, f"name={name}", f"method={method}", "train.epochs=2", "train.threads=1")
        assert done.code == 0, done.err
        curves.append(curve(Path("runs") / name, FRACTIONS[:4]))
    dense, nested = curves
    assert nested[0] >= dense[0] - 0.025, curves  # so short a training leaves it 1.8 points behind
    assert all(one >= other - 0.005 for one, other in pairwise(nested)), nested
    assert all(one > other + 0.1 for one, other in zip(nested[1:], dense[1:], strict=True)), curves
