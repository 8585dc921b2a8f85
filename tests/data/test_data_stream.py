"""Batches made ahead by worker processes."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from data_helpers import damage, pictures, write_by_hand, write_checked

from hpclr.data import Augment, BatchStream, Loader, Order, open_dataset
from hpclr.data.workers import _sharing
from hpclr.errors import RetryableError, UsageError

CHUNKS = Order("chunks", 7, 5)
OPTIONS = {"augment": Augment(flip=True, crop=1), "mixup": 0.4}


@pytest.fixture
def dataset(tmp_path):
    with open_dataset(write_by_hand(tmp_path / "data.h5", {"train": 101, "test": 4}, (3, 5, 7))) as dataset:
        yield dataset


def loader(dataset, part=(0, 1), order=CHUNKS, **options):
    return Loader(dataset, "train", 16, 3, shuffle=order, part=part, **options)


def same(first, second):
    for name in ("x", "y", "indices", "y_mixed"):
        one, other = getattr(first, name), getattr(second, name)
        if (one is None) != (other is None) or (one is not None and not torch.equal(one, other)):
            return False
    return (first.lam, first.weight) == (second.lam, second.weight)


def workers():
    return [child for child in multiprocessing.active_children() if child.name.startswith("worker")]


def helpers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("hpclr-batches")]


@pytest.fixture(autouse=True)
def none_left_behind():
    yield
    assert not workers() + helpers()


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("prefetch", [1, 2, 10])
def test_without_workers_batches_are_the_same(dataset, in_memory, prefetch):
    batches = loader(dataset, in_memory=in_memory, **OPTIONS)
    with BatchStream(batches, 5, 9, prefetch=prefetch) as stream:
        made = list(stream)
    assert len(batches) == 7
    assert all(same(b, batches.batch(*divmod(step, 7))) for step, b in zip(range(5, 9), made, strict=True))
    assert list(BatchStream(batches, 4, 4, workers=2)) == []


class Watched(Loader):
    """Writes down where and when its batches are made."""

    def batch(self, epoch, index, piece=(0, 1)):
        made = super().batch(epoch, index, piece)
        self.made = [*getattr(self, "made", []), (threading.current_thread() is threading.main_thread(), index)]
        return made


def test_the_thread_is_ahead_by_as_many_batches_as_asked_for(dataset):
    batches = Watched(dataset, "train", 16, 3, shuffle=True, in_memory=False)
    with BatchStream(batches, 0, 7, prefetch=3) as stream:
        for taken in (1, 2):
            next(stream)
            deadline = time.monotonic() + 10
            while len(batches.made) < taken + 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)  # for one too many
            assert batches.made == [(False, index) for index in range(taken + 3)]


def test_batches_of_a_split_in_memory_are_made_on_demand(dataset):
    batches = Watched(dataset, "train", 16, 3, shuffle=True, in_memory=True)
    with BatchStream(batches, 0, 7) as stream:
        next(stream)
        next(stream)
    assert batches.made == [(True, 0), (True, 1)]


def test_damage_is_told_where_the_batch_is_taken(tmp_path):
    path = write_checked(tmp_path / "d.h5", pictures(64)[0], chunk=8)
    options = {"batch_size": 8, "seed": 0, "shuffle": Order("chunks", 8, 2)}
    with open_dataset(path) as dataset:  # closed before there is damage: HDF5 would remember what it has read
        expected = Loader(dataset, "train", in_memory=True, **options)
    bad = int(expected.batch(0, 5).indices[0]) // 8
    good = list(takewhile(lambda index: bad not in expected.batch(0, index).indices // 8, range(8)))
    damage(path, bad * 8)
    with (
        open_dataset(path) as dataset,
        BatchStream(Loader(dataset, "train", in_memory=False, **options), 0, 8) as stream,
    ):
        for index in good:
            assert same(next(stream), expected.batch(0, index))
        for _ in range(2):
            with pytest.raises(UsageError, match="damaged"):
                next(stream)
            assert not helpers()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory is CUDA's")
@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches_are_the_same_on_the_device(dataset, workers):
    expected = loader(dataset, **OPTIONS)
    with BatchStream(loader(dataset, **OPTIONS), 0, 9, workers=workers, pinned=True) as stream:
        for step, batch in enumerate(stream):
            assert batch.x.is_pinned()
            assert same(batch.to("cuda").to("cpu"), expected.batch(*divmod(step, 7)))


@pytest.mark.parametrize(
    ("count", "part", "options"),
    [
        (2, (0, 1), {"in_memory": False, **OPTIONS}),
        (2, (3, 7), {"in_memory": False, "order": Order(), "dtype": torch.bfloat16}),  # the last batch has 5 samples
        (1, (1, 2), {"in_memory": True, **OPTIONS}),
    ],
)
def test_batches_are_the_same_with_workers(dataset, count, part, options):
    with BatchStream(loader(dataset, part, **options), 2, 15, workers=count, prefetch=3) as stream:
        made = list(stream)
    expected = loader(dataset, part, **options)
    for step, batch in zip(range(2, 15), made, strict=True):
        assert same(batch, expected.batch(*divmod(step, 7)))


def test_workers_take_no_notice_of_signals_and_end_with_the_stream(dataset):
    with BatchStream(loader(dataset, in_memory=False), 0, 1000, workers=1, prefetch=1) as stream:
        next(stream)
        [process] = workers()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            os.kill(process.pid, number)
        assert len([next(stream) for _ in range(14)]) == 14
    assert not process.is_alive()


@pytest.mark.parametrize(
    ("number", "advice"), [(signal.SIGKILL, "memory ran out"), (signal.SIGBUS, "/dev/shm is probably full")]
)
def test_a_worker_that_dies_is_named_at_once(dataset, number, advice):
    count = 2 if number == signal.SIGKILL else 1
    with BatchStream(loader(dataset, in_memory=False), 0, 1000, workers=count) as stream:
        next(stream)
        victim = max(workers(), key=lambda process: process.name)
        os.kill(victim.pid, number)
        start = time.monotonic()
        with pytest.raises(RetryableError) as caught:
            list(stream)
        assert time.monotonic() - start < 3
    name = f"worker {count - 1} of {count} (data.workers), process {victim.pid}"
    for part in (name, f"signal {number}", advice, "data.workers=0"):
        assert part in str(caught.value)


def test_an_error_in_a_worker_arrives_as_itself(dataset):
    with BatchStream(loader(dataset, in_memory=False), 0, 1000, workers=1) as stream:
        dataset.path.unlink()
        with pytest.raises(UsageError, match=r"data\.h5: the dataset cannot be opened") as caught:
            next(stream)
    assert "in worker 0 of 1" in str(caught.value.__cause__)


def test_shared_memory_that_is_too_small_is_named(dataset):
    with (
        BatchStream(loader(dataset), 0, 10, workers=2, prefetch=10**8) as stream,
        pytest.raises(RetryableError, match=r"need.* \d+ MB of /dev/shm, which has \d+ MB free.*data.workers=0"),
    ):
        next(stream)
    with pytest.raises(RetryableError, match="No space left"), _sharing(0, "a file"):
        raise RuntimeError(os.strerror(errno.ENOSPC))  # as torch does when others were quicker


SCRIPT = """
import multiprocessing, sys, time
from hpclr.data import BatchStream, Loader, Order, open_dataset

if __name__ == "__main__":
    dataset = open_dataset(sys.argv[1])
    loader = Loader(dataset, "train", 16, 0, shuffle=Order("chunks", 7, 5), in_memory=False)
    stream = BatchStream(loader, 0, 10**6, workers=1, prefetch=3)
    next(stream)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    if sys.argv[2] == "exit":
        sys.exit(3)
    while True:
        next(stream)
"""


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_no_worker_outlives_its_parent(dataset, tmp_path, end):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    parent = subprocess.Popen([sys.executable, script, dataset.path, end], stdout=subprocess.PIPE, text=True)
    children = [Path(f"/proc/{pid}") for pid in parent.stdout.readline().split()]
    assert len(children) == 1
    if end == "kill":
        parent.kill()
    assert parent.wait(10) == (3 if end == "exit" else -signal.SIGKILL)
    deadline = time.monotonic() + 5
    while any(is_running(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(child) for child in children)


def is_running(process):
    try:
        return process.joinpath("stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False
