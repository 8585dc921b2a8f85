"""Killed processes, flipped bits, full disks: a valid checkpoint remains and nothing acknowledged is lost."""

import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch

from hpclr.checkpoint import CheckpointStore, Json, load_file
from hpclr.checkpoint.background import BackgroundSaver
from hpclr.checkpoint.digest import sha256_of, write_sidecar
from hpclr.errors import RetryableError, UsageError

FORK = multiprocessing.get_context("fork")


def tree_of(step):
    generator = torch.Generator().manual_seed(step)
    weights = {f"layers.{i}.weight": torch.randn(40, 50, generator=generator) for i in range(6)}
    return {"model": weights, "run": Json({"step": step})}


def assert_holds(loaded, step):
    assert loaded.step == step
    expected = tree_of(step)
    assert loaded.tree["run"] == expected["run"]
    assert loaded.tree["model"].keys() == expected["model"].keys()
    for name, tensor in expected["model"].items():
        assert torch.equal(loaded.tree["model"][name], tensor)


def saved(directory, *steps):
    store = CheckpointStore(directory, keep=2)
    for step in steps:
        store.save(step, tree_of(step))
    return store


def left_overs(store):
    steps = set(store.steps())
    expected = {f"step-{step:08d}.h5{end}" for step in steps for end in ("", ".sha256")}
    return {path.name for path in store.directory.iterdir()} - expected


# Killed processes


BEFORE_RENAME = ["before_data", "in_data", "after_data", "after_digest"]
BEFORE_COMMIT = ["after_rename", "before_commit"]
AFTER_COMMIT = ["after_commit", "in_retention"]
PLACES = [*((name, 3) for name in BEFORE_RENAME + BEFORE_COMMIT + AFTER_COMMIT)]
PLACES += [*((name, 2) for name in [*BEFORE_RENAME, "after_announcement", *BEFORE_COMMIT, "after_commit"])]


def save_under_failpoint(directory, name, step, background=False):
    """Save a step, whose content is another one than that which it may replace."""
    os.environ["HPCLR_FAILPOINT"] = name
    store = CheckpointStore(directory, keep=2)
    if not background:
        store.save(step, tree_of(step), metric=0.5)
        return
    with BackgroundSaver(store) as saver:
        saver.save(step, tree_of(step), metric=0.5)
    error = saver.finished().error
    if error is not None:
        raise error


def killed_under_failpoint(*arguments):
    child = FORK.Process(target=save_under_failpoint, args=arguments)
    child.start()
    child.join()
    return child.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("background", [False, True], ids=["", "background"])
@pytest.mark.parametrize(("name", "step"), PLACES)
def test_killed_at_a_failpoint(tmp_path, name, step, background):
    store = saved(tmp_path / "c", 1, 2)
    assert killed_under_failpoint(store.directory, name, step, background)
    store.sweep()
    assert_holds(store.load_newest(), 3 if step == 3 and name in AFTER_COMMIT else 2)
    set_aside = {f"step-00000003.h5.bad{end}" for end in ("", ".reason")}
    assert left_overs(store) == (set_aside if step == 3 and name in BEFORE_COMMIT else set())
    saved(store.directory, 3)
    assert_holds(store.load_newest(), 3)


FAULTS = {
    "ENOSPC": r"No space left on device; it needs .* MB, .* MB free\..*Free space there",
    "EDQUOT": "Disk quota exceeded.*Your quota is used up.*have the quota raised",
    "EFBIG": "File too large.*limit raised",
    "EROFS": "Read-only file system.*mounted writable",
    "EACCES": "Permission denied.*Make the directory writable",
    "EPERM": "Operation not permitted.*Make the directory writable",
    "EIO": "Input/output error.*disk, or the network to it, has failed",
    "ESTALE": "Stale file handle.*mounted again",
    "ENOENT": "No such file or directory.*has vanished",
    "ENODEV": "No such device.*is mounted and works",
}


@pytest.mark.parametrize(("fault", "background"), [("ENOSPC", False), ("EDQUOT", False), ("ENOSPC", True)])
@pytest.mark.parametrize(("name", "step"), [place for place in PLACES if place[0] not in AFTER_COMMIT])
def test_a_fault_at_a_failpoint(tmp_path, monkeypatch, name, step, fault, background):
    store = saved(tmp_path / "c", 1, 2)
    monkeypatch.setenv("HPCLR_FAILPOINT", "")
    with pytest.raises(RetryableError, match=f"step {step} could not be saved: {FAULTS[fault]}"):
        save_under_failpoint(store.directory, f"{name}:{fault}", step, background)
    assert left_overs(store) == set()
    assert_holds(store.load_newest(), 2)
    monkeypatch.setenv("HPCLR_FAILPOINT", "")
    saved(store.directory, 3)
    assert_holds(store.load_newest(), 3)
    assert sidecar_lines(store.path(3)) == 1


def test_a_fault_in_retention_is_a_warning(tmp_path, monkeypatch, caplog):
    store = saved(tmp_path / "c", 1, 2)
    monkeypatch.setenv("HPCLR_FAILPOINT", "in_retention:EIO")
    store.save(3, tree_of(3))
    assert "could not be deleted: [Errno 5]" in caplog.text
    assert_holds(store.load_newest(), 3)
    assert sorted(store.sweep()) == [".trash-step-00000001.h5", "step-00000001.h5.sha256"]
    assert left_overs(store) == set()


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_its_remedy(tmp_path, monkeypatch, fault):
    monkeypatch.setenv("HPCLR_FAILPOINT", f"after_data:{fault}")
    with pytest.raises(RetryableError, match=FAULTS[fault]):
        saved(tmp_path / "c", 1)


def test_killed_in_the_middle_of_the_data(tmp_path):
    store = saved(tmp_path / "c", 1, 2)
    large = {f"w{n}": torch.ones(1 << 20) for n in range(5)}
    os.environ["HPCLR_FAILPOINT"] = "in_data"
    child = FORK.Process(target=store.save, args=(3, large))
    child.start()
    del os.environ["HPCLR_FAILPOINT"]
    child.join()
    (left,) = store.directory.glob(".tmp-step-00000003.h5-*")
    assert 0 < left.stat().st_size < 5 << 22
    assert store.sweep() == [left.name]
    assert_holds(store.load_newest(), 2)


def test_killed_twice_while_replacing(tmp_path):
    store = saved(tmp_path / "c", 1, 2)
    path = store.path(2)
    write_sidecar(path, sha256_of(path), "0" * 64)  # announced, but the new content never came
    assert_holds(store.load_newest(), 2)
    assert killed_under_failpoint(store.directory, "after_announcement", 2)
    assert_holds(store.load_newest(), 2)
    saved(store.directory, 2)
    assert load_file(path).step == 2
    assert sidecar_lines(path) == 1


def sidecar_lines(path):
    return path.with_name(path.name + ".sha256").read_text().count("\n")


def save_for_ever(directory, acknowledge):
    store = CheckpointStore(directory, keep=2)
    store.sweep()
    newest = store.load_newest()
    step = newest.step if newest else 0
    while True:
        step += 1
        if step % 4:  # every fourth save replaces the one before
            store.save(step, tree_of(step), metric=step, best=step % 5 == 0)
        else:
            step -= 1
            store.save(step, tree_of(step))
            step += 1
            store.save(step, tree_of(step))
        os.write(acknowledge, struct.pack("q", step))


def save_for_ever_in_the_background(directory, acknowledge):
    """The tree changes as training would change it, as soon as `save` returns."""
    store = CheckpointStore(directory, keep=2)
    store.sweep()
    newest = store.load_newest()
    step, tree = newest.step if newest else 0, tree_of(0)
    with BackgroundSaver(store) as saver:
        while True:
            step += 1
            for name, tensor in tree_of(step)["model"].items():
                tree["model"][name].copy_(tensor)
            saver.save(step, {**tree, "run": Json({"step": step})})
            if (report := saver.finished()) is not None:
                assert report.error is None
                os.write(acknowledge, struct.pack("q", report.step))


def kill_while_saving(target, directory, delay):
    """Start a child that saves, kill it `delay` seconds after its first save; returns its last acknowledged step."""
    read, write = os.pipe()
    child = FORK.Process(target=target, args=(directory, write))
    child.start()
    os.close(write)
    first = os.read(read, 8)
    time.sleep(delay)
    child.kill()
    child.join()
    rest = b"".join(iter(lambda: os.read(read, 1 << 16), b""))
    os.close(read)
    return max(struct.unpack(f"{len(first + rest) // 8}q", first + rest))


@pytest.mark.parametrize("saving", [save_for_ever, save_for_ever_in_the_background])
@pytest.mark.parametrize("times", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_killed_at_random_instants(tmp_path, times, saving):
    generator = random.Random(times)
    store = CheckpointStore(tmp_path / "c", keep=2)
    kinds = set()
    for _ in range(times):
        acknowledged = kill_while_saving(saving, store.directory, generator.uniform(0, 0.06))
        kinds |= {name.split("-")[0] for name in left_overs(store)}
        store.sweep()
        newest = store.load_newest()
        assert newest.step >= acknowledged
        assert_holds(newest, newest.step)
        assert len(store.steps()) >= 2
        assert not [name for name in left_overs(store) if name.startswith(".")]
    assert ".tmp" in kinds, "no kill has hit a save: the test proves nothing"
    assert not list(store.directory.glob("*.bad*.sha256")), "a committed checkpoint was found damaged"


# Damaged bytes


def flip_bit(path, generator):
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def truncate(path, generator):
    os.truncate(path, generator.randrange(path.stat().st_size))


def zero_page(path, generator):
    content = bytearray(path.read_bytes())
    start = generator.randrange(0, len(content), 4096)
    stop = min(start + 4096, len(content))
    if content[start:stop] == bytes(stop - start):
        content[start] = 1
    else:
        content[start:stop] = bytes(stop - start)
    path.write_bytes(content)


def append(path, generator):
    with path.open("ab") as file:
        file.write(generator.randbytes(generator.randrange(1, 100)))


@pytest.mark.parametrize("scale", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("damage", "suffix", "times"),
    [
        (flip_bit, "", 250),
        (flip_bit, ".sha256", 50),
        (truncate, "", 30),
        (truncate, ".sha256", 10),
        (zero_page, "", 15),
        (zero_page, ".sha256", 1),
        (append, "", 10),
        (append, ".sha256", 10),
    ],
)
def test_damage_is_refused_with_the_file_named(tmp_path, damage, suffix, times, scale):
    generator = random.Random(f"{damage.__name__}{suffix}{scale}")
    path = saved(tmp_path / "c", 1).path(1)
    target = path.with_name(path.name + suffix)
    good = target.read_bytes()
    for _ in range(times * scale):
        damage(target, generator)
        with pytest.raises(UsageError, match=rf"{path.name}.*expected .*, found "):
            load_file(path)
        target.write_bytes(good)
    assert_holds(load_file(path), 1)


def count_silent_flips(path, times, report):
    """Flip bits under HDF5's own checksums alone; reports how many were read as other numbers."""
    generator = random.Random(1)
    good, silent = path.read_bytes(), 0
    for _ in range(times):
        flip_bit(path, generator)
        try:
            assert_holds(load_file(path, verify=False), 1)
        except UsageError:
            pass
        except (AssertionError, KeyError):
            silent += 1
        path.write_bytes(good)
    report.put(silent)


@pytest.mark.parametrize("times", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_even_without_the_digest_no_flipped_bit_is_silent(tmp_path, times):
    path = saved(tmp_path / "c", 1).path(1)
    report = FORK.Queue()  # in a child: HDF5 may crash on what it was never meant to see
    child = FORK.Process(target=count_silent_flips, args=(path, times, report))
    child.start()
    assert report.get(timeout=200) == 0
    child.join()


# Full and read-only disks


def save_within(directory, limit, report):
    """Save with files limited to so many bytes, then without the limit; reports what happened."""
    store = CheckpointStore(directory, keep=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        store.save(3, tree_of(3))
        first = "saved"
    except RetryableError as error:
        first = str(error)
    remaining = left_overs(store)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    still_open = open_checkpoints()
    store.save(4, tree_of(4))
    report.put((first, remaining, still_open))


def open_checkpoints():
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if os.path.islink(link) and "step-" in os.readlink(link)]


@pytest.mark.parametrize("limit", [0, 10, 60, 500, 4_000, 20_000, 40_000])
def test_a_write_that_fails_midway(tmp_path, limit):
    store = saved(tmp_path / "c", 1, 2)
    report = FORK.Queue()
    child = FORK.Process(target=save_within, args=(store.directory, limit, report))
    child.start()
    message, remaining, still_open = report.get(timeout=60)
    child.join()
    assert child.exitcode == 0
    assert "step 3 could not be saved: File too large" in message
    assert "Files may not become so large" in message
    assert (remaining, still_open) == (set(), [])
    assert store.steps() == [2, 4]
    assert_holds(store.load_newest(), 4)


FAIL_AGAIN_AND_AGAIN = """
import resource, sys, torch
from pathlib import Path
from hpclr.checkpoint import CheckpointStore
from hpclr.errors import RetryableError

store = CheckpointStore(Path(sys.argv[1]))
tree = {f"layers.{i}.weight": torch.ones(100, 100) for i in range(50)}
for limit in (100, 3_000, 50_000, 600_000, 1_900_000) * 4:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    try:
        store.save(1, tree)
    except RetryableError:
        print("refused")
"""


def test_a_process_whose_writes_failed_ends_in_peace(tmp_path):
    command = [sys.executable, "-c", FAIL_AGAIN_AND_AGAIN, str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")  # HDF5 that saw a write fail would crash at exit
    assert done.stdout == "refused\n" * 20


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB and 32 files, which needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=1m,nr_inodes=32", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk, leave):
    (disk / "ballast").write_bytes(b"")
    usage = shutil.disk_usage(disk)
    (disk / "ballast").write_bytes(bytes(max(0, usage.free - leave)))


@pytest.mark.parametrize("leave", [0, 4096, 40_000])
def test_a_full_disk(small_disk, leave):
    store = saved(small_disk / "c", 1, 2)
    fill(small_disk, leave)
    with pytest.raises(RetryableError, match=r"step 3 could not be saved: No space left.*MB free.*Free space there"):
        store.save(3, tree_of(3))
    assert left_overs(store) == set()
    assert_holds(store.load_newest(), 2)
    (small_disk / "ballast").unlink()
    assert_holds(saved(store.directory, 3).load_newest(), 3)


@pytest.mark.parametrize("leave", [0, 1])
def test_no_file_left_for_the_digest(small_disk, leave):
    store = saved(small_disk / "c", 1, 2)
    count = 0
    while os.statvfs(small_disk).f_ffree > leave:
        (small_disk / f"ballast{count}").touch()
        count += 1
    with pytest.raises(RetryableError, match="No space left"):
        store.save(3, tree_of(3))
    assert left_overs(store) == set()
    assert_holds(store.load_newest(), 2)
    (small_disk / "ballast0").unlink()
    (small_disk / "ballast1").unlink()
    assert_holds(saved(store.directory, 3).load_newest(), 3)


def test_a_read_only_disk(small_disk, caplog):
    store = saved(small_disk / "c", 1, 2)
    content = bytearray(store.path(2).read_bytes())
    content[100] ^= 1
    store.path(2).write_bytes(content)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(RetryableError, match=rf"{os.strerror(errno.EROFS)}.*have it mounted writable again"):
        store.save(3, tree_of(3))
    assert_holds(store.load_newest(), 1)
    assert "cannot be set aside" in caplog.text
