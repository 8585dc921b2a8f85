"""Single rows in any order, whatever the layout of the file."""

import h5py
import numpy as np
import pytest
from data_helpers import damage, write_checked

from hpclr.data import Loader, open_dataset, rows
from hpclr.errors import UsageError

SHAPE = (53, 3, 4, 5)
VALUES = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
LAYOUTS = {
    "as prepared": {"chunks": (8, 3, 4, 5), "fletcher32": True},
    "unchecked": {"chunks": (8, 3, 4, 5)},
    "one chunk": {"chunks": (53, 3, 4, 5), "fletcher32": True},
    "compressed": {"chunks": (8, 3, 4, 5), "compression": "gzip", "fletcher32": True},
    "shuffled bytes": {"chunks": (8, 3, 4, 5), "shuffle": True, "fletcher32": True},
    "chunks of parts of rows": {"chunks": (8, 2, 4, 5), "fletcher32": True},
    "contiguous": {"chunks": None},
}
DIRECT = {"as prepared", "unchecked", "one chunk"}


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(rows, "KEPT_BYTES", 0)


def write(path, values=VALUES, userblock=0, **layout):
    with h5py.File(path, "w", libver="v110", userblock_size=userblock) as file:
        file.create_dataset("x", data=values, **layout)
    return path


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("values", [VALUES, VALUES.astype(np.float32), VALUES.astype(">i4")], ids=["u1", "f4", "big"])
def test_any_layout_gives_the_same_rows(tmp_path, name, values):
    with h5py.File(write(tmp_path / "a.h5", values, **LAYOUTS[name])) as file:
        assert rows._is_plain(file["x"]) == (name in DIRECT and values.dtype.isnative)
        read = rows.row_reader(file["x"])
        for seed in range(6):  # chunks met for the first time, and again
            wanted = np.sort(np.random.default_rng(seed).choice(53, 20, replace=False))
            assert np.array_equal(read(wanted), values[wanted])
        assert read(np.empty(0, np.int64)).shape == (0, *SHAPE[1:])


def test_what_is_small_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "KEPT_BYTES", VALUES.nbytes)
    with h5py.File(write(tmp_path / "a.h5")) as file:
        read = rows.row_reader(file["x"])
    assert np.array_equal(read(np.array([3, 52])), VALUES[[3, 52]])


@pytest.mark.parametrize("userblock", [0, 512])
def test_labels_and_files_with_something_in_front(tmp_path, userblock):
    labels = np.arange(1000) ** 2
    with h5py.File(write(tmp_path / "a.h5", labels, userblock, chunks=(64,))) as file:
        read = rows.row_reader(file["x"])
        for wanted in (np.arange(0, 1000, 7), np.arange(3, 1000, 5)):
            assert np.array_equal(read(wanted), labels[wanted])


def test_chunks_that_were_never_written_are_read(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", (100, 5), "uint8", chunks=(10, 5), fillvalue=7)[30:40] = 9
    with h5py.File(tmp_path / "a.h5") as file:
        read, wanted = rows.row_reader(file["x"]), np.array([3, 33, 99])
        for _ in range(2):
            assert read(wanted)[:, 2].tolist() == [7, 9, 7]


@pytest.mark.parametrize("after", [False, True], ids=["before it is read", "after it was read"])
def test_damage_is_found(tmp_path, after):
    path = write_checked(tmp_path / "d.h5", VALUES, chunk=8)
    with open_dataset(path) as dataset:
        loader = Loader(dataset, "train", 53, 0, shuffle=True, in_memory=False)
        if after:
            loader.batch(0, 0)
        damage(path, 29)
        with pytest.raises(UsageError, match=r"train/x; the file is truncated or damaged") as caught:
            loader.batch(1, 0)
    assert not after or "row 29 is no longer what it was" in str(caught.value)
