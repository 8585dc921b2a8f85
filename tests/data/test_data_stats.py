import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
from mpi_runs import hpclr, messages, needs_heat, needs_mpi

from hpclr.data import open_dataset, prepare
from hpclr.data.stored_statistics import StoredStatistics, check_space, read_statistics, write_statistics
from hpclr.errors import UsageError

SOME = StoredStatistics({"mean": np.ones(3)}, {"split": "train", "samples": 50, "digest": "0" * 64, "heat": "1.8.0"})


@pytest.fixture
def path(tmp_path):
    """500 samples (3, 4, 4) far from zero, which vary in few directions; the first channel never varies."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(500, 6)) * 0.5 ** np.arange(6)) @ rng.normal(size=(6, 48)) + 1000
    x = (x + 1e-3 * rng.normal(size=x.shape)).reshape(-1, 3, 4, 4).astype(np.float32)
    x[:, 0] = 7
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.arange(500) ** 2 % 11, x_test=x[:9], y_test=np.arange(9))
    prepare("npz", tmp_path / "a.npz", tmp_path / "data.h5")
    (tmp_path / "a.npz").unlink()
    return tmp_path / "data.h5"


@needs_heat
@needs_mpi
def test_statistics_are_added_to_the_file(path):
    with open_dataset(path) as before:
        x, y = before.read_all("train", "x").astype(float), before.read_all("train", "y")
        digest, classes = before.digest, len(before.classes)
    done = hpclr(2, "stats", path, "--components", "5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("450 samples") == 1
    arrays, attributes = read_statistics(path)
    assert attributes == {"split": "train", "samples": 450, "digest": digest, "heat": "1.8.0"}
    assert arrays["mean"] == pytest.approx(x.mean(axis=(0, 2, 3)), rel=1e-12)
    assert arrays["std"] == pytest.approx(x.std(axis=(0, 2, 3)), rel=1e-9)
    assert arrays["class_counts"].tolist() == np.bincount(y, minlength=classes).tolist()
    check_components(arrays, x.reshape(450, -1) - x.reshape(450, -1).mean(axis=0))
    with open_dataset(path) as after:
        assert after.trusted
        assert after.digest == digest
        after.verify()
    assert [file.name for file in path.parent.iterdir()] == ["data.h5"]


def check_components(arrays, centred):
    s, vh = np.linalg.svd(centred, full_matrices=False)[1:]
    assert arrays["singular_values"] == pytest.approx(s[:5], rel=1e-5)
    assert arrays["explained_variance"] == pytest.approx(s[:5] ** 2 / len(centred), rel=1e-5)
    assert arrays["explained_variance_ratio"] == pytest.approx(s[:5] ** 2 / np.square(s).sum(), rel=1e-5)
    assert arrays["components"].dtype == np.float32
    assert np.abs(arrays["components"] @ arrays["components"].T - np.eye(5)).max() < 1e-5
    assert np.abs(np.sum(arrays["components"] * vh[:5], axis=1)) == pytest.approx(np.ones(5), abs=1e-5)


@needs_heat
def test_a_time_series_and_a_file_of_its_own(tmp_path):
    values = np.random.default_rng(0).normal(3, 2, (100, 4))
    np.savetxt(tmp_path / "t.csv", values, delimiter=",", header="a,b,c,d", comments="")
    prepare("csv", tmp_path / "t.csv", tmp_path / "t.h5")
    before = (tmp_path / "t.h5").read_bytes()
    done = hpclr(0, "stats", tmp_path / "t.h5", "--out", tmp_path / "s.h5")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "t.h5").read_bytes() == before
    arrays, _ = read_statistics(tmp_path / "s.h5")
    assert arrays["mean"] == pytest.approx(values[:70].mean(axis=0), rel=1e-6)
    assert arrays["components"].shape == (4, 4)
    assert "class_counts" not in arrays
    with pytest.raises(UsageError, match="exists already"):
        check_space(tmp_path / "t.h5", tmp_path / "s.h5")


@needs_heat
@needs_mpi
def test_an_error_of_one_process_ends_all_with_one_message(path):
    missing = hpclr(2, "stats", path, "--split", "tset")
    assert missing.returncode == 2
    assert messages(missing) == [f"hpclr: --split: {path} has train, valid, test, found 'tset'. Name one that it has."]
    with h5py.File(path) as file:
        chunk = file["train/y"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + 100] ^= 1
    path.write_bytes(content)
    damaged = hpclr(2, "stats", path)
    assert damaged.returncode == 2
    assert len(messages(damaged)) == 1
    assert "HDF5 cannot read /train/y" in messages(damaged)[0]
    assert path.read_bytes() == content


def test_inspect_shows_statistics_of_this_content_only(path):
    with open_dataset(path) as dataset:
        digest = dataset.digest
    shares = {"explained_variance_ratio": np.array([0.5, 0.25])}
    assert "statistics" not in hpclr(0, "inspect", path).stdout
    write_statistics(path, StoredStatistics(shares, SOME.attributes | {"digest": digest}))
    assert "of 50 samples of train; 2 principal components explain 75.0%" in hpclr(0, "inspect", path).stdout
    write_statistics(path, StoredStatistics(shares, SOME.attributes))
    assert "of another content" in hpclr(0, "inspect", path).stdout


def test_through_a_link_the_file_itself_is_replaced(path):
    link = path.parent / "link.h5"
    link.symlink_to(path)
    path.chmod(0o640)
    write_statistics(link, SOME)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert read_statistics(path).attributes == SOME.attributes


def test_every_dataset_has_a_checksum(path):
    write_statistics(path, SOME)
    with h5py.File(path) as file:
        assert all(values.fletcher32 for values in file["statistics"].values())


def test_a_killed_writer_leaves_the_file_as_it_was(path):
    before = path.read_bytes()
    program = f"""
import time
from pathlib import Path
from hpclr.data.stored_statistics import StoredStatistics, write_statistics
class Slow(dict):
    def items(self):
        print("begun", flush=True)
        time.sleep(60)
write_statistics(Path({str(path)!r}), StoredStatistics(Slow(), {{}}))
"""
    writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"begun\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait(timeout=20)
    assert path.read_bytes() == before
    write_statistics(path, SOME)
    assert [file.name for file in path.parent.iterdir()] == ["data.h5"]


def test_no_room_for_a_copy_is_found_out_first(tmp_path):
    with (tmp_path / "huge.h5").open("wb") as file:
        file.truncate(1 << 43)  # without any blocks
    with pytest.raises(UsageError, match=r"that needs 8796093 MB.*--out"):
        check_space(tmp_path / "huge.h5", None)
    check_space(tmp_path / "huge.h5", tmp_path / "small.h5")
