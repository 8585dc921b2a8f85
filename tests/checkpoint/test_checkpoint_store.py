"""The directory of checkpoints: what is kept, what is found again, what is set aside, what is said."""

import errno
import json
import logging
import os
import shutil
import subprocess
import threading

import h5py
import numpy as np
import pytest
import torch

from hpclr.checkpoint import CheckpointStore, Json, NewerVersionError, load_file, write_tree
from hpclr.checkpoint.digest import sha256_of, write_sidecar
from hpclr.errors import HpclrError, RetryableError, UsageError


def tree_of(step):
    return {"model": {"w": torch.full((50,), float(step))}, "run": Json({"step": step})}


def assert_holds(loaded, step):
    assert loaded.step == step
    assert torch.equal(loaded.tree["model"]["w"], tree_of(step)["model"]["w"])
    assert loaded.tree["run"] == Json({"step": step})


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=3)


def saved(store, *steps):
    for step in steps:
        store.save(step, tree_of(step))
    return store


def names(store):
    return sorted(path.name for path in store.directory.iterdir())


def flip(path, offset=-1):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def sidecar(path):
    return path.with_name(path.name + ".sha256")


def test_nothing_saved_is_no_error(store):
    assert store.load_newest() is None
    assert store.steps() == []
    assert store.best() is None
    assert store.sweep() == []


def test_the_newest_comes_back(store):
    saved(store, 5, 40, 9)
    assert store.steps() == [5, 9, 40]
    assert_holds(store.load_newest(), 40)
    assert_holds(load_file(store.path(9)), 9)


def test_names_have_eight_digits_and_more_if_needed(store):
    path = store.save(123, tree_of(123))
    assert path.name == "step-00000123.h5"
    assert store.save(1_234_567_890, tree_of(1)).name == "step-1234567890.h5"
    assert store.steps() == [123, 1_234_567_890]


def test_foreign_names_are_left_alone(store):
    saved(store, 1)
    for name in ("step-1.h5", "old-step-00000009.h5", "step-00000009.h5.txt", "step-000000009.h5", "notes.txt"):
        (store.directory / name).write_text("mine")
    assert store.steps() == [1]
    assert_holds(store.load_newest(), 1)
    assert store.sweep() == []
    assert (store.directory / "step-000000009.h5").read_text() == "mine"


def test_sha256sum_accepts_the_sidecar(store):
    path = store.save(3, tree_of(3))
    done = subprocess.run(["sha256sum", "-c", f"{path.name}.sha256"], cwd=path.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{path.name}: OK\n")


def test_the_newest_and_the_best_are_kept(store):
    for step in range(1, 8):
        store.save(step, tree_of(step), metric=1 / step, best=step in (1, 2))
    assert store.steps() == [2, 5, 6, 7]
    assert store.best() == store.path(2)
    assert json.loads((store.directory / "best.json").read_text()) == {"step": 2, "metric": 0.5}
    assert len(names(store)) == 2 * 4 + 1


def test_what_was_just_saved_is_kept_though_others_are_newer(store):
    saved(store, 10, 20, 30, 4)
    assert store.steps() == [4, 10, 20, 30]


def test_fewer_than_two_are_not_kept(tmp_path):
    with pytest.raises(UsageError, match=r"at least 2, found 1"):
        CheckpointStore(tmp_path, keep=1)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"metric": 1}', b'{"step": "x"}', b"\xff", b'{"step": 99}'])
def test_a_damaged_note_of_the_best_is_no_obstacle(store, content):
    saved(store, 1)
    (store.directory / "best.json").write_bytes(content)
    assert store.best() is None
    saved(store, 2)
    assert_holds(store.load_newest(), 2)


def test_a_metric_that_is_not_finite_leaves_json_valid(store):
    store.save(1, tree_of(1), metric=float("nan"), best=True)
    assert json.loads((store.directory / "best.json").read_text(), parse_constant=pytest.fail)["metric"] is None
    assert store.best() == store.path(1)


def test_the_same_step_again_replaces(store):
    saved(store, 1, 2)
    store.save(2, tree_of(2) | {"extra": Json("new")})
    assert store.load_newest().tree["extra"] == Json("new")
    assert sidecar(store.path(2)).read_text().count("\n") == 1


def test_a_wrong_tree_changes_nothing(store):
    saved(store, 1)
    before = names(store)
    with pytest.raises(TypeError, match="/model"):
        store.save(2, {"model": 3})
    with pytest.raises(ValueError, match="step"):
        store.save(-2, tree_of(2))
    assert names(store) == before


# Damage


@pytest.mark.parametrize("damage", ["data", "short", "empty", "sidecar", "sidecar empty", "sidecar of another"])
def test_a_damaged_one_is_set_aside_and_the_one_before_is_used(store, damage, caplog):
    saved(store, 1, 2, 3)
    path = store.path(3)
    if damage == "data":
        flip(path, 200)
    elif damage in ("short", "empty"):
        os.truncate(path, path.stat().st_size - 1 if damage == "short" else 0)
    elif damage == "sidecar":
        flip(sidecar(path), 5)
    else:
        sidecar(path).write_bytes(b"" if damage.endswith("empty") else sidecar(store.path(2)).read_bytes())
    with caplog.at_level(logging.WARNING, "hpclr.checkpoint"):
        assert_holds(store.load_newest(), 2)
    assert f"set aside as {path.name}.bad" in caplog.text
    assert store.steps() == [1, 2]
    assert {f"{path.name}.bad", f"{path.name}.bad.sha256", f"{path.name}.bad.reason"} <= set(names(store))
    reason = (store.directory / f"{path.name}.bad.reason").read_text()
    assert str(path) in reason
    assert "expected" in reason


def test_a_bad_one_of_the_same_step_is_not_overwritten(store):
    saved(store, 1)
    for _ in range(3):
        flip(store.save(2, tree_of(2)))
        assert_holds(store.load_newest(), 1)
    bad = [name for name in names(store) if name.startswith("step-00000002.h5.bad")]
    assert [name for name in bad if name[-1] in "d23"] == [f"step-00000002.h5.bad{n}" for n in ("", "2", "3")]
    assert len(bad) == 9


def test_a_run_never_starts_over_silently(store):
    saved(store, 1, 2)
    for step in (1, 2):
        flip(store.path(step))
    for _ in range(2):  # the second time, all is set aside already
        with pytest.raises(UsageError, match=r"none among the 2 that were saved"):
            store.load_newest()
    saved(store, 3)
    assert_holds(store.load_newest(), 3)


def test_data_that_vanished_is_missed(store):
    saved(store, 1)
    store.path(1).unlink()
    assert store.sweep() == []
    with pytest.raises(UsageError, match="none among the 1"):
        store.load_newest()


def test_what_was_never_committed_is_set_aside(store, caplog):
    saved(store, 1, 2)
    sidecar(store.path(2)).unlink()
    assert store.steps() == [1]
    assert_holds(store.load_newest(), 1)
    assert "never committed" in caplog.text
    assert "step-00000002.h5.bad" in names(store)


def test_a_first_save_cut_short_is_no_loss(store):
    saved(store, 1)
    sidecar(store.path(1)).unlink()
    assert store.load_newest() is None
    assert store.load_newest() is None


def test_a_checkpoint_under_the_name_of_another_step_is_refused(store):
    saved(store, 1, 2)
    store.path(9).write_bytes(store.path(1).read_bytes())
    write_sidecar(store.path(9), sha256_of(store.path(9)))
    assert_holds(store.load_newest(), 2)
    assert "step 9, found that of 1" in (store.directory / "step-00000009.h5.bad.reason").read_text()


def test_a_wrong_layout_with_the_right_digest_is_set_aside(store):
    saved(store, 1, 2)
    with h5py.File(store.path(2), "r+", libver=("v110", "v110")) as file:
        file["link"] = h5py.SoftLink("/model")
    write_sidecar(store.path(2), sha256_of(store.path(2)))
    assert_holds(store.load_newest(), 1)


def test_a_newer_version_is_refused_but_not_set_aside(store):
    saved(store, 1, 2)
    with h5py.File(store.path(2), "r+", libver=("v110", "v110")) as file:
        file.attrs["version"] = np.int64(4)
    write_sidecar(store.path(2), sha256_of(store.path(2)))
    with pytest.raises(NewerVersionError):
        store.load_newest()
    assert store.steps() == [1, 2]


def test_sweep_removes_left_overs_only(store):
    saved(store, 1, 2)
    before = names(store)
    left = [".tmp-step-00000003.h5", ".trash-step-00000000.h5", "step-00000000.h5.sha256"]
    for name in left:
        (store.directory / name).write_text("x")
    assert sorted(store.sweep()) == sorted(left)
    assert names(store) == before


# A file system whose view lags behind


class Vanishing(CheckpointStore):
    """A store whose newest checkpoint is taken away by somebody right after it was listed to be read."""

    def __init__(self, directory, suffixes):
        super().__init__(directory)
        self.suffixes, self.listings = suffixes, 0

    def steps(self):
        steps = super().steps()
        self.listings += 1
        if self.listings == 2:  # the first is that of what was never committed
            for suffix in self.suffixes:
                path = self.path(steps[-1])
                path.with_name(path.name + suffix).unlink()
        return steps


@pytest.mark.parametrize("suffixes", [[""], ["", ".sha256"], [".sha256"]], ids=str)
def test_a_checkpoint_that_vanished_after_it_was_listed_is_no_damage(store, suffixes, caplog):
    saved(store, 1, 2, 3)
    assert_holds(Vanishing(store.directory, suffixes).load_newest(), 2)
    assert caplog.text.count("listed anew") == 1


@pytest.mark.parametrize(("fault", "times"), [("ESTALE", 2), ("ENOENT", 2), ("EIO", 1), ("EACCES", 1)])
def test_a_file_that_cannot_be_read_is_tried_again_and_then_named(store, fault, times, monkeypatch, caplog):
    saved(store, 1, 2)
    before = names(store)
    monkeypatch.setenv("HPCLR_FAILPOINT", f"before_load:{fault}")
    with pytest.raises(RetryableError, match=rf"cannot be read: .*{os.strerror(getattr(errno, fault))}"):
        store.load_newest()
    assert caplog.text.count("listed anew") == times - 1
    assert names(store) == before


# Single files


def test_a_single_file_needs_its_digest_unless_told_otherwise(store, tmp_path):
    saved(store, 1)
    copy = tmp_path / "copy.h5"
    copy.write_bytes(store.path(1).read_bytes())
    with pytest.raises(UsageError, match=r"no copy\.h5\.sha256 beside it"):
        load_file(copy)
    assert_holds(load_file(copy, verify=False), 1)
    sidecar(copy).write_bytes(sidecar(store.path(1)).read_bytes())
    with pytest.raises(UsageError, match=r"copy\.h5'.*sha256sum copy\.h5 >"):
        load_file(copy)
    subprocess.run("sha256sum copy.h5 > copy.h5.sha256", shell=True, cwd=tmp_path, check=True)
    assert_holds(load_file(copy), 1)


def test_a_part_of_a_single_file(store):
    saved(store, 1)
    assert load_file(store.path(1), "run").tree == {"run": Json({"step": 1})}


def test_the_digest_is_checked_before_hdf5_sees_the_file(tmp_path):
    path = tmp_path / "f.h5"
    write_tree(path, tree_of(1), {"step": 1})
    write_sidecar(path, sha256_of(path))
    content = path.read_bytes()
    path.write_bytes(content[:48].ljust(len(content), b"\0"))  # its start alone, which says how long it is
    with pytest.raises(UsageError, match="sha256"):
        load_file(path)


def test_missing_files_and_directories(tmp_path):
    with pytest.raises(UsageError, match="nothing there"):
        load_file(tmp_path / "missing.h5")
    with pytest.raises(UsageError, match="no file there"):
        load_file(tmp_path)


# A file system that does not let us


def test_a_vanished_run_directory_is_not_made_anew(tmp_path):
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    with pytest.raises(RetryableError, match=r"step 1 could not be saved: No such file"):
        store.save(1, tree_of(1))
    assert not (tmp_path / "run").exists()


def test_a_directory_of_somebody_else(store):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere; the mounted read-only file system tests this")
    saved(store, 1)
    store.directory.chmod(0o555)
    try:
        with pytest.raises(RetryableError, match="Make the directory writable"):
            store.save(2, tree_of(2))
        assert_holds(store.load_newest(), 1)
    finally:
        store.directory.chmod(0o755)


def test_a_checkpoint_that_this_host_sees_late(store):
    """As on a network file system: another process has chosen it, here its directory is still as it was."""
    saved(store, 1, 2)
    hidden = store.directory.parent / "hidden"
    digest = sidecar(store.path(2))
    os.rename(digest, hidden)
    threading.Timer(0.2, os.rename, (hidden, digest)).start()
    assert store.load(2).step == 2
    with pytest.raises(RetryableError, match=r"step-00000003\.h5: the checkpoint cannot be read"):
        store.load(3, patience=0.0)


def test_a_smaller_keep_makes_room(store, monkeypatch):
    """On a full disk a run can be continued with fewer checkpoints kept."""
    saved(store, 1, 2, 3)
    smaller = CheckpointStore(store.directory, keep=2)
    real = shutil.disk_usage

    def usage(path):
        return real(path)._replace(free=0 if len(store.steps()) > 2 else 1 << 30)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    smaller.save(4, tree_of(4))
    assert smaller.steps() == [3, 4]


@pytest.mark.parametrize("times", [1, 2])
def test_one_who_is_no_longer_the_owner_touches_nothing(store, times):
    """A job that was suspended comes to again while another one saves the same step."""
    saved(store, 1)
    asked = []

    def guard():
        asked.append(None)
        if len(asked) == times:
            new_owner.save(2, tree_of(2))
            raise HpclrError("taken over")

    new_owner = CheckpointStore(store.directory)
    with pytest.raises(HpclrError, match="taken over"):
        CheckpointStore(store.directory, guard=guard).save(2, {"model": {"w": torch.zeros(50)}})
    assert_holds(store.load_newest(), 2)
    assert store.sweep() == []


def test_odd_things_among_the_checkpoints(store, tmp_path):
    saved(store, 1)
    (store.directory / ".tmp-x").mkdir()
    os.mkfifo(store.directory / "best.json")
    assert store.best() is None
    assert store.sweep() == []
    assert_holds(store.load_newest(), 1)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file: expected a directory of checkpoints.*Not a directory"):
        CheckpointStore(tmp_path / "file").steps()


def test_a_best_json_without_end(store):
    saved(store, 1)
    (store.directory / "best.json").write_text("[" * 200_000)
    assert store.best() is None
