"""Saves in the background: what is saved is what was there when `save` returned, and no fault is lost."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from hpclr.checkpoint import CheckpointStore, Json
from hpclr.checkpoint.background import BackgroundSaver, HostCopy
from hpclr.errors import RetryableError, TrainingDivergedError


def tree_of(step):
    return {"model": {"w": torch.full((50, 3), float(step)), "s": torch.tensor(step)}, "run": Json({"step": [step]})}


def assert_holds(loaded, step):
    assert loaded.step == step
    assert torch.equal(loaded.tree["model"]["w"], tree_of(step)["model"]["w"])
    assert torch.equal(loaded.tree["model"]["s"], torch.tensor(step))
    assert loaded.tree["run"] == Json({"step": [step]})


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")


class Gate:
    """A check that holds up the thread until it is opened."""

    def __init__(self):
        self.opened, self.seen = threading.Event(), []

    def __call__(self, tree):
        self.seen.append(tree)
        assert self.opened.wait(30)


def test_what_changes_after_save_has_returned_is_not_saved(store):
    gate, tree = Gate(), tree_of(1)
    with BackgroundSaver(store, check=gate) as saver:
        saver.save(1, tree)
        tree["model"]["w"].fill_(9)
        tree["model"]["s"].fill_(9)
        tree["run"].value["step"].append(9)
        tree["extra"] = Json(9)
        gate.opened.set()
    assert_holds(store.load_newest(), 1)
    assert "extra" not in store.load_newest().tree


def test_training_goes_on_while_one_save_is_in_flight(store):
    gate = Gate()
    with BackgroundSaver(store, check=gate) as saver:
        assert not saver.in_flight
        saver.save(4, tree_of(4))
        assert (saver.in_flight, saver.finished(), store.steps()) == (True, None, [])
        assert not saver.wait(0.01)
        assert [thread.name for thread in threading.enumerate() if not thread.daemon][-1] == "hpclr-save"
        gate.opened.set()
        saver.wait()
        assert (saver.in_flight, store.steps()) == (False, [4])


def test_a_second_save_waits_for_the_first(store):
    running = []

    def check(tree):
        running.append(threading.active_count())
        time.sleep(0.05)

    with BackgroundSaver(store, check=check) as saver:
        threads = threading.active_count()
        for step in (1, 2, 3):
            saver.save(step, tree_of(step))
            assert store.steps() == list(range(1, step))
    assert running == [threads + 1] * 3
    assert [saver.finished().step for _ in range(3)] == [1, 2, 3]
    assert_holds(store.load_newest(), 3)


def test_a_report_says_how_it_went_and_comes_once(store):
    with BackgroundSaver(store, check=lambda tree: time.sleep(0.1)) as saver:
        saver.save(7, tree_of(7), metric=0.5, best=True)
    report = saver.finished()
    assert (report.step, report.bytes, report.error) == (7, store.path(7).stat().st_size, None)
    assert 0 <= report.blocked < 0.1 <= report.seconds
    assert saver.finished() is None
    assert store.best() == store.path(7)


@pytest.mark.parametrize("error", [TrainingDivergedError("not finite"), KeyError("bug"), MemoryError()], ids=repr)
def test_what_check_raises_is_reported_once_and_nothing_is_written(store, error):
    def check(tree):
        if tree["run"].value["step"] == [1]:
            raise error

    with BackgroundSaver(store, check=check) as saver:
        saver.save(1, tree_of(1))
        saver.wait()
        report = saver.finished()
        assert (report.step, report.bytes, report.error) == (1, 0, error)
        assert saver.finished() is None
        saver.save(2, tree_of(2))
    assert saver.finished().error is None
    assert store.steps() == [2]


def test_a_failed_save_is_not_forgotten_when_another_follows(store, monkeypatch):
    with BackgroundSaver(store) as saver:
        monkeypatch.setenv("HPCLR_FAILPOINT", "after_data:ENOSPC")
        saver.save(1, tree_of(1))
        saver.wait()
        monkeypatch.delenv("HPCLR_FAILPOINT")
        saver.save(2, tree_of(2))
    first, second = saver.finished(), saver.finished()
    assert isinstance(first.error, RetryableError)
    assert "step 1 could not be saved: No space left" in str(first.error)
    assert (second.step, second.error) == (2, None)


def test_without_a_copy_the_tree_itself_is_saved(store, monkeypatch):
    seen, tree = [], tree_of(1)
    with BackgroundSaver(store, check=seen.append) as saver:
        saver.save(1, tree, copy=False)
        assert saver.wait()
        assert seen == [tree]
        assert seen[0] is tree
        report = saver.finished()
        assert (report.step, report.error, report.blocked) == (1, None, report.seconds)
        monkeypatch.setenv("HPCLR_FAILPOINT", "after_data:EIO")
        saver.save(2, tree_of(2), copy=False)
        assert saver.wait()
        assert "step 2" in str(saver.finished().error)
    assert_holds(store.load_newest(), 1)


def test_a_wrong_tree_is_the_callers_mistake(store):
    with BackgroundSaver(store) as saver:
        with pytest.raises(TypeError, match=r"/model.*sparse"):
            saver.save(1, {"model": torch.ones(2).to_sparse()})
        with pytest.raises(TypeError, match=r"/model.*int"):
            saver.save(1, {"model": 3})
        assert (saver.in_flight, saver.finished()) == (False, None)
        saver.save(1, tree_of(1))
    assert_holds(store.load_newest(), 1)


def test_a_save_in_flight_is_completed_when_training_raises(store):
    saver = BackgroundSaver(store, check=lambda tree: time.sleep(0.1))

    def train():
        with saver:
            saver.save(1, tree_of(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert_holds(store.load_newest(), 1)


ENDS_AT_ONCE = """
import sys, time, torch
from pathlib import Path
from hpclr.checkpoint import CheckpointStore
from hpclr.checkpoint.background import BackgroundSaver

saver = BackgroundSaver(CheckpointStore(Path(sys.argv[1])), check=lambda tree: time.sleep(0.3))
saver.save(1, {"w": torch.ones(1000, 1000)})
"""


def test_a_process_that_ends_completes_its_save(store):
    done = subprocess.run(
        [sys.executable, "-c", ENDS_AT_ONCE, str(store.directory)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert torch.equal(store.load_newest().tree["w"], torch.ones(1000, 1000))


# The copy


def pointers(tree):
    return {name: tensor.data_ptr() for name, tensor in tree.items()}


def test_memory_is_used_again_where_it_fits():
    host = HostCopy()
    first = pointers(host.take({"a": torch.ones(1000), "b": torch.ones(7, 3), "c": torch.ones(9), "d": torch.ones(9)}))
    live = {"a": torch.zeros(1000), "b": torch.zeros(3, 7), "c": torch.zeros(9).long(), "e": torch.zeros(9)}
    copied = host.take(live)
    second = pointers(copied)
    assert second["a"] == first["a"]
    assert second["a"] != live["a"].data_ptr()
    assert all(torch.equal(copied[name], live[name]) and copied[name].dtype == live[name].dtype for name in live)
    third = pointers(host.take(live))
    assert third == second


def test_memory_that_the_last_tree_did_not_need_is_given_back():
    host = HostCopy()
    host.take({"a": torch.ones(1000), "group": {"b": torch.ones(7)}})
    host.take({"a": torch.ones(1000), "b": torch.ones(7)})
    assert set(host._buffers) == {("a",), ("b",)}


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).T,
        torch.tensor([1.0]).expand(4, 3),
        torch.nn.Parameter(torch.ones(2, 2)),
        torch.tensor([1 + 2j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
        torch.empty(0, 3),
        torch.tensor(True),
    ],
    ids=["transposed", "expanded", "parameter", "conjugate", "negative", "empty", "scalar"],
)
def test_any_tensor_is_copied_by_value_and_in_order(tensor):
    copied = HostCopy().take({"t": tensor})["t"]
    assert torch.equal(copied, tensor.detach())
    assert copied.is_contiguous()
    assert [copied.is_conj(), copied.is_neg(), copied.requires_grad] == [False] * 3


def test_memory_that_cannot_be_had_is_a_memory_error(store):
    with BackgroundSaver(store) as saver:
        with pytest.raises(MemoryError, match=r"shape \(1125899906842624,\)"):
            saver.save(1, {"w": torch.ones(1).expand(1 << 50)})
        saver.save(1, tree_of(1))
    assert_holds(store.load_newest(), 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_from_a_gpu_to_pinned_memory(store):
    tree = {"w": torch.full((1 << 24,), 1.0, device="cuda"), "t": torch.ones(50, 70, device="cuda").T}
    with BackgroundSaver(store) as saver:
        for step in (1, 2):
            saver.save(step, tree)
            tree["w"].fill_(step + 1)
    loaded = store.load_newest().tree
    assert loaded["w"].min() == loaded["w"].max() == 2
    assert HostCopy().take(tree)["w"].is_pinned()
