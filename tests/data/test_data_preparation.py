import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpclr.data import open_dataset, prepare
from hpclr.errors import UsageError

FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture
def archive(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(1000, 0.5, (500, 3, 3, 4)).astype(np.float32)
    x[:, 1] = 0.1
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.arange(500), x_test=x[:40], y_test=np.arange(40))
    return tmp_path / "a.npz"


def contents(path):
    with open_dataset(path) as dataset:
        return dataset, {split: dataset.read_all(split, "y") for split in dataset.sizes}


def test_statistics_are_those_of_the_training_split_alone(archive, tmp_path, monkeypatch):
    monkeypatch.setattr("hpclr.data.readers.npz.BLOCK_BYTES", 5000)
    prepare("npz", archive, tmp_path / "out.h5", valid_fraction=0.3)
    with open_dataset(tmp_path / "out.h5") as dataset:
        x = dataset.read_all("train", "x").astype(float)
        assert np.allclose(dataset.mean, x.mean(axis=(0, 2, 3)), rtol=1e-13)
        assert dataset.std[0] == pytest.approx(x[:, 0].std(), rel=1e-9)
        assert dataset.std[1] == 1  # a channel that never varies


def test_the_validation_split_is_chosen_by_the_seed_alone(archive, tmp_path):
    chosen = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sizes = prepare("npz", archive, tmp_path / name, valid_fraction=0.2, seed=seed)
        assert sizes == {"train": 400, "valid": 100, "test": 40}
        _, y = contents(tmp_path / name)
        assert sorted([*y["train"], *y["valid"]]) == list(range(500))
        assert y["test"].tolist() == list(range(40))
        chosen.append(set(y["valid"]))
    assert chosen[0] == chosen[1] != chosen[2]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_tenth_is_held_out_unless_told_otherwise(archive, tmp_path):
    assert prepare("npz", archive, tmp_path / "a")["valid"] == 50
    assert "valid" not in prepare("npz", archive, tmp_path / "b", valid_fraction=0)


def test_limit_takes_a_sample_of_each_split(archive, tmp_path):
    sizes = prepare("npz", archive, tmp_path / "out.h5", valid_fraction=0.1, limit=60)
    assert sizes == {"train": 54, "valid": 6, "test": 40}
    _, y = contents(tmp_path / "out.h5")
    assert y["train"].max() > 250  # not just the first


@pytest.mark.parametrize("limit", [1, 7, 15, 25, 100, 1000])
def test_a_limited_series_is_one_stretch_of_the_whole(tmp_path, limit):
    """140 rows to train on, 20 to validate, 40 to test: with a limit the splits still follow one another."""
    (tmp_path / "s.csv").write_text("".join(f"{i}.5\n" for i in range(200)))
    sizes = prepare("csv", tmp_path / "s.csv", tmp_path / "out.h5", limit=limit)
    assert sizes == {"train": min(limit, 140), "valid": min(limit, 20), "test": min(limit, 40)}
    with open_dataset(tmp_path / "out.h5") as dataset:
        rows = np.concatenate([dataset.read_all(split, "series")[:, 0] for split in ("train", "valid", "test")])
    assert rows.tolist() == [140 - sizes["train"] + i + 0.5 for i in range(sum(sizes.values()))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid_fraction": 1.0}, "less than 1, found 1.0"),
        ({"valid_fraction": -0.1}, "found -0.1"),
        ({"valid_fraction": float("nan")}, "found nan"),
        ({"valid_fraction": 0.9999}, "leaves none to train on"),
        ({"limit": 0}, "--limit: expected at least 1, found 0"),
    ],
)
def test_options_out_of_range(archive, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        prepare("npz", archive, tmp_path / "out.h5", **options)
    assert not (tmp_path / "out.h5").exists()


def test_a_file_that_is_there_is_replaced_only_by_force(archive, tmp_path):
    (tmp_path / "out.h5").write_text("precious")
    with pytest.raises(UsageError, match="--force"):
        prepare("npz", archive, tmp_path / "out.h5")
    assert (tmp_path / "out.h5").read_text() == "precious"
    prepare("npz", archive, tmp_path / "out.h5", force=True)
    contents(tmp_path / "out.h5")


def test_a_failure_leaves_the_old_file_in_its_place(tmp_path):
    (tmp_path / "out.h5").write_text("precious")
    x = np.ones((50, 4), dtype=np.float32)
    x[49] = np.inf
    np.savez(tmp_path / "bad.npz", x_train=x, y_train=np.zeros(50, int), x_test=x[:5], y_test=np.zeros(5, int))
    with pytest.raises(UsageError, match="sample 49"):
        prepare("npz", tmp_path / "bad.npz", tmp_path / "out.h5", force=True)
    assert (tmp_path / "out.h5").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.npz", "out.h5"]


def test_an_output_that_cannot_be_written_is_refused_before_the_work(archive, tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        prepare("npz", archive, tmp_path / "no" / "out.h5")
    with pytest.raises(UsageError, match="is a directory"):
        prepare("npz", archive, tmp_path)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_writer_leaves_no_target_and_the_next_one_sweeps(tmp_path, sent):
    program = f"""
import signal
import time
from pathlib import Path
from hpclr.data import prepare
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs without
def pause(done, total):
    print("begun", flush=True)
    time.sleep(60)
prepare("digits", None, Path({str(tmp_path / "out.h5")!r}), progress=pause)
"""
    writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert writer.stdout.readline() == b"begun\n"
    writer.send_signal(sent)
    writer.wait(timeout=20)
    assert not (tmp_path / "out.h5").exists()
    assert len(list(tmp_path.iterdir())) == (0 if sent == signal.SIGINT else 1)
    prepare("digits", None, tmp_path / "out.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5"]


def test_the_temporary_file_of_a_living_writer_is_left_alone(tmp_path):
    other = tmp_path / f".tmp-out.h5-{os.uname().nodename}-{os.getppid()}"
    other.write_text("busy")
    prepare("digits", None, tmp_path / "out.h5")
    assert other.read_text() == "busy"


def test_every_dataset_has_checksums_and_plain_numbers(tmp_path):
    prepare("digits", None, tmp_path / "out.h5")
    found = []
    with h5py.File(tmp_path / "out.h5") as file:
        file.visititems(lambda _, item: found.append(item) if isinstance(item, h5py.Dataset) else None)
        assert len(found) == 9
        for dataset in found:
            assert dataset.fletcher32
            assert dataset.dtype.kind in "uif"


def test_progress_counts_every_row_once(archive, tmp_path, monkeypatch):
    monkeypatch.setattr("hpclr.data.readers.npz.BLOCK_BYTES", 5000)
    seen = []
    prepare("npz", archive, tmp_path / "out.h5", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (540, 540)
    assert seen == sorted(set(seen))
    assert len(seen) > 5


@pytest.mark.skipif(not FASHION.is_dir(), reason=f"Fashion-MNIST is not installed in {FASHION}")
def test_fashion_mnist(tmp_path):
    start = time.monotonic()
    assert prepare("fashion-mnist", FASHION, tmp_path / "out.h5", valid_fraction=0) == {"train": 60_000, "test": 10_000}
    assert time.monotonic() - start < 30
    with open_dataset(tmp_path / "out.h5") as dataset:
        assert dataset.mean / 255 == pytest.approx([0.2860], abs=5e-5)
        assert dataset.std / 255 == pytest.approx([0.3530], abs=5e-5)
        assert dataset.classes[9] == "Ankle boot"
        assert np.bincount(dataset.read_all("test", "y")).tolist() == [1000] * 10
