"""What SVD training claims, on real data: half the operations of a ResNet-20 at almost the dense accuracy.

Half an hour on one core. With a directory in HPCLR_TEST_RUNS the runs stay there, go on if the test is started again,
and are not repeated once they are finished.
"""

import os
from pathlib import Path

import pytest
from training_helpers import hpclr, summary

COMPARISON = Path(__file__).parents[2] / "jobs" / "compare" / "fashion-mnist-resnet20.yaml"
SOURCE = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.skipif(not SOURCE.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_svd_training_halves_the_operations_at_half_a_point_below_dense(tmp_path, monkeypatch):
    monkeypatch.chdir(os.environ.get("HPCLR_TEST_RUNS") or tmp_path)
    if not Path("datasets/fashion-mnist.h5").exists():
        Path("datasets").mkdir(exist_ok=True)
        prepared = hpclr(
            "data", "prepare", "fashion-mnist", SOURCE, "datasets/fashion-mnist.h5", "--valid-fraction", "0.1"
        )
        assert prepared.code == 0, prepared.err
    done = hpclr("compare", COMPARISON, "--methods", "dense,svd_training", "--seeds", "1", "--local", "1")
    assert done.code == 0, done.err
    dense, svd = (summary(Path(f"runs/fashion-mnist-resnet20-{label}-seed-0")) for label in ("dense", "svd_training"))
    assert svd["sizes"]["flops"] <= 0.5 * svd["sizes"]["dense_flops"]
    assert svd["test"]["accuracy"] >= dense["test"]["accuracy"] - 0.005, (svd["test"], dense["test"])
