"""The child process: what it says of good files, and what becomes of it on bad ones."""

import hashlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from h5py import h5d, h5p, h5s, h5t
from hostile_files import describe, json, new_file

from hpclr.checkpoint import CheckpointStore, Json, examination, sandbox
from hpclr.checkpoint.format import STORED_AS
from hpclr.checkpoint.sandbox import examine
from hpclr.errors import UsageError

FORK = multiprocessing.get_context("fork")
FLOATS = [name for name in STORED_AS if name.startswith(("float", "bfloat", "complex"))]


def saved(tmp_path, tree):
    store = CheckpointStore(tmp_path / "c")
    return store.save(7, tree)


def test_what_is_in_a_file(tmp_path):
    path = saved(
        tmp_path, {"model": {"w": torch.ones(3, 4), "n": torch.tensor(1)}, "run": Json({"yaml": "é"}), "x": Json(1)}
    )
    survey = examine(path)
    assert (survey.version, survey.step, survey.bytes) == (2, 7, path.stat().st_size)
    assert survey.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    items = {item.path: (item.kind, item.dtype, item.shape, item.bytes, item.finite) for item in survey.entries}
    assert items == {
        ("model",): ("group", "", (), 0, True),
        ("model", "w"): ("tensor", "float32", (3, 4), 48, True),
        ("model", "n"): ("tensor", "int64", (), 8, True),
        ("run",): ("json", "uint8", (13,), 13, True),
        ("x",): ("json", "uint8", (1,), 1, True),
    }
    assert survey.json == [(("run",), '{"yaml":"é"}')]


@pytest.mark.parametrize("order", [1, -1], ids=["last", "first"])
def test_every_float_type_tells_what_is_not_finite(tmp_path, order):
    tree = {}
    for name in FLOATS:
        dtype = getattr(torch, name)
        good = torch.tensor([0.0, 1.0, -1.5, torch.finfo(dtype).max, torch.finfo(dtype).tiny]).to(dtype)
        for what in ("nan", "inf", "-inf"):
            bad = torch.tensor([float(what)]).to(dtype)
            tree[f"{name} {what}"] = torch.cat([good.to(torch.complex128), bad.to(torch.complex128)][::order]).to(dtype)
        tree[f"{name} good"] = good
        tree[f"{name} empty"] = torch.empty(0, dtype=dtype)
    found = {item.path[0]: item.finite for item in examine(saved(tmp_path, tree)).entries}
    assert found == {name: bool(torch.isfinite(tensor.to(torch.complex128)).all()) for name, tensor in tree.items()}
    assert not found["bfloat16 nan"]
    assert not found["float8_e5m2 inf"]


def test_the_digest_comes_first(tmp_path):
    path = saved(tmp_path, {"w": torch.ones(3)})
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UsageError, match="the content has changed since it was saved: expected sha256"):
        examine(path)
    path.with_name(path.name + ".sha256").unlink()
    with pytest.raises(UsageError, match=r"there is no step-00000007.h5.sha256 beside it"):
        examine(path)


def test_names_that_are_not_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.h5")
    with pytest.raises(UsageError, match="found nothing there"):
        examine(path)
    path.write_bytes(b"text")
    with pytest.raises(UsageError, match="starts with"):
        examine(path, without_digest=True)
    with new_file(path.with_name("f.h5")):
        pass
    os.replace(path.with_name("f.h5"), path)
    assert examine(path, without_digest=True).entries == []


SMALL = """
import resource, sys
from pathlib import Path
from hpclr.checkpoint.sandbox import examine

seen = []
print(len(examine(Path(sys.argv[1]), without_digest=True, progress=lambda *counts: seen.append(counts)).entries))
assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 200_000
size = 2 * Path(sys.argv[1]).stat().st_size
assert [total for _, total in seen] == [size] * len(seen)
assert [done for done, _ in seen] == sorted(done for done, _ in seen)
assert len(seen) >= size // (80 << 20)
"""


def examined_by_a_small_process(path):
    """A child's peak of memory counts what it was forked from, so that must be small."""
    done = subprocess.run([sys.executable, "-c", SMALL, path], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    return int(done.stdout)


def test_a_tensor_larger_than_the_memory(tmp_path):
    path, size = tmp_path / "f.h5", 250 << 20
    with new_file(path) as file:
        plan = h5p.create(h5p.DATASET_CREATE)
        plan.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        plan.set_fill_time(h5d.FILL_TIME_NEVER)  # a hole in the file, which reads as zeros
        h5d.create(file.id, b"w", h5t.IEEE_F32LE, h5s.create_simple((size // 4,)), dcpl=plan)
        describe(file["w"]).attrs["crc32"] = np.uint32(zlib.crc32(bytes(size)))
    assert examined_by_a_small_process(path) == 1


def test_json_that_grows_in_memory(tmp_path):
    path = tmp_path / "f.h5"
    with new_file(path) as file:
        json(file, "j", b"[" + b"[]," * (examination.MAX_JSON_BYTES // 3 - 2) + b"0]")
    assert examined_by_a_small_process(path) == 1
    with new_file(path) as file:
        json(file, "j", b"[" + b"[]," * (examination.MAX_JSON_BYTES // 3) + b"0]")
    with pytest.raises(UsageError, match="JSON of at most 4194304 bytes in a file that is examined"):
        examine(path, without_digest=True)


# A child that does not behave


@pytest.fixture
def good(tmp_path):
    return saved(tmp_path, {"w": torch.ones(3)})


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os; os.kill(os.getpid(), 11)", r"HDF5 crashed on it \(SIGSEGV\)"),
        ("import os; os.abort()", r"HDF5 crashed on it \(SIGABRT\)"),
        (
            "import resource as r; r.setrlimit(r.RLIMIT_CPU, (1, 2))\nwhile True: pass",
            "more than 4 s of processor time",
        ),
        ("import time; time.sleep(60)", "reading it took longer than 2 s"),
        ("import os, time; os.close(1), os.close(2); time.sleep(60)", "reading it took longer than 2 s"),
        ("raise SystemExit(5)", "exit code 5 and without a result"),
        ("print('{}')", "exit code 0 and without a result; it said '{}'"),
        ('print(\'{"type":"good","version":[],"step":1}\')', "without a result; it said "),
        ("print('\\udcff'.encode('utf-8', 'surrogateescape'))", "without a result; it said "),
        ("import nowhere", "exit code 1 and without a result; it said .ModuleNotFoundError"),
        ("while True: print('x' * 10_000)", "said more than 1048576 bytes"),
        ("while True: print('x' * 10_000, end='')", "said more than 1048576 bytes"),
    ],
)
def test_a_child_that_does_not_behave_is_ended(good, monkeypatch, program, reason):
    monkeypatch.setattr(sandbox, "_PROGRAM", program.replace("{", "{{").replace("}", "}}"))
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 1.6)
    monkeypatch.setattr(sandbox, "MAX_REPORT", 1 << 20)
    start = time.monotonic()
    with pytest.raises(UsageError, match=f"{good}: .*({reason})"):
        examine(good)
    assert time.monotonic() - start < 6


def test_all_that_the_child_started_ends_with_it(good, monkeypatch, tmp_path):
    program = "import os, time; os.fork() or open({place!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    monkeypatch.setattr(sandbox, "_PROGRAM", program.format(place=str(tmp_path / "pid")))
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 1.5)
    with pytest.raises(UsageError, match="took longer"):
        examine(good)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not alive(pid):
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("what the child started is still there")


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def within_limits(path, report):
    """What a process can still do that has limited itself."""
    examination._limit_resources(100_000_000, 0)
    cpu, core = resource.getrlimit(resource.RLIMIT_CPU), resource.getrlimit(resource.RLIMIT_CORE)
    found = [core == (0, 0), 6 <= cpu[0] <= 12 + time.process_time()]
    for attempt in (lambda: bytes(200 << 20), lambda: [os.dup(1) for _ in range(20)]):
        try:
            attempt()
        except (MemoryError, OSError) as error:
            found.append(type(error).__name__)
    report.send(found)
    path.write_bytes(b"x")


def test_the_limits_hold(tmp_path):
    receive, send = FORK.Pipe(duplex=False)
    (tmp_path / "f").touch()
    child = FORK.Process(target=within_limits, args=(tmp_path / "f", send))
    child.start()
    assert receive.recv() == [True, True, "MemoryError", "OSError"]
    child.join(30)
    assert child.exitcode != 0  # Python makes an OSError of SIGXFSZ
    assert (tmp_path / "f").read_bytes() == b""


def test_no_environment_variable_changes_what_the_child_runs(good, monkeypatch, tmp_path):
    (tmp_path / "h5py.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HDF5_PLUGIN_PRELOAD", str(tmp_path))
    assert examine(good).step == 7
