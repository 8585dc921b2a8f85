"""Several files that count as one dataset."""

import hashlib

import h5py
import numpy as np
import pytest
import torch
from data_helpers import CLASSES, replace, write_by_hand

from hpclr.data import Loader, Order, open_dataset
from hpclr.errors import UsageError

SIZES = ({"train": 50, "valid": 8, "test": 12}, {"train": 31, "test": 5}, {"train": 7, "valid": 3, "test": 1})


@pytest.fixture
def paths(tmp_path):
    paths = [write_by_hand(tmp_path / f"{name}.h5", sizes) for name, sizes in zip("abc", SIZES, strict=True)]
    for number, path in enumerate(paths):  # with content and statistics of its own
        with h5py.File(path, "a") as file:
            replace(file, "train/x", np.roll(file["train/x"][...], number, axis=0) // (number + 1))
            channels = file["train/x"][...].swapaxes(0, 1).reshape(3, -1)
            replace(file, "mean", channels.mean(axis=1))
            replace(file, "std", channels.std(axis=1))
    return paths


def test_files_count_as_one_after_another(paths):
    singles = [open_dataset(path) for path in paths]
    with open_dataset(paths) as dataset:
        assert dataset.sizes == {"train": 88, "valid": 11, "test": 18}
        assert (dataset.paths, dataset.path) == (tuple(paths), paths[0])
        for split, field in (("train", "x"), ("train", "y"), ("valid", "x")):
            expected = np.concatenate([one.read_all(split, field) for one in singles if split in one.sizes])
            assert np.array_equal(dataset.read_all(split, field), expected)
            rows = np.random.default_rng(0).integers(0, len(expected), 40)
            assert np.array_equal(dataset.read(split, field, rows), expected[rows])
            assert np.array_equal(dataset.read_range(split, field, 5, 9), expected[5:9])
        assert len(dataset.read("train", "y", np.array([], dtype=np.int64))) == 0
        dataset.verify()


def test_mean_and_deviation_are_those_of_all_training_samples(paths):
    with open_dataset(paths) as dataset:
        channels = dataset.read_all("train", "x").swapaxes(0, 1).reshape(3, -1)
        assert dataset.mean == pytest.approx(channels.mean(axis=1))
        assert dataset.std == pytest.approx(channels.std(axis=1))


def test_digest_and_stamp_cover_all_files(paths):
    singles = [open_dataset(path) for path in paths]
    with open_dataset(paths) as dataset, open_dataset(paths[::-1]) as reversed_:
        text = "".join(f"{one.digest}\n" for one in singles)
        assert dataset.digest == hashlib.sha256(text.encode()).hexdigest() != reversed_.digest
        assert dataset.stamp == {"files": [one.stamp for one in singles]}
    with open_dataset(paths[:1]) as one:
        assert (one.digest, one.stamp) == (singles[0].digest, singles[0].stamp)


@pytest.mark.parametrize("order", [Order(), Order("chunks", 6, 3)])
def test_batches_from_disk_are_those_from_memory(paths, order):
    with open_dataset(paths) as dataset:
        disk, memory = (Loader(dataset, "train", 9, 0, shuffle=order, in_memory=kept) for kept in (False, True))
        batches = [disk.batch(0, index) for index in range(len(disk))]
        assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(88))
        for index, batch in enumerate(batches):
            assert torch.equal(batch.x, memory.batch(0, index).x)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "classes",
            np.frombuffer(b'["cat"]', dtype=np.uint8),
            r"its classes, columns or vocabulary is \['cat'\], that of .*a.h5",
        ),
        ("x", "float32", "its type is float32, that of .*a.h5 is uint8"),
    ],
)
def test_files_that_differ_are_refused(paths, name, values, message):
    with h5py.File(paths[1], "a") as file:
        if name == "x":
            for split in ("train", "test"):
                replace(file, f"{split}/x", file[f"{split}/x"][...].astype(values))
        else:
            replace(file, name, values)
            for split in ("train", "test"):
                file[f"{split}/y"][...] = 0
    with pytest.raises(UsageError, match=f"b.h5: {message}"):
        open_dataset(paths)


def test_shapes_that_differ_are_refused(paths, tmp_path):
    with pytest.raises(UsageError, match=r"d.h5: its shape of a sample is \(3, 6, 5\), that of .*a.h5 is \(3, 6, 6\)"):
        open_dataset([paths[0], write_by_hand(tmp_path / "d.h5", shape=(3, 6, 5))])


def test_no_file_at_all_is_refused():
    with pytest.raises(UsageError, match="no dataset file"):
        open_dataset([])


def test_a_fault_is_named_with_the_file_it_is_in(paths):
    with h5py.File(paths[1], "a") as file:
        file.attrs.update(checked=True, digest="0" * 64)
        file["train/y"][30] = len(CLASSES)
    message = r"b.h5: train split, sample 30 \(from 0\): the label is 3"
    with open_dataset(paths) as dataset:
        with pytest.raises(UsageError, match=message):
            Loader(dataset, "train", 8, 0, shuffle=True)
        with pytest.raises(UsageError, match=message):
            dataset.verify()
