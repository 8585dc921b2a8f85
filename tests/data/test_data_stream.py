"""Batches made ahead by worker processes."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from data_helpers import write_by_hand

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


@pytest.fixture(autouse=True)
def none_left_behind():
    yield
    assert not workers()


def test_without_workers_batches_are_made_on_demand(dataset):
    batches = loader(dataset, **OPTIONS)
    with BatchStream(batches, 5, 9) as stream:
        made = list(stream)
    assert len(batches) == 7
    assert all(same(b, batches.batch(*divmod(step, 7))) for step, b in zip(range(5, 9), made, strict=True))
    assert list(BatchStream(batches, 4, 4, workers=2)) == []


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
