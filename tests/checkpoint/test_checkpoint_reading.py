"""Reading in one go, by parts, files of version 1; damage is never silent, with the digest and without it."""

import hashlib
import multiprocessing
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import torch
from hostile_files import HOSTILE

from hpclr.checkpoint import CheckpointStore, Json, read_attrs, read_tree, reader
from hpclr.checkpoint.digest import read_sidecar
from hpclr.checkpoint.format import STORED_AS
from hpclr.checkpoint.reader import read_verified
from hpclr.checkpoint.source import FileSource, MemorySource, read_at
from hpclr.errors import UsageError

FORK = multiprocessing.get_context("fork")
VERSION_1 = Path(__file__).with_name("version-1.h5")


def tree_of_everything():
    generator = torch.Generator().manual_seed(0)
    names = [name for name in STORED_AS if name != "bool"]
    bits = {name: torch.randint(0, 256, (3, 48), dtype=torch.uint8, generator=generator) for name in names}
    return {
        "model": {name: value.view(getattr(torch, name)) for name, value in bits.items()},
        "large": {f"w{i}": torch.randn(40, 50, generator=generator) for i in range(6)},
        "small": {"n": torch.tensor(3), "e": torch.empty(0, 3), "b": torch.tensor([True, False])},
        "empty": {},
        "run": Json({"a": [1, float("inf")]}),
    }


def assert_same(found, expected):
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.contiguous().view(-1).view(torch.uint8).equal(expected.contiguous().view(-1).view(torch.uint8))
    else:
        assert found == expected


def differs(found, expected):
    try:
        assert_same(found, expected)
    except (AssertionError, KeyError, TypeError):
        return True
    return False


@pytest.fixture
def saved(tmp_path):
    store = CheckpointStore(tmp_path / "c")
    store.save(7, tree_of_everything())
    return store.path(7)


# In one go


def test_the_whole_file_is_read_once_and_tensors_are_views_of_it(saved):
    attrs, tree = read_verified(saved, read_sidecar(saved))
    assert attrs == read_attrs(saved)
    assert_same(tree, tree_of_everything())
    large = list(tree["large"].values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in large}) == 1
    assert large[0].untyped_storage().nbytes() == saved.stat().st_size
    assert all(tensor.data_ptr() % 64 == 0 for tensor in large)
    large[0] += 1  # it may be trained on
    assert_same(large[1], tree_of_everything()["large"]["w1"])


def test_the_bytes_that_are_used_are_those_that_were_hashed(saved, monkeypatch):
    """Whoever replaces the file after it was hashed replaces nothing."""
    check = reader.check_found
    monkeypatch.setattr(reader, "check_found", lambda *facts: (check(*facts), saved.write_bytes(b"other"))[0])
    _, tree = read_verified(saved, read_sidecar(saved))
    assert saved.read_bytes() == b"other"
    assert_same(tree, tree_of_everything())


def test_another_digest_is_refused_before_hdf5_is_asked(saved):
    content = saved.read_bytes()
    saved.write_bytes(content[:100] + b"\0" * 50 + content[150:])
    found = hashlib.sha256(saved.read_bytes()).hexdigest()
    (expected,) = read_sidecar(saved)
    with pytest.raises(UsageError, match=f"{saved}: the content has changed.*{expected}.*{found} over {len(content)}"):
        read_verified(saved, [expected])
    with pytest.raises(UsageError, match="HDF5"):
        read_verified(saved, [expected, found])


@pytest.mark.parametrize("name", ["wrong_checksum", "two_datasets_in_one_place", "bool_of_two", "huge_shape", "fifo"])
def test_a_right_digest_does_not_make_a_file_good(tmp_path, name):
    write, reason = HOSTILE[name]
    write(tmp_path / "f.h5")
    digest = "" if name == "fifo" else hashlib.sha256((tmp_path / "f.h5").read_bytes()).hexdigest()
    with pytest.raises(UsageError, match=reason):
        read_verified(tmp_path / "f.h5", [digest])


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "f.h5").touch()
    with pytest.raises(UsageError, match=r"found b''"):
        read_verified(tmp_path / "f.h5", [hashlib.sha256().hexdigest()])
    with pytest.raises(UsageError, match="found nothing there"):
        read_verified(tmp_path / "none.h5", [])


# Version 1


@pytest.fixture(params=["by path", "in one go"])
def version_1(request):
    if request.param == "by path":
        return read_tree(VERSION_1)
    return read_verified(VERSION_1, read_sidecar(VERSION_1))[1]


def test_a_file_of_version_1_is_read(version_1):
    assert read_attrs(VERSION_1)["version"] == 1
    with h5py.File(VERSION_1) as file:
        for name in ("float32", "int64", "complex64", "uint8"):
            found = version_1["model"][name]
            assert found.dtype == getattr(torch, name)
            assert found.numpy().tobytes() == file["model"][name][...].tobytes()
        assert (
            version_1["model"]["bfloat16"].view(torch.uint16).numpy().tobytes() == file["model/bfloat16"][...].tobytes()
        )
        assert version_1["scalar"].shape == ()
        assert int(version_1["scalar"]) == file["scalar"][0]
    assert version_1["empty"].shape == (0, 3)
    assert version_1["run"].value["worst"] == float("inf")
    assert list(read_tree(VERSION_1, only="run")) == ["run"]


# The source of the bytes


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_sources_read_what_is_there(tmp_path, kind):
    content = bytes(range(100))
    (tmp_path / "f").write_bytes(content)
    with FileSource(tmp_path / "f") if kind == "file" else MemorySource(memoryview(content)) as source:
        buffer = bytearray(30)
        assert (source.size, read_at(source, 20, memoryview(buffer))) == (100, 30)
        assert buffer == content[20:50]
        assert read_at(source, 90, memoryview(buffer)) == 10
        assert (source.seek(0, os.SEEK_END), source.tell()) == (100, 100)


FAILING = """
import errno, io, os, sys
from pathlib import Path
import hpclr.checkpoint.scan
from hpclr.checkpoint import read_tree

left = 0

class File(io.FileIO):  # as on a file system that goes away
    def readinto(self, buffer):
        global left
        left -= 1
        if left < 0:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return super().readinto(buffer)

hpclr.checkpoint.scan.FileSource.__bases__ = (File,)
for left in (0, 1, 2, 5, 10, 20):
    try:
        read_tree(Path(sys.argv[1]))
    except OSError as error:
        print(error.errno == errno.ESTALE)
"""


def test_a_read_that_fails_is_an_oserror_not_a_damaged_file(saved):
    """A file system that is away says nothing about the file, which must not be set aside for it; nobody crashes."""
    done = subprocess.run([sys.executable, "-c", FAILING, saved], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, 6 * "True\n", "")


def test_scanning_imports_no_torch():
    code = "import sys, hpclr.checkpoint.scan, hpclr.checkpoint.sandbox; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# Damage, without the digest: HDF5's checksums of its metadata and ours of the data


def flip(content, generator):
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    return content


def zero(content, generator):
    start = generator.randrange(0, len(content), 512)
    if not any(content[start : start + 512]):
        content[start] = 1
    else:
        content[start : start + 512] = bytes(len(content[start : start + 512]))
    return content


def cut(content, generator):
    return content[: generator.randrange(len(content))]


def extend(content, generator):
    return content + generator.randbytes(generator.randrange(1, 100))


def count_outcomes(path, damage, times, report):
    """How often damage was refused, how often it hit a gap between the data, how often it was silent."""
    generator, good, expected = random.Random(times), path.read_bytes(), tree_of_everything()
    attrs = read_attrs(path)
    refused = harmless = silent = 0
    for _ in range(times):
        path.write_bytes(damage(bytearray(good), generator))
        try:
            found = {"attrs": read_attrs(path), **read_tree(path)}
        except UsageError as error:
            refused += bool(re.search(rf"{path.name}: .*(expected .*found|HDF5 cannot read)", str(error), re.DOTALL))
            continue
        wrong = differs(found, {"attrs": attrs, **expected})
        silent, harmless = silent + wrong, harmless + (not wrong)
    report.put((refused, harmless, silent))


@pytest.mark.parametrize("scale", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("damage", "times", "harmless_at_most"), [(flip, 150, 0.1), (zero, 15, 0.1), (cut, 15, 0), (extend, 5, 0)]
)
def test_without_the_digest_no_damage_is_silent(saved, damage, times, harmless_at_most, scale):
    """Bytes in a gap, which alignment and HDF5 leave, are nobody's: what is read is then the same."""
    report = FORK.Queue()  # in a child: HDF5 may crash on what it was never meant to see
    child = FORK.Process(target=count_outcomes, args=(saved, damage, times * scale, report))
    child.start()
    refused, harmless, silent = report.get(timeout=250)
    child.join()
    assert silent == 0
    assert refused + harmless == times * scale
    assert harmless <= harmless_at_most * times * scale


@pytest.mark.parametrize("scale", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", ["file", "sidecar"])
@pytest.mark.parametrize(("damage", "times"), [(flip, 150), (zero, 15), (cut, 15), (extend, 5)])
def test_with_the_digest_all_damage_is_refused(saved, damage, times, target, scale):
    generator = random.Random(times)
    sidecar = saved.with_name(saved.name + ".sha256")
    damaged = saved if target == "file" else sidecar
    good = damaged.read_bytes()
    for _ in range(times * scale):
        damaged.write_bytes(damage(bytearray(good), generator))
        with pytest.raises(UsageError, match=rf"{saved.name}.*expected .*found"):
            read_verified(saved, read_sidecar(saved))
    damaged.write_bytes(good)
    assert_same(read_verified(saved, read_sidecar(saved))[1], tree_of_everything())


def test_a_file_of_a_wrong_length_takes_no_memory(tmp_path):
    """A sparse file of 4 TiB: were it believed, it would be a lack of memory, at every start anew."""
    store = CheckpointStore(tmp_path / "c")
    first, path = store.save(1, {"w": torch.ones(2)}), store.save(2, {"w": torch.ones(2)})
    os.truncate(path, 4 << 40)
    with pytest.raises(UsageError, match=f"{path}: expected a file of \\d+ bytes, as it says itself, found {4 << 40}"):
        read_verified(path, read_sidecar(path))
    assert store.load_newest().path == first
    assert path.with_name(path.name + ".bad").exists()
