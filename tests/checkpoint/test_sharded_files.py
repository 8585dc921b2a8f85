"""Checkpoints of sharded tensors: one file a process and an index of them, read whole or by rows by any number."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import threading
import time
from itertools import pairwise
from pathlib import Path

import h5py
import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from hpclr.checkpoint import CheckpointStore, Json, PartReport, Piece, load_file, open_file, read_attrs
from hpclr.checkpoint.background import BackgroundSaver, HostCopy
from hpclr.checkpoint.digest import sha256_of, write_sidecar
from hpclr.checkpoint.format import STORED_AS
from hpclr.checkpoint.parts import MOST_OPEN, MissingPartError, parts_directory
from hpclr.checkpoint.sandbox import examine
from hpclr.checkpoint.writer import write_tree
from hpclr.errors import HpclrError, RetryableError, UsageError
from hpclr.training.verification import verify_file

FORK = multiprocessing.get_context("fork")
DOCUMENT = Path(__file__).parents[2] / "docs" / "checkpoint-format.md"
VERSION_1 = Path(__file__).with_name("version-1.h5")


def whole(step):
    """The tensors of a run, of sizes that no number of processes divides."""
    w = torch.arange(70, dtype=torch.float32).reshape(10, 7) + step
    return {
        "w": w,
        "b": w[:, 0].bfloat16(),
        "few": torch.full((2, 3), step, dtype=torch.int64),
        "none": torch.empty(0, 4),
    }


def rows_of(count, process, processes):
    """As FSDP shares out the first axis: the last processes may have fewer rows, or none."""
    chunk = -(-count // processes)
    return min(process * chunk, count), min((process + 1) * chunk, count)


def share(tensor, process, processes):
    start, stop = rows_of(len(tensor), process, processes)
    return Piece(tensor[start:stop], start, tuple(tensor.shape))


def tree_of(step, process, processes):
    pieces = {name: share(tensor, process, processes) for name, tensor in whole(step).items()}
    return {"model": pieces, "optimizer": {"n": torch.tensor(step)}, "run": Json({"step": step})}


def save_parts(store, step, processes, content=None):
    return [
        store.write_part(step, tree_of(content or step, process, processes), process, processes)
        for process in range(processes)
    ]


def saved(store, *steps, processes=2, content=None, **options):
    for step in steps:
        reports = save_parts(store, step, processes, content)
        store.save(step, tree_of(content or step, 0, processes), parts=reports, **options)
    return store


def assert_same(found, expected):
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.contiguous().reshape(-1).view(torch.uint8).equal(expected.contiguous().reshape(-1).view(torch.uint8))


def assert_holds(loaded, step, content=None):
    content = content or step
    assert loaded.step == step
    assert list(loaded.tree) == ["model", "optimizer", "run"]
    assert list(loaded.tree["model"]) == list(whole(content))
    for name, tensor in whole(content).items():
        assert_same(loaded.tree["model"][name], tensor)
    assert loaded.tree["optimizer"]["n"] == content
    assert loaded.tree["run"] == Json({"step": content})


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def names(store):
    """Of all files, those of parts without their digests."""
    files = [path for path in store.directory.rglob("*") if not path.is_dir()]
    return {re.sub(r"-[0-9a-f]{16}\.h5$", ".h5", str(path.relative_to(store.directory))) for path in files}


def names_of(*steps, processes=2):
    parts = [f"part-{process:04d}-of-{processes:04d}.h5" for process in range(processes)]
    ends = [".h5", ".h5.sha256", *(f".parts/{part}" for part in parts)]
    return {f"step-{step:08d}{end}" for step in steps for end in ends}


def parts_of(store, step):
    return sorted(parts_directory(store.path(step)).iterdir())


# There and back


@st.composite
def cuts(draw, count, processes):
    """First rows and ends of the pieces of `processes` processes, in any order and some empty."""
    inner = sorted(draw(st.lists(st.integers(0, count), min_size=processes - 1, max_size=processes - 1)))
    edges = [0, *inner, count]
    return draw(st.permutations(list(pairwise(edges))))


@given(st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cut_comes_back_whole_and_by_rows(tmp_path, data):
    """Written by N processes, read by one, and by M of which each asks for its rows."""
    processes, readers = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    names = data.draw(st.lists(st.sampled_from([n for n in STORED_AS if n != "bool"]), min_size=1, max_size=3))
    tensors, pieces = {}, {}
    for number, name in enumerate(names):
        shape = data.draw(st.tuples(st.integers(1, 9), *[st.integers(1, 4)] * data.draw(st.integers(0, 2))))
        bits = torch.randint(0, 256, (int(np.prod(shape)) * getattr(torch, name).itemsize,), dtype=torch.uint8)
        tensor = tensors[f"{number}"] = bits.view(getattr(torch, name)).reshape(shape)
        pieces[f"{number}"] = [Piece(tensor[a:b], a, shape) for a, b in data.draw(cuts(shape[0], processes))]
    directory = tmp_path / f"{random.random()}"
    store = CheckpointStore(directory)
    trees = [{"g": {name: of[process] for name, of in pieces.items()}} for process in range(processes)]
    reports = [store.write_part(1, tree, process, processes) for process, tree in enumerate(trees)]
    path = store.save(1, trees[0], parts=reports)
    for name, tensor in tensors.items():
        assert_same(load_file(path).tree["g"][name], tensor)
        with store.open(1) as checkpoint:
            for start, stop in (rows_of(len(tensor), reader, readers) for reader in range(readers)):
                assert_same(checkpoint.read_rows(("g", name), start, stop - start), tensor[start:stop])
    shutil.rmtree(directory)


def test_every_type(store):
    tensors = {}
    for name in STORED_AS:
        bits = torch.arange(6 * getattr(torch, name).itemsize, dtype=torch.uint8)
        tensors[name] = (bits % 2 if name == "bool" else bits).view(getattr(torch, name)).reshape(3, 2)
    trees = [{name: Piece(t[a:b], a, (3, 2)) for name, t in tensors.items()} for a, b in ((0, 1), (1, 3))]
    reports = [store.write_part(1, tree, process, 2) for process, tree in enumerate(trees)]
    path = store.save(1, trees[0], parts=reports)
    loaded = load_file(path).tree
    with open_file(path) as checkpoint:
        for name, tensor in tensors.items():
            assert_same(loaded[name], tensor)
            assert_same(checkpoint.read_rows([name], 0, 2), tensor[:2])
    found = [(item.path, item.kind, item.dtype, item.shape, item.bytes) for item in examine(path).entries]
    assert found == [((name,), "tensor", name, (3, 2), 6 * tensor.itemsize) for name, tensor in tensors.items()]


def test_views_are_stored_by_value(store):
    tensor = torch.arange(12.0).reshape(3, 4)
    trees = [{"t": Piece(tensor.T[:3], 0, (4, 3))}, {"t": Piece(torch.nn.Parameter(tensor.T[3:]), 3, (4, 3))}]
    reports = [store.write_part(1, tree, process, 2) for process, tree in enumerate(trees)]
    assert_same(load_file(store.save(1, trees[0], parts=reports)).tree["t"], tensor.T)


@pytest.mark.parametrize("processes", [1, 3, 12])
def test_a_tree_with_much_else_in_it(store, processes):
    path = saved(store, 7, processes=processes, metric=0.5).path(7)
    assert_holds(store.load_newest(), 7)
    assert names(store) == names_of(7, processes=processes)
    assert read_attrs(path) == {"format": "hpclr-checkpoint", "version": 3, "step": 7, "metric": 0.5}
    assert load_file(path, "run").tree == {"run": Json({"step": 7})}
    assert_same(load_file(path, "model").tree["model"]["w"], whole(7)["w"])


def test_reports_travel_as_json(store):
    reports = save_parts(store, 1, 3)
    sent = json.dumps([msgspec.to_builtins(report) for report in reports])
    received = [msgspec.convert(value, PartReport) for value in json.loads(sent)]
    assert received == reports
    assert_holds(load_file(store.save(1, tree_of(1, 0, 3), parts=received)), 1)


def test_a_tree_without_pieces_is_a_file_as_ever(store, tmp_path):
    tree = {"w": torch.ones(3), "run": Json(1)}
    write_tree(tmp_path / "f.h5", tree, {"step": 1})
    assert store.save(1, tree).read_bytes() == (tmp_path / "f.h5").read_bytes()
    assert read_attrs(store.path(1))["version"] == 2
    assert names(store) == {"step-00000001.h5", "step-00000001.h5.sha256"}


def test_the_same_content_gives_the_same_files(store, tmp_path):
    other = CheckpointStore(tmp_path / "other")
    for place in (store, other):
        saved(place, 5)
    ours, theirs = ([path for path in sorted(s.directory.rglob("*")) if path.is_file()] for s in (store, other))
    assert [path.name for path in ours] == [path.name for path in theirs]
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]


# By rows


def test_rows_need_their_own_parts_only(store):
    path = saved(store, 1, processes=5).path(1)
    first, second, third, *_ = parts_of(store, 1)
    for part in (first, third):
        part.unlink()
    with open_file(path) as checkpoint:
        assert_same(checkpoint.read_rows(("model", "w"), 2, 2), whole(1)["w"][2:4])
        assert_same(checkpoint.read_rows(("model", "w"), 7, 3), whole(1)["w"][7:])
        assert_same(checkpoint.read_rows(("model", "w"), 4, 0), whole(1)["w"][:0])
        with pytest.raises(MissingPartError, match=f"{third}: expected a part.*rows of /model/w, found none"):
            checkpoint.read_rows(("model", "w"), 3, 2)
        second.write_bytes(b"")  # it is open already
        with pytest.raises(UsageError, match=f"{second}: the rows 2 to 4 of /model/w: expected data with the checksum"):
            checkpoint.read_rows(("model", "w"), 2, 1)


def test_what_an_open_checkpoint_tells(store):
    saved(store, 3)
    with store.open(3) as checkpoint:
        assert (checkpoint.step, checkpoint.attrs["version"]) == (3, 3)
        described = {"/".join(keys): (tensor.dtype, tensor.shape) for keys, tensor in checkpoint.tensors.items()}
        assert described == {
            "model/w": ("float32", (10, 7)),
            "model/b": ("bfloat16", (10,)),
            "model/few": ("int64", (2, 3)),
            "model/none": ("float32", (0, 4)),
            "optimizer/n": ("int64", ()),
        }
        assert checkpoint.read("run") == Json({"step": 3})
        assert_same(checkpoint.read("model", "b"), whole(3)["b"])
        assert_same(checkpoint.read("model")["few"], whole(3)["few"])
        assert list(checkpoint.read()) == ["model", "optimizer", "run"]
        assert_same(checkpoint.read_rows(("model", "none"), 0, 0), torch.empty(0, 4))
        with pytest.raises(KeyError, match="no /model/x"):
            checkpoint.read("model", "x")
        for keys, offset, length in [(("model", "w"), 8, 3), (("model", "w"), -1, 2), (("optimizer", "n"), 0, 1)]:
            with pytest.raises(ValueError, match="expected rows of a tensor of shape"):
                checkpoint.read_rows(keys, offset, length)


def test_a_checkpoint_of_one_process_is_read_by_rows_too(store):
    path = store.save(1, {"model": whole(1), "run": Json(1), "flags": torch.tensor([True, False, True])})
    with open_file(path) as checkpoint:
        assert_same(checkpoint.read_rows(("model", "w"), 3, 4), whole(1)["w"][3:7])
        assert_same(checkpoint.read_rows(("model", "none"), 0, 0), torch.empty(0, 4))
        assert_same(checkpoint.read_rows(["flags"], 1, 2), torch.tensor([False, True]))
        assert checkpoint.read("run") == Json(1)
        checkpoint.check_present()
        checkpoint.check_parts()


def test_version_1_is_read_whole_only():
    with pytest.raises(UsageError, match="version 2 or 3, of which rows can be read, found version 1"):
        open_file(VERSION_1)


def test_more_parts_than_are_held_open(store):
    count = MOST_OPEN + 9
    tensor = torch.arange(2.0 * count).reshape(count, 2)
    trees = [{"a": share(tensor, process, count), "b": share(-tensor, process, count)} for process in range(count)]
    reports = [store.write_part(1, tree, process, count) for process, tree in enumerate(trees)]
    store.save(1, trees[0], parts=reports)
    before = len(os.listdir("/proc/self/fd"))
    with store.open(1) as checkpoint:
        for name, expected in (("a", tensor), ("b", -tensor)):
            assert_same(checkpoint.read_rows([name], 0, count), expected)
        assert len(os.listdir("/proc/self/fd")) <= before + MOST_OPEN + 1
        checkpoint.check_parts(1, 3)
    assert len(os.listdir("/proc/self/fd")) == before
    assert_same(store.load_newest().tree["b"], -tensor)
    assert examine(store.path(1)).bytes == sum(p.stat().st_size for p in [store.path(1), *parts_of(store, 1)])


# What does not belong together


def with_piece(number, **changes):
    """Trees of three processes, of which one has another piece of w."""
    trees = [tree_of(1, process, 3) for process in range(3)]
    piece = trees[number]["model"]["w"]
    facts = {"tensor": piece.tensor, "offset": piece.offset, "shape": piece.shape} | changes
    trees[number]["model"]["w"] = Piece(**facts)
    return trees


@pytest.mark.parametrize(
    ("number", "changes", "reason"),
    [
        (1, {"offset": 3}, "/model/w: expected row 4 next, each once, found the rows 3 to 7 of process 1"),
        (1, {"offset": 5}, "/model/w: expected row 4 next, each once, found the rows 5 to 9 of process 1"),
        (2, {"tensor": torch.ones(1, 7)}, "/model/w: expected 10 rows from all processes together, found 9"),
        (1, {"tensor": torch.ones(0, 7)}, "/model/w: expected row 4 next, each once, found the rows 8 to 10 of pro"),
        (2, {"tensor": torch.ones(2, 7).half()}, r"/model/w \(float32, .* on process 0, /model/w \(float16.* on 2"),
        (2, {"shape": (11, 7)}, r"found /model/w \(float32, \(10, 7\)\) on process 0, /model/w .*\(11, 7\)\) on 2"),
    ],
)
def test_rows_that_do_not_make_up_the_tensor_are_refused(store, number, changes, reason):
    trees = with_piece(number, **changes)
    reports = [store.write_part(1, tree, process, 3) for process, tree in enumerate(trees)]
    with pytest.raises(ValueError, match=reason):
        store.save(1, trees[0], parts=reports)
    assert store.steps() == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"offset": -1}, "/model/w: expected rows among the 10 of the tensor, found -1 to 3"),
        ({"offset": 7}, "/model/w: expected rows among the 10 of the tensor, found 7 to 11"),
        ({"shape": (10, 8)}, "/model/w: expected rows of a tensor, which differ in the first axis"),
        ({"tensor": torch.tensor(1.0), "shape": ()}, "/model/w: expected rows of a tensor"),
    ],
)
def test_a_piece_that_does_not_fit_its_tensor_is_refused(store, changes, reason):
    with pytest.raises(ValueError, match=reason):
        store.write_part(1, with_piece(0, **changes)[0], 0, 3)
    assert not store.directory.exists()


def test_parts_that_do_not_belong_together_are_refused(store):
    one, two = save_parts(store, 1, 2)
    (other, _), (three, *_) = save_parts(store, 2, 2), save_parts(store, 1, 3)
    for reports in ([], [one], [two, one], [one, one], [other, two], [three, two]):
        with pytest.raises(ValueError, match="expected the parts of all processes at step 1, in their order, found"):
            store.save(1, tree_of(1, 0, 2), parts=reports)
    with pytest.raises(ValueError, match=r"found no more on process 0, /model/w .* on 0"):
        store.save(1, {"run": Json(1)}, parts=[one, two])
    with pytest.raises(TypeError, match=r"/model/w.*found Piece; save it with the reports of all parts"):
        write_tree(store.directory / "f.h5", tree_of(1, 0, 2), {"step": 1})
    with pytest.raises(TypeError, match="/t: expected a dense tensor"):
        store.write_part(1, {"t": Piece(torch.ones(2).to_sparse(), 0, (2,))}, 0, 1)


# Damage


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def damage(store, step, kind):
    """Spoils the second part of a step; returns the file and a pattern of what is said of it."""
    part = parts_of(store, step)[1]
    if kind == "missing":
        part.unlink()
        return part, "expected a part of the checkpoint .* found none there"
    if kind == "short":
        os.truncate(part, part.stat().st_size - 1)
        return part, r"expected a part of \d+ bytes, which holds rows of /model/w.*, found"
    if kind == "of another step":
        part.write_bytes(parts_of(store, 1)[1].read_bytes())
        return part, "the rows 5 to 10 of /model/w: expected data with the checksum"
    if kind == "link":
        part.rename(store.directory / "moved")
        part.symlink_to(store.directory / "moved")
        return part, "expected a regular file.*found a link or none"
    if kind == "directory":
        part.unlink()
        part.mkdir()
        return part, "expected a regular file.*found a link or none"
    flip(part, part.read_bytes().index(whole(step)["w"][5:].numpy().tobytes()) + 9 if kind == "data" else 500)
    said = {"data": "the rows 5 to 10 of /model/w: expected data with", "outside": "the content, .*has changed.*sha256"}
    return part, said[kind]


KINDS = ["missing", "short", "of another step", "link", "directory", "data", "outside"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_part_is_named_with_its_tensor_and_the_checkpoint_before_is_used(store, kind, caplog):
    saved(store, 1, 2)
    path, (part, reason) = store.path(2), damage(store, 2, kind)
    with pytest.raises(UsageError, match=f"{part}: {reason}"):
        load_file(path)
    assert re.search(f"{part}: {reason}", verify_file(path).faults[0])
    with open_file(path) as checkpoint:
        with pytest.raises(UsageError, match=str(part)):
            checkpoint.check_parts()
        checkpoint.check_parts(0, 2)  # another process, which has the others
    assert_holds(store.load_newest(), 1)
    assert "set aside as step-00000002.h5.bad" in caplog.text
    assert str(part) in (store.directory / "step-00000002.h5.bad.reason").read_text()
    assert (store.directory / "step-00000002.h5.bad.parts").is_dir()
    assert not parts_directory(path).exists()
    assert store.sweep() == []
    assert_holds(saved(store, 2).load_newest(), 2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_found_when_it_is_opened(store, kind):
    """The lengths of the parts are; their content is for those who read them, who then say so."""
    saved(store, 1, 2)
    _, reason = damage(store, 2, kind)
    if kind in ("data", "outside", "of another step"):
        with store.open_newest() as checkpoint:
            assert checkpoint.step == 2
            with pytest.raises(UsageError, match=r"holds rows of /model/w and 2 more, has changed") as error:
                checkpoint.check_parts(1, 2)
        store.set_aside(2, str(error.value))
    with store.open_newest() as checkpoint:
        assert checkpoint.step == 1
        assert_same(checkpoint.read("model", "w"), whole(1)["w"])
    assert re.search("sha256|" + reason, (store.directory / "step-00000002.h5.bad.reason").read_text())


@pytest.mark.parametrize("times", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_flipped_bit_of_a_part_is_silent(store, times):
    path = saved(store, 1).path(1)
    generator, part = random.Random(1), parts_of(store, 1)[0]
    good = part.read_bytes()
    for _ in range(times):
        content = bytearray(good)
        content[generator.randrange(len(good))] ^= 1 << generator.randrange(8)
        part.write_bytes(content)
        with pytest.raises(UsageError, match=f"{part}: .*expected"):
            load_file(path)
    part.write_bytes(good)
    assert_holds(load_file(path), 1)


def test_a_digest_of_another_part_is_refused(store):
    """Two parts that were exchanged with each other, names and all, have each other's rows."""
    path = saved(store, 1).path(1)
    one, two = parts_of(store, 1)
    content = one.read_bytes(), two.read_bytes()
    one.write_bytes(content[1])
    two.write_bytes(content[0])
    with pytest.raises(UsageError, match=r"expected data with the checksum|bytes, which holds"):
        load_file(path)


def test_a_part_is_no_checkpoint(store):
    saved(store, 1)
    part = parts_of(store, 1)[0]
    for read in (lambda: load_file(part, verify=False), lambda: examine(part, without_digest=True)):
        with pytest.raises(UsageError, match="found a part of one, with the rows that one process had"):
            read()


def test_an_index_that_was_moved_without_its_parts(store, tmp_path):
    path = saved(store, 1).path(1)
    copy = tmp_path / "copy.h5"
    shutil.copy(path, copy)
    write_sidecar(copy, sha256_of(copy))
    with pytest.raises(UsageError, match=r"Copy copy\.parts/ along with the checkpoint"):
        load_file(copy)
    assert load_file(copy, "run").tree == {"run": Json({"step": 1})}
    shutil.copytree(parts_directory(path), tmp_path / "copy.parts")
    assert_holds(load_file(copy), 1)
    assert examine(copy).step == 1


def test_what_is_not_finite_is_found_in_every_part(store):
    for process in range(2):
        tensor = torch.ones(4, 3)
        tensor[2 * process, 1] = float("nan")
        trees = [{"t": share(tensor, number, 2)} for number in range(2)]
        reports = [store.write_part(1, tree, number, 2) for number, tree in enumerate(trees)]
        assert [item.finite for item in examine(store.save(1, trees[0], parts=reports)).entries] == [False]


def test_a_bool_of_two_in_a_part(store):
    twos = torch.tensor([0, 2], dtype=torch.uint8).view(torch.bool)
    trees = [{"t": Piece(twos[:1], 0, (2,))}, {"t": Piece(twos[1:], 1, (2,))}]
    reports = [store.write_part(1, tree, number, 2) for number, tree in enumerate(trees)]
    path = store.save(1, trees[0], parts=reports)
    for read in (load_file, examine, lambda path: open_file(path).read_rows(["t"], 1, 1)):
        with pytest.raises(UsageError, match="/t: expected bool values 0 and 1, found 2"):
            read(path)


def test_a_part_that_this_host_sees_late(store):
    saved(store, 1)
    part = parts_of(store, 1)[1]
    hidden = store.directory.parent / "hidden"
    part.rename(hidden)
    threading.Timer(0.2, os.rename, (hidden, part)).start()
    assert_holds(store.load(1), 1)
    part.unlink()
    with pytest.raises(MissingPartError):
        store.load(1, patience=0.0)


# What is kept


def test_parts_go_with_their_index(store):
    for step in range(1, 6):
        saved(store, step, processes=1 + step % 3, best=step == 2)
    assert store.steps() == [2, 4, 5]
    assert names(store) == {"best.json"} | names_of(2, 5, processes=3) | names_of(4)
    saved(store, 6)
    store.save(7, {"w": torch.ones(2)})
    assert [path.name for path in sorted(store.directory.glob("*.parts"))] == [
        "step-00000002.parts",
        "step-00000006.parts",
    ]


@pytest.mark.parametrize(("processes", "content"), [(2, 2), (2, 9), (3, 9), (1, 9)])
def test_the_same_step_again_replaces_the_parts(store, processes, content):
    saved(store, 1, 2)
    saved(store, 2, processes=processes, content=content)
    assert names(store) == names_of(1) | names_of(2, processes=processes)
    assert_holds(store.load_newest(), 2, content)
    store.save(2, {"run": Json(1)})
    assert names(store) == names_of(1) | {"step-00000002.h5", "step-00000002.h5.sha256"}


def test_what_is_not_ours_stays(store):
    saved(store, 1, 2)
    before = names(store)
    mine = parts_directory(store.path(1)) / "notes.txt"
    mine.write_text("mine")
    for left in (".tmp-part-0000-1234", "part-0000-of-0002-0123456789abcdef.h5"):
        (parts_directory(store.path(2)) / left).touch()
    assert sorted(store.sweep()) == [".tmp-part-0000-1234", "part-0000-of-0002-0123456789abcdef.h5"]
    saved(store, 3)
    assert mine.read_text() == "mine"
    assert names(store) == before - names_of(1) | {"step-00000001.parts/notes.txt"} | names_of(3)


def test_parts_whose_index_is_damaged_or_has_vanished_are_not_swept(store):
    saved(store, 1, 2)
    content = store.path(2).read_bytes()
    (parts_directory(store.path(2)) / ".tmp-part").touch()
    digest = store.path(2).with_name("step-00000002.h5.sha256")
    digest.rename(store.directory / "hidden")  # as if it was never committed
    assert store.sweep() == []
    (store.directory / "hidden").rename(digest)
    flip(store.path(2), 300)
    assert store.sweep() == []
    store.path(2).unlink()
    assert store.sweep() == []
    store.path(2).write_bytes(content)
    assert store.sweep() == [".tmp-part"]
    assert_holds(store.load_newest(), 2)


def test_the_parts_of_a_save_that_failed_elsewhere_are_discarded(store):
    saved(store, 1, 2)
    before = names(store)
    store.write_part(3, tree_of(3, 0, 2), 0, 2)
    store.write_part(2, tree_of(9, 0, 2), 0, 2)
    assert [len(store.discard_parts(step)) for step in (1, 2, 3, 4)] == [0, 1, 1, 0]
    assert names(store) == before
    assert_holds(store.load_newest(), 2)


def test_one_who_is_no_longer_the_owner_touches_nothing(store):
    def guard():
        raise HpclrError("taken over")

    saved(store, 1)
    reports, before = save_parts(store, 2, 2), names(store)
    former = CheckpointStore(store.directory, guard=guard)
    for act in (
        lambda: former.write_part(2, tree_of(2, 0, 2), 0, 2),
        lambda: former.save(2, tree_of(2, 0, 2), parts=reports),
        lambda: former.discard_parts(2),
    ):
        with pytest.raises(HpclrError, match="taken over"):
            act()
        assert names(store) == before
    store.save(2, tree_of(2, 0, 2), parts=reports)
    assert_holds(store.load_newest(), 2)


# Killed processes, file systems that fail

PARTS = ["before_part", "in_data", "after_data", "after_part", "after_part_rename"]
INDEX = ["before_data", "in_data", "after_data", "after_digest"]
RENAMED = ["after_rename", "before_commit"]
DONE = ["after_commit", "in_retention", "before_parts_go"]
PLACES = [("part", place) for place in PARTS] + [("index", place) for place in [*INDEX, *RENAMED, *DONE]]


def save_under_failpoint(directory, where, place, step, processes):
    """Save a step, whose content is another one than that which it may replace."""
    store = CheckpointStore(directory, keep=2)
    reports = [store.write_part(step, tree_of(9, process, processes), process, processes) for process in (0,)]
    os.environ["HPCLR_FAILPOINT"] = place if where == "part" else ""
    reports += [store.write_part(step, tree_of(9, n, processes), n, processes) for n in range(1, processes)]
    os.environ["HPCLR_FAILPOINT"] = place
    store.save(step, tree_of(9, 0, processes), parts=reports)


def killed_under_failpoint(*arguments):
    child = FORK.Process(target=save_under_failpoint, args=arguments)
    child.start()
    child.join()
    return child.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(("where", "place"), PLACES)
def test_killed_while_a_new_step_is_saved(store, where, place):
    saved(store, 1, 2)
    assert killed_under_failpoint(store.directory, where, place, 3, 3)
    store.sweep()
    is_saved = place in DONE
    assert_holds(store.load_newest(), *([3, 9] if is_saved else [2]))
    expected = names_of(2) | (names_of(3, processes=3) if is_saved else names_of(1))
    aside = names(store) - expected - (names_of(1) if place == "after_commit" else set())
    assert {re.sub(r"\.parts/.*", ".parts", name) for name in aside} == (
        {f"step-00000003.h5.bad{end}" for end in ("", ".reason", ".parts")} if place in RENAMED else set()
    )
    assert_holds(saved(store, 4).load_newest(), 4)
    assert names(store) - aside == names_of(4) | (names_of(3, processes=3) if is_saved else names_of(2))


@pytest.mark.parametrize("processes", [3, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("where", "place"), [*PLACES[:-2], ("index", "after_announcement")])
def test_killed_while_a_step_is_replaced(store, where, place, processes):
    saved(store, 1, 2)
    assert killed_under_failpoint(store.directory, where, place, 2, processes)
    store.sweep()
    is_new = place in [*RENAMED, *DONE]  # its sidecar was there already, and names both
    assert_holds(store.load_newest(), 2, 9 if is_new else 2)
    assert names(store) == names_of(1) | names_of(2, processes=processes if is_new else 2)
    assert_holds(saved(store, 2).load_newest(), 2)
    assert names(store) == names_of(1, 2)


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize(("where", "place"), [place for place in PLACES if place[1] not in DONE])
def test_a_full_disk_at_any_place(store, monkeypatch, where, place, step):
    saved(store, 1, 2)
    monkeypatch.setenv("HPCLR_FAILPOINT", "")
    with pytest.raises(RetryableError, match=f"step {step} could not be saved: No space left on device; it needs"):
        save_under_failpoint(store.directory, where, f"{place}:ENOSPC", step, 3)
    monkeypatch.setenv("HPCLR_FAILPOINT", "")
    if where == "part":
        store.discard_parts(step)
    is_new = step == 2 and place in RENAMED  # as above
    assert_holds(store.load_newest(), 2, 9 if is_new else 2)
    assert names(store) == names_of(1) | names_of(2, processes=3 if is_new else 2)
    assert_holds(saved(store, 3).load_newest(), 3)


def test_a_fault_when_old_parts_go_is_a_warning(store, monkeypatch, caplog):
    saved(store, 1, 2)
    monkeypatch.setenv("HPCLR_FAILPOINT", "before_parts_go:EIO")
    assert_holds(saved(store, 3).load_newest(), 3)
    assert "could not be deleted: [Errno 5]" in caplog.text
    assert len(store.sweep()) == 2
    assert names(store) == names_of(2, 3)


def write_one_part(directory, process, report):
    part = CheckpointStore(directory).write_part(1, tree_of(1, process, 4), process, 4)
    report.put(json.dumps(msgspec.to_builtins(part)))


def test_processes_write_their_parts_at_the_same_time(store):
    queue = FORK.Queue()
    children = [FORK.Process(target=write_one_part, args=(store.directory, process, queue)) for process in range(4)]
    for child in children:
        child.start()
    reports = [msgspec.json.decode(queue.get(timeout=60), type=PartReport) for _ in children]
    for child in children:
        child.join()
    store.save(1, tree_of(1, 0, 4), parts=sorted(reports, key=lambda report: report.process))
    assert_holds(store.load_newest(), 1)
    assert names(store) == names_of(1, processes=4)


def save_for_ever(directory, acknowledge):
    """Steps by two and three processes in turn; every fourth replaces the one before."""
    store = CheckpointStore(directory, keep=2)
    store.sweep()
    newest = store.load_newest()
    step = newest.step if newest else 0
    while True:
        step += 1
        saved(store, step, processes=2 + step % 2)
        if step % 4 == 0:
            saved(store, step, processes=3)
        os.write(acknowledge, struct.pack("q", step))


@pytest.mark.parametrize("times", [6, pytest.param(150, marks=pytest.mark.slow)])
def test_killed_at_random_instants(store, times):
    generator = random.Random(times)
    acknowledged = 0
    for _ in range(times):
        read, write = os.pipe()
        child = FORK.Process(target=save_for_ever, args=(store.directory, write))
        child.start()
        os.close(write)
        first = os.read(read, 8)
        time.sleep(generator.uniform(0, 0.08))
        child.kill()
        child.join()
        told = first + b"".join(iter(lambda read=read: os.read(read, 1 << 16), b""))
        os.close(read)
        acknowledged = max(acknowledged, *struct.unpack(f"{len(told) // 8}q", told))
        store.sweep()
        newest = store.load_newest()
        assert newest.step >= acknowledged
        assert_holds(newest, newest.step)
        assert len(store.steps()) >= 1 + (newest.step > 1)
    assert not list(store.directory.glob("*.bad*.sha256")), "a committed checkpoint was found damaged"


# In the background


def test_a_copy_of_pieces_keeps_its_memory(store):
    host = HostCopy()
    first = host.take(tree_of(1, 0, 2))
    place = first["model"]["w"].tensor.data_ptr()
    second = host.take(tree_of(2, 0, 2))
    assert second["model"]["w"].tensor.data_ptr() == place
    assert (second["model"]["w"].offset, second["model"]["w"].shape) == (0, (10, 7))
    assert_same(second["model"]["w"].tensor, whole(2)["w"][:5])


def test_parts_and_index_in_the_background(store):
    trees, checked = [tree_of(1, process, 2) for process in range(2)], []
    savers = [BackgroundSaver(store, check=checked.append) for _ in range(2)]
    for process, saver in enumerate(savers):
        saver.write_part(1, trees[process], process, 2)
        trees[process]["model"]["w"].tensor.fill_(9)  # training goes on
    reports = []
    for saver in savers:
        saver.wait()
        reports.append(saver.finished())
    assert store.steps() == []
    assert all(report.bytes == report.part.part.bytes and report.error is None for report in reports)
    savers[0].write_index(1, [report.part for report in reports], metric=0.5, best=True)
    savers[0].wait()
    report = savers[0].finished()
    assert (report.step, report.part, report.error) == (1, None, None)
    assert report.bytes == sum(path.stat().st_size for path in [store.path(1), *parts_of(store, 1)])
    assert store.best() == store.path(1)
    assert len(checked) == 2
    loaded = store.load_newest()
    assert_same(loaded.tree["model"]["b"], whole(1)["b"])


def test_a_part_that_fails_in_the_background_is_reported(store, monkeypatch):
    monkeypatch.setenv("HPCLR_FAILPOINT", "after_data:EDQUOT")
    with BackgroundSaver(store) as saver:
        with pytest.raises(ValueError, match="/model/w"):
            saver.write_part(1, with_piece(0, offset=7)[0], 0, 3)
        saver.write_part(1, tree_of(1, 0, 2), 0, 2)
    report = saver.finished()
    assert (report.part, report.bytes) == (None, 0)
    assert isinstance(report.error, RetryableError)


# For others


def test_a_part_is_a_file_of_its_own(store):
    saved(store, 1)
    with h5py.File(parts_of(store, 1)[1]) as file:
        facts = {name: file.attrs[name] for name in ("format", "version", "step", "process", "processes")}
        assert facts == {"format": b"hpclr-checkpoint-part", "version": 3, "step": 1, "process": 1, "processes": 2}
        assert np.array_equal(file["model/w"][...], whole(1)["w"][5:].numpy())
        assert file["model/b"].attrs["dtype"] == b"bfloat16"
        assert list(file) == ["model"]


@pytest.mark.parametrize("processes", [1, 3])
def test_the_code_in_the_document_reads_sharded_tensors(store, processes):
    path = saved(store, 1, processes=processes).path(1)
    names: dict = {"path": path}
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    exec(blocks[0], names)
    model = names["checkpoint"]["model"]
    for name, tensor in whole(1).items():
        assert np.array_equal(model[name], tensor.float().numpy())
