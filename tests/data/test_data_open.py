import errno
import hashlib
import json
import platform
import subprocess
import sys

import h5py
import numpy as np
import pytest
from data_helpers import CLASSES, replace, write_by_hand

from hpclr.data import open_dataset, prepare
from hpclr.errors import UsageError


@pytest.fixture
def path(tmp_path):
    return write_by_hand(tmp_path / "data.h5")


def digest_as_documented(path):
    """The digest, from the file and docs/data.md alone."""
    names = []
    with h5py.File(path) as file:
        file.visititems(lambda name, found: names.append(name) if isinstance(found, h5py.Dataset) else None)
        lines = [f"hpclr-data 1 {np.bytes_(file.attrs['task']).decode()}\n"]
        for name in sorted(names):
            values = file[name][...]
            shape = ",".join(map(str, values.shape))
            lines.append(f"{name} {values.dtype.str} {shape} {hashlib.sha256(values.tobytes()).hexdigest()}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def refusal(path):
    with pytest.raises(UsageError) as caught:
        open_dataset(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_file_written_by_hand_opens(path):
    with open_dataset(path) as dataset:
        assert (dataset.task, dataset.classes, dataset.sample_shape) == ("classification", CLASSES, (3, 6, 6))
        assert dataset.sizes == {"train": 50, "valid": 8, "test": 12}
        assert not dataset.trusted
        assert dataset.digest == digest_as_documented(path)
        assert dataset.mean == pytest.approx(dataset.read_all("train", "x").mean(axis=(0, 2, 3)))


def test_the_digest_of_a_prepared_file_is_the_documented_one(tmp_path):
    prepare("digits", None, tmp_path / "digits.h5")
    with open_dataset(tmp_path / "digits.h5") as dataset:
        assert dataset.trusted
        assert dataset.digest == digest_as_documented(tmp_path / "digits.h5")


def test_validation_is_optional(tmp_path):
    with open_dataset(write_by_hand(tmp_path / "d.h5", {"train": 5, "test": 5})) as dataset:
        assert dataset.sizes == {"train": 5, "test": 5}


def test_a_missing_file_says_how_to_make_one(tmp_path):
    assert "hpclr data prepare" in refusal(tmp_path / "none.h5")


def test_a_directory_a_text_file_and_an_empty_file_are_no_datasets(tmp_path):
    refusal(tmp_path)
    for content in (b"", b"x,y\n1,2\n"):
        (tmp_path / "data.csv").write_bytes(content)
        assert "expected an HDF5 file" in refusal(tmp_path / "data.csv")


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share):
    prepare("digits", None, tmp_path / "digits.h5")
    content = (tmp_path / "digits.h5").read_bytes()
    (tmp_path / "digits.h5").write_bytes(content[: int(share * len(content))])
    assert "truncated or damaged" in refusal(tmp_path / "digits.h5")


def test_a_flipped_bit_in_the_values_is_found_when_they_are_read(tmp_path):
    prepare("digits", None, tmp_path / "digits.h5")
    with h5py.File(tmp_path / "digits.h5") as file:
        place = file["train/x"].id.get_chunk_info(0).byte_offset
    content = bytearray((tmp_path / "digits.h5").read_bytes())
    content[place + 1000] ^= 4
    (tmp_path / "digits.h5").write_bytes(content)
    with open_dataset(tmp_path / "digits.h5") as dataset, pytest.raises(UsageError, match=r"train/x.*damaged"):
        dataset.read("train", "x", np.array([3]))


@pytest.mark.parametrize(
    ("name", "value"), [("format", "other"), ("version", 2), ("task", "regression"), ("format", None)]
)
def test_another_format_is_refused_by_what_was_found(path, name, value):
    with h5py.File(path, "a") as file:
        del file.attrs[name]
        if value is not None:
            file.attrs[name] = value
    assert f"'{name}': '{'missing' if value is None else value}'" in refusal(path)


def test_everything_missing_is_named_at_once(path):
    with h5py.File(path, "a") as file:
        for name in ("train/y", "test", "std", "classes"):
            del file[name]
    message = refusal(path)
    for name in ("/train/y is missing", "/test is missing", "/std is missing", "/classes is missing", "(N, C, H, W)"):
        assert name in message


MALFORMED = [
    ("train/x", np.zeros((50, 6, 6), dtype=np.uint8), "/train/x has 3 dimensions, expected 2 or 4"),
    ("train/x", np.zeros((50, 3, 6, 6)), "/train/x is float64, expected uint8 or float32"),
    ("train/x", np.zeros((0, 3, 6, 6), dtype=np.uint8), "/train/x is empty"),
    ("train/x", np.zeros((49, 3, 6, 6), dtype=np.uint8), "/train/x has 49 samples but /train/y 50 labels"),
    ("test/x", np.zeros((12, 3, 5, 6), dtype=np.uint8), "/test/x has samples (3, 5, 6) uint8"),
    ("test/x", np.zeros((12, 3, 6, 6), dtype=np.float32), "/test/x has samples (3, 6, 6) float32"),
    ("test/y", np.zeros((12, 1), dtype=np.int64), "/test/y has 2 dimensions, expected 1"),
    ("test/y", np.zeros(12), "/test/y is float64, expected int64"),
    ("mean", np.zeros(2), "/mean has 2 values, expected one for each of the 3 channels"),
    ("mean", np.array([0, np.nan, 0]), "/mean must hold finite numbers"),
    ("std", np.array([1.0, 0, 1]), "/std must hold finite numbers, each above 0"),
    ("std", 1.0, "/std is () float64, expected (C,)"),
    ("classes", np.frombuffer(b"cat, dog", dtype=np.uint8), "/classes is not the JSON text of a list"),
    ("classes", np.frombuffer(b"[]", dtype=np.uint8), "/classes is not the JSON text of a list"),
    ("classes", np.zeros(3), "/classes is (3,) float64"),
]


@pytest.mark.parametrize(("name", "values", "message"), MALFORMED)
def test_what_is_malformed_is_named(path, name, values, message):
    with h5py.File(path, "a") as file:
        replace(file, name, values)
    assert message in refusal(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_found(tmp_path, bad):
    path = write_by_hand(tmp_path / "data.h5", dtype="float32")
    with h5py.File(path, "a") as file:
        file["valid/x"][5, 1, 2, 3] = bad
    assert "valid split, sample 5 (from 0): x holds a value that is NaN or infinite" in refusal(path)


@pytest.mark.parametrize("label", [-1, 3, 10**12])
def test_a_label_without_a_class_is_found(path, label):
    with h5py.File(path, "a") as file:
        file["test/y"][7] = label
    assert f"test split, sample 7 (from 0): the label is {label}, expected 0 to 2 (3 classes)" in refusal(path)


def test_a_fault_behind_the_first_block_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("hpclr.data.file.BLOCK_BYTES", 1000)
    path = write_by_hand(tmp_path / "data.h5", dtype="float32")
    with h5py.File(path, "a") as file:
        file["train/x"][49, 0, 0, 0] = np.nan
    assert "train split, sample 49" in refusal(path)


def test_the_stamp_is_that_of_the_file_when_it_was_opened(path):
    with open_dataset(path) as dataset:
        before = path.stat()
        assert dataset.stamp == {"size": before.st_size, "mtime_ns": before.st_mtime_ns}
    with h5py.File(path, "a") as file:
        file["more"] = 1
    with open_dataset(path) as changed:
        assert changed.stamp["size"] > dataset.stamp["size"]
        assert changed.stamp["mtime_ns"] > dataset.stamp["mtime_ns"]


def test_verifying_finds_content_that_is_not_the_one_of_the_digest(path, tmp_path):
    out = tmp_path / "out.h5"
    prepare("digits", None, out)
    for right in (path, out):
        with open_dataset(right) as dataset:
            dataset.verify()
    with h5py.File(out, "a") as file:
        digest = file.attrs["digest"].decode()
        file["test/x"][7, 0, 1, 2] += 1
    with open_dataset(out) as dataset, pytest.raises(UsageError) as caught:
        dataset.verify()
    for part in (str(out), digest, digest_as_documented(out)):
        assert part in str(caught.value)


def test_rows_come_in_the_order_asked_for(path):
    rows = np.array([7, 3, 3, 49, 0])
    with open_dataset(path) as dataset:
        assert np.array_equal(dataset.read("train", "x", rows), dataset.read_all("train", "x")[rows])


def test_a_forecasting_file_with_too_few_names_is_refused(tmp_path):
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file.attrs.update(format="hpclr-data", version=1, task="forecasting")
        for split in ("train", "test"):
            file[f"{split}/series"] = np.zeros((10, 2), dtype=np.float32)
        file["mean"], file["std"] = np.zeros(2), np.ones(2)
        file["columns"] = np.frombuffer(json.dumps(["load"]).encode(), dtype=np.uint8)
    assert "/columns has 1 names, /train/series has 2 columns" in refusal(tmp_path / "s.h5")


REFUSE_LOCKS = """
import ctypes, struct, sys
libc = ctypes.CDLL(None)
# seccomp: the system call flock (73) fails with the given number, all others work
program = b"".join(struct.pack("HBBI", *step) for step in
                   [(0x20, 0, 0, 0), (0x15, 0, 1, 73), (6, 0, 0, 0x50000 | int(sys.argv[1])), (6, 0, 0, 0x7FFF0000)])
buffer = ctypes.create_string_buffer(program)
class Filter(ctypes.Structure):
    _fields_ = [("steps", ctypes.c_ushort), ("program", ctypes.c_void_p)]
libc.prctl(38, 1, 0, 0, 0)
if libc.prctl(22, 2, ctypes.byref(Filter(4, ctypes.addressof(buffer)))):
    sys.exit(77)
from hpclr.data import open_dataset
print(open_dataset(sys.argv[2]).sizes["train"])
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter is for x86-64")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_locks_is_read_without(path, number):
    done = subprocess.run([sys.executable, "-c", REFUSE_LOCKS, str(number), path], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("filters on system calls are not allowed here")
    assert done.stdout == "50\n", done.stderr


def test_a_file_that_is_being_written_is_refused(path):
    hold = "import h5py, sys; file = h5py.File(sys.argv[1], 'a'); print(flush=True); sys.stdin.read()"
    writer = subprocess.Popen([sys.executable, "-c", hold, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    writer.stdout.readline()
    assert "another program has the file open for writing" in refusal(path)
    writer.communicate()
    open_dataset(path).close()


def test_many_open_a_file_at_once(path):
    with open_dataset(path), open_dataset(path) as second:
        script = "import sys; from hpclr.data import open_dataset; open_dataset(sys.argv[1])"
        subprocess.run([sys.executable, "-c", script, path], check=True)
        assert second.sizes["train"] == 50
