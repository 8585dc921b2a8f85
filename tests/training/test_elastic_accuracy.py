"""What nested training claims, on real data: dense accuracy at full rank, and more than others once it is cut."""

import json
import os
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest
from training_helpers import hpclr, summary

JOBS = Path(__file__).parents[2] / "jobs"
SOURCE = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
FRACTIONS = [1, 0.5, 0.25, 0.125, 0.0625]
NESTED, DENSE = "method={name: nested, delay: 0.7}", "method={name: dense}"


def curve(run, fractions, *options):
    """Accuracy at each of these shares of full rank."""
    done = hpclr("evaluate", run, "--rank-fraction", ",".join(map(str, fractions)), "--json", *options)
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
    for method in ({"name": "dense"}, {"name": "nested", "delay": 0.5, "fractions": FRACTIONS}):
        run = bench.train(method=method, **sections)
        curves.append(curve(run, FRACTIONS))
        assert curves[-1][0] == pytest.approx(summary(run)["test"]["accuracy"], abs=0.005)
        run.rename(bench.path / method["name"])
    dense, nested = curves
    assert_elastic(nested, dense, noise=0.04)  # of 360 pictures to test on
    assert nested[-1] > dense[-1] + 0.1, curves


def means(job, data, *overrides, seeds):
    """Mean accuracy over seeds at four ranks: nested, dense and cut, and cut with calibration.

    Runs are called as those of benchmarks/elastic.py.
    """
    found = []
    for seed in seeds:
        runs = []
        for way, method in (("nested", NESTED), ("dense", DENSE)):
            runs.append(Path("runs") / f"{job}-{way}-{seed}")
            options = (f"name={runs[-1].name}", f"train.seed={seed}", f"data.path={data}", method, *overrides)
            done = hpclr("train", JOBS / f"{job}.yaml", *options)
            assert done.code == 0, done.err
        nested, dense = runs
        ways = (nested, ()), (dense, ()), (dense, ("--calibrate", 512))
        found.append([curve(run, FRACTIONS[:4], *options) for run, options in ways])
    return [[mean(values) for values in zip(*of_way, strict=True)] for of_way in zip(*found, strict=True)]


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Prepares a dataset where the runs are, if it is not there."""
    monkeypatch.chdir(os.environ.get("HPCLR_TEST_RUNS") or tmp_path)
    Path("datasets").mkdir(exist_ok=True)

    def prepare(name, *source):
        path = Path("datasets") / f"{name}.h5"
        if not path.exists():
            done = hpclr("data", "prepare", name, *source, path, "--valid-fraction", "0.1")
            assert done.code == 0, done.err
        return path

    return prepare


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_digits_at_every_rank(prepared):
    nested, dense, calibrated = means("elastic", prepared("digits"), "train.threads=1", seeds=(0, 1, 2))
    noise = 0.007  # two pictures and a half of 359, the standard error of a difference of three seeds
    assert nested[0] >= dense[0] - 0.005 - noise, (nested, dense)
    assert_elastic(nested, dense, noise)
    assert_elastic(nested, calibrated, noise)
    assert nested[3] > calibrated[3], (nested, calibrated)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.skipif(not SOURCE.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnist_at_every_rank(prepared):
    data = prepared("fashion-mnist", SOURCE)
    nested, dense, calibrated = means("fashion-mnist-vit", data, "train.epochs=2", "train.threads=1", seeds=(0, 1))
    assert nested[0] >= dense[0] - 0.005, (nested, dense)
    assert_elastic(nested, calibrated, noise=0.005)
    assert all(one > other + 0.1 for one, other in zip(nested[1:], dense[1:], strict=True)), (nested, dense)
    assert nested[3] > calibrated[3], (nested, calibrated)
