import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
from data_helpers import write_by_hand

from hpclr.config import load_run_file
from hpclr.data import open_dataset, prepare, stage, staged
from hpclr.errors import RetryableError, UsageError
from hpclr.training.job import on_this_node

RUN_FILE = """
name: small
model: {{name: mlp}}
data: {{path: {folder}/digits.h5, batch_size: 8, stage: {disk}}}
optimizer: {{lr: 1e-3}}
train: {{steps: 1}}
"""
STAGE = """
import sys
from pathlib import Path
from hpclr.data import stage
print(stage([Path(sys.argv[1])], Path(sys.argv[2]), progress=lambda done, total: print(done, flush=True))[-1])
"""


@pytest.fixture
def paths(tmp_path):
    prepare("digits", None, tmp_path / "digits.h5")
    return [tmp_path / "digits.h5", write_by_hand(tmp_path / "mine.h5")]


@pytest.fixture
def disk(tmp_path):
    return tmp_path / "node" / "data"


def start(path, disk):
    return subprocess.Popen([sys.executable, "-c", STAGE, path, disk], stdout=subprocess.PIPE, text=True)


def large(path):
    """300 MB, most of which takes no space."""
    write_by_hand(path)
    with h5py.File(path, "a") as file:
        file.create_dataset("more", (300_000_000,), "uint8", fillvalue=0)[-1] = 1
    return path


def test_copies_have_the_content_and_say_so_in_their_names(paths, disk):
    progress = []
    copies = stage(paths, disk, progress=lambda done, total: progress.append((done, total)))
    assert copies == staged(paths, disk)
    total = sum(path.stat().st_size for path in paths)
    assert progress[-1] == (total, total)
    for path, copy in zip(paths, copies, strict=True):
        assert copy.read_bytes() == path.read_bytes()
        with open_dataset(path) as first, open_dataset(copy) as second:
            assert (first.digest, first.stamp) == (second.digest, second.stamp)
            assert not first.trusted or copy.name == f"{path.stem}-{first.digest[:12]}.h5"
    assert sorted(disk.iterdir()) == sorted(copies)


def test_a_copy_is_used_again_and_a_wrong_one_replaced(paths, disk):
    copies = stage(paths, disk)
    before = [copy.stat().st_ino for copy in copies]
    assert stage(paths, disk) == copies
    assert [copy.stat().st_ino for copy in copies] == before
    content = copies[0].read_bytes()
    for wrong in (content[:-1], b"\0" * len(content)):
        copies[0].write_bytes(wrong)
        assert stage(paths, disk) == copies
        assert copies[0].read_bytes() == content


def test_changed_data_gets_a_copy_of_its_own(paths, disk):
    first = stage(paths, disk)
    prepare("digits", None, paths[0], seed=1, force=True)
    write_by_hand(paths[1], {"train": 5, "test": 5})
    assert not set(stage(paths, disk)) & set(first)


def test_environment_variables_name_the_disk(paths, tmp_path, monkeypatch):
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "fast"))
    assert stage(paths, Path("$NODE_DISK/data"))[0].parent == tmp_path / "fast" / "data"
    monkeypatch.delenv("NODE_DISK")
    for function in (stage, staged):
        with pytest.raises(UsageError, match=r"data.stage is \$NODE_DISK/data, but the environment variable NODE_DISK"):
            function(paths, Path("$NODE_DISK/data"))


def test_a_missing_file_and_a_directory_that_is_none_are_refused(paths, tmp_path, disk):
    with pytest.raises(UsageError, match=r"none\.h5: the dataset cannot be opened"):
        stage([tmp_path / "none.h5"], disk)
    with pytest.raises(UsageError, match="data cannot be staged there"):
        stage(paths, paths[0] / "below")


def test_too_little_space_is_found_before_copying(tmp_path, disk):
    path = write_by_hand(tmp_path / "huge.h5")
    with h5py.File(path, "a") as file:  # HDF5 knows of its end, and the file system has nothing there
        file.create_dataset("more", (1 << 55,), "uint8", chunks=None).attrs["x"] = 1
    os.truncate(path, 1 << 42)
    with pytest.raises(UsageError, match=r"needs 4398047 MB, the disk has \d+ MB free"):
        stage([path], disk)
    assert not list(disk.iterdir())


def test_what_a_killed_copy_left_is_removed(tmp_path, disk):
    path = large(tmp_path / "large.h5")
    process = start(path, disk)
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = list(disk.iterdir())
    assert len(left) == 1
    assert left[0].name.startswith(".tmp-")
    copies = stage([path], disk)
    assert list(disk.iterdir()) == copies


def test_two_jobs_at_once_copy_once(tmp_path, disk):
    path = large(tmp_path / "large.h5")
    outputs = [process.communicate(timeout=60)[0].split() for process in [start(path, disk) for _ in range(2)]]
    assert outputs[0][-1] == outputs[1][-1]
    assert sorted(len(output) > 1 for output in outputs) == [False, True]  # one had nothing to copy
    assert Path(outputs[0][-1]).read_bytes() == path.read_bytes()


def test_a_file_that_changes_meanwhile_is_not_kept(tmp_path, disk):
    path = large(tmp_path / "large.h5")

    def append(done, total):
        with path.open("ab") as file:
            file.write(b"more")

    with pytest.raises(RetryableError, match="changed while it was copied"):
        stage([path], disk, progress=append)
    assert not list(disk.iterdir())


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 3), (10.0, 0)])
def test_a_run_that_copies_for_long_says_how_far_it_is(tmp_path, disk, monkeypatch, capsys, seconds, lines):
    monkeypatch.setattr("hpclr.data.staging._BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr("hpclr.training.job.SECONDS_BETWEEN_LINES", seconds)
    prepare("digits", None, tmp_path / "digits.h5")
    size = (tmp_path / "digits.h5").stat().st_size
    assert 2 << 16 < size <= 3 << 16
    (tmp_path / "run.yaml").write_text(RUN_FILE.format(folder=tmp_path, disk=disk))
    run = load_run_file(tmp_path / "run.yaml", [])
    [copy] = on_this_node(run, [tmp_path / "digits.h5"])
    assert copy.parent == disk
    said = capsys.readouterr().err.splitlines()
    assert len(said) == lines
    assert (
        not said or said[-1] == f"{platform.node()} has copied {size / 1e6:,.0f} of {size / 1e6:,.0f} MB of data (100%)"
    )
