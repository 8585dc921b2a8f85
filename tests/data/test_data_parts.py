"""The parts of a global batch, one a process."""

import json
import pickle

import h5py
import numpy as np
import pytest
import torch
from data_helpers import write_by_hand

from hpclr.data import Augment, Dataset, Loader, Order, choose_order, open_dataset
from hpclr.data.augment import mixing
from hpclr.data.order import Chunks

ORDERS = {"samples": Order(), "chunks": Order("chunks", 7, 5)}
OPTIONS = {"augment": Augment(flip=True, crop=2), "mixup": 0.4}


@pytest.fixture
def dataset(tmp_path):
    with open_dataset(write_by_hand(tmp_path / "data.h5", {"train": 101, "test": 4}, (3, 5, 7))) as dataset:
        yield dataset


def loader(dataset, part=(0, 1), order="samples", batch_size=16, **options):
    return Loader(dataset, "train", batch_size, 3, shuffle=ORDERS[order], part=part, **options)


def joined(parts, name):
    """The real samples of all parts."""
    return torch.cat([getattr(part, name) for part in parts if part.weight])


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("processes", [2, 3, 16, 23])
def test_parts_together_are_the_batch_to_the_bit(dataset, processes, order, in_memory):
    whole = loader(dataset, order=order, in_memory=True, **OPTIONS)
    others = [loader(dataset, (rank, processes), order, in_memory=in_memory, **OPTIONS) for rank in range(processes)]
    for index in (0, 3, len(whole) - 1):  # the last one has 5 samples
        expected, parts = whole.batch(1, index), [other.batch(1, index) for other in others]
        for name in ("x", "y", "indices", "y_mixed"):
            assert torch.equal(joined(parts, name), getattr(expected, name))
        assert {part.lam for part in parts} == {expected.lam}
        assert sum(part.weight for part in parts) == pytest.approx(1)
        assert [part.weight for part in parts] == [len(p.y) * bool(p.weight) / len(expected.y) for p in parts]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("processes", [1, 2, 4, 7])
def test_every_sample_of_an_epoch_counts_once(dataset, processes, order):
    loaders = [loader(dataset, (rank, processes), order) for rank in range(processes)]
    indices = [joined([each.batch(0, i) for i in range(len(each))], "indices") for each in loaders if len(each)]
    assert sorted(torch.cat(indices).tolist()) == list(range(101))


def test_changing_the_number_of_processes_in_an_epoch_loses_no_sample(dataset):
    seen = []
    for processes, batches in ((4, range(2)), (2, range(2, 5)), (3, range(5, 7))):
        for rank in range(processes):
            seen += [joined([loader(dataset, (rank, processes)).batch(2, i) for i in batches], "indices")]
    assert sorted(torch.cat(seen).tolist()) == list(range(101))


def test_a_part_without_samples_is_one_that_does_not_count(dataset):
    whole = loader(dataset).batch(0, 6)
    parts = [loader(dataset, (rank, 7)).batch(0, 6) for rank in range(7)]
    empty = [part for part in parts if not part.weight]
    assert len(whole.y) == 5
    assert len(empty) == 2
    for part in empty:
        assert torch.equal(part.x, whole.x[:1])
        assert [piece.weight for piece in part.to("cpu").split(1)] == [0.0]


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_one_process_computes_what_it_always_did(dataset, mixup):
    """The steps spelled out: rows, float32, mean, deviation, augmentation, mixup."""
    augment = Augment(flip=True, crop=2)
    batch = loader(dataset, mixup=mixup, augment=augment).batch(2, 4)
    rows = batch.indices.numpy()
    mean, std = (torch.from_numpy(values).float().reshape(3, 1, 1) for values in (dataset.mean, dataset.std))
    x = torch.from_numpy(dataset.read_all("train", "x")[rows]).float().sub_(mean).div_(std)
    x = augment(x, rows, 3, 2)
    if mixup:
        partners, lam = mixing(mixup, 3, 2, 4, 16)
        x = torch.lerp(x[partners], x, lam)
    assert torch.equal(batch.x, x)


@pytest.mark.parametrize("part", [(1, 1), (-1, 2), (0, 0)])
def test_a_part_that_cannot_be_is_refused(dataset, part):
    with pytest.raises(ValueError, match="part: expected"):
        loader(dataset, part)


# --- reading by chunks


@pytest.fixture
def large(tmp_path):
    """4,000 samples in 200 chunks of 20."""
    path = tmp_path / "large.h5"
    random = np.random.default_rng(0)
    with h5py.File(path, "w", libver="v110") as file:
        file.attrs.update(format="hpclr-data", version=1, task="classification")
        for split, size in (("train", 4000), ("test", 20)):
            x = random.integers(0, 256, (size, 2, 4, 4), dtype=np.uint8)
            file.create_dataset(f"{split}/x", data=x, chunks=(20, 2, 4, 4), fletcher32=True)
            file[f"{split}/y"] = random.integers(0, 3, size)
        file["mean"], file["std"] = np.full(2, 127.0), np.full(2, 70.0)
        file["classes"] = np.frombuffer(json.dumps(list("abc")).encode(), dtype=np.uint8)
    with open_dataset(path) as dataset:
        yield dataset


@pytest.fixture
def reads(monkeypatch):
    """The chunks read, as they are."""
    seen, real = [], Dataset.read_range

    def counting(self, split, field, first, last):
        if field == "x":
            seen.append(first)
        return real(self, split, field, first, last)

    monkeypatch.setattr(Dataset, "read_range", counting)
    return seen


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_process_reads_its_share_of_the_chunks_once(large, reads, processes):
    order = Order("chunks", 20, 40)  # 5 windows of 800 samples
    for rank in range(processes):
        reads.clear()
        part = Loader(large, "train", 400, 0, shuffle=order, part=(rank, processes), in_memory=False)
        for index in range(10):
            part.batch(0, index)
        assert len(reads) == len(set(reads))
        if processes == 1:
            assert len(reads) == 200
        assert len(reads) <= 200 / processes + 5 * 2 * 4  # at both ends of its share of each window


def test_batches_in_two_windows_are_shared_out_as_others(large):
    order = Order("chunks", 20, 40)
    parts = [Loader(large, "train", 640, 0, shuffle=order, part=(rank, 4)) for rank in range(4)]
    chunks = Chunks([4000], 20)
    for part in parts:  # batch 1 has 160 samples of the first window and 480 of the second
        assert len(np.unique(chunks.of(part.batch(0, 1).indices.numpy()))) <= 2 * 40 / 4 + 2 * 2 * 3


def test_memory_for_chunks_is_bounded(large):
    part = Loader(large, "train", 400, 0, shuffle=Order("chunks", 20, 10), part=(1, 2), in_memory=False)
    for index in range(10):
        part.batch(0, index)
        assert len(part._chunks._kept) <= 12


def test_a_loader_sent_to_another_process_opens_the_file_there(large, tmp_path):
    first = Loader(large, "train", 64, 0, shuffle=Order("chunks", 20, 10), in_memory=False)
    first.batch(0, 0)
    sent = pickle.dumps(first)
    assert len(sent) < 10_000
    assert torch.equal(pickle.loads(sent).batch(0, 5).x, first.batch(0, 5).x)
    large.path.rename(tmp_path / "old.h5")
    write_by_hand(large.path)
    with pytest.raises(Exception, match="changed or replaced while it was in use"):
        pickle.loads(sent).batch(0, 5)


@pytest.mark.parametrize(("kind", "expected"), [("auto", "samples"), ("samples", "samples"), ("chunks", "chunks")])
def test_the_order_follows_from_the_data_and_the_run_file(large, kind, expected):
    order = choose_order(large, kind, 32)
    assert order.kind == expected
    if expected == "chunks":  # chunks of 640 bytes go together until they are 1 MiB
        assert (order.chunk, order.window) == ((1 << 20) // 640 * 20, 32)


def test_a_large_split_is_shuffled_by_chunks(tmp_path):
    with h5py.File(tmp_path / "g.h5", "w") as file:  # 1 GiB that takes no space, as it was never written
        file.attrs.update(format="hpclr-data", version=1, task="classification", checked=True, digest="0" * 64)
        for split, size in (("train", 1024), ("test", 3)):
            file.create_dataset(f"{split}/x", (size, 1, 1024, 1024), "uint8", chunks=(3, 1, 1024, 1024))
            file.create_dataset(f"{split}/y", (size,), "int64")
        file["mean"], file["std"] = np.zeros(1), np.ones(1)
        file["classes"] = np.frombuffer(b'["a"]', dtype=np.uint8)
    with open_dataset(tmp_path / "g.h5") as dataset:
        order = choose_order(dataset, "auto", 4)
        assert order == Order("chunks", 3, 4)
        batch = Loader(dataset, "train", 8, 0, shuffle=order, part=(3, 4)).batch(0, 0)
        assert batch.x.shape == (2, 1, 1024, 1024)
