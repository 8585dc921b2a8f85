"""Files made to harm their reader are refused for what they are: in this process, and without meeting them."""

import json
import os
import random
import re
import subprocess
import sys

import h5py
import numpy as np
import pytest
from hostile_files import HOSTILE, end_of_header, new_file, rechecked, tensor
from hostile_files import json as json_entry

from hpclr.checkpoint import NewerVersionError, read_attrs, read_tree, scan
from hpclr.checkpoint.sandbox import examine
from hpclr.errors import UsageError

LOOK = """
import json, resource, sys, time
from pathlib import Path
from hpclr.checkpoint.sandbox import examine
from hpclr.errors import UsageError

found = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    start = time.monotonic()
    try:
        reason = repr(examine(path, without_digest=True))
    except UsageError as error:
        reason = str(error)
    found[path.stem] = [reason, time.monotonic() - start]
assert "torch" not in sys.modules
print(json.dumps([found, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


@pytest.mark.parametrize("name", HOSTILE)
def test_each_is_refused_for_what_it_is(tmp_path, name):
    write, reason = HOSTILE[name]
    path = tmp_path / "f.h5"
    write(path)
    with pytest.raises(UsageError, match=f"(?s)f.h5.*({reason})"):
        read_tree(path)
    assert not open_files(tmp_path)


def open_files(directory):
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [link for link in links if os.path.islink(link) and str(directory) in os.readlink(link)]


@pytest.mark.parametrize("share", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_each_is_refused_by_a_small_quick_child(tmp_path, share):
    """The parent imports no torch here, as a child's peak of memory counts what it was forked from."""
    names = list(HOSTILE)[::share]
    for name in names:
        HOSTILE[name][0](tmp_path / f"{name}.h5")
    done = subprocess.run([sys.executable, "-c", LOOK, tmp_path], capture_output=True, text=True, timeout=200)
    found, peak = json.loads(done.stdout)
    assert found.keys() == set(names)
    for name, (reason, seconds) in found.items():
        assert re.search(f"(?s){HOSTILE[name][1]}", reason), (name, reason)
        assert seconds < 5, name
    assert peak < 200_000  # KB


def test_files_of_the_same_make_that_are_in_order_are_read(tmp_path):
    """What makes the hostile files makes good ones too, so that it is the harm that is refused."""
    path = tmp_path / "f.h5"
    with new_file(path) as file:
        tensor(file, "w", np.arange(5.0))
        json_entry(file.create_group("g", track_order=True), "j", b'[1,{"$float":"inf"}]')
    tree = read_tree(path)
    assert tree["w"].tolist() == [0, 1, 2, 3, 4]
    assert tree["g"]["j"].value == [1, float("inf")]
    assert [item.path for item in examine(path, without_digest=True).entries] == [("w",), ("g",), ("g", "j")]


def test_too_many_objects_are_refused_before_they_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "MAX_OBJECTS", 50)
    path = tmp_path / "f.h5"
    with new_file(path) as file:
        group = file.create_group("g", track_order=True)
        for number in range(49):
            tensor(group, f"n{number}")
    assert len(read_tree(path)["g"]) == 49
    with h5py.File(path, "r+") as file:
        file["g/one_more"] = h5py.SoftLink("/nowhere")
    with pytest.raises(UsageError, match="at most 50 objects in a file, found more"):
        read_tree(path)


def test_a_newer_version_is_told_apart(tmp_path):
    HOSTILE["newer_version"][0](tmp_path / "f.h5")
    with pytest.raises(NewerVersionError):
        read_attrs(tmp_path / "f.h5")


def forged(content, generator):
    """Bytes of an object's description changed, and its checksum made right: HDF5 believes them."""
    content, starts, start = bytearray(content), [], -1
    while (start := content.find(b"OHDR", start + 1)) >= 0:
        starts.append(start)
    start = generator.choice(starts)
    stop = end_of_header(content, start)
    for _ in range(generator.choice([1, 1, 2, 4])):
        content[generator.randrange(start + 4, stop)] = generator.choice([0, 1, 255, generator.randrange(256)])
    stop = end_of_header(content, start)
    return rechecked(content, start, stop) if stop < len(content) else content


@pytest.mark.parametrize("times", [8, pytest.param(500, marks=pytest.mark.slow)])
def test_forged_descriptions_do_no_harm(tmp_path, times):
    path = tmp_path / "f.h5"
    with new_file(path) as file:
        group = file.create_group("g", track_order=True)
        for number in range(12):
            tensor(file, f"w{number}")
            json_entry(group, f"j{number}", b"[1]")
    good, refused = path.read_bytes(), 0
    for seed in range(times):
        path.write_bytes(forged(good, random.Random(seed)))
        reason = reason_against(path)
        # that would be a fault which nobody foresaw, of the child rather than of the file
        assert "the process that looks at it" not in reason, seed
        refused += bool(reason)
    assert refused > times / 3


def reason_against(path):
    try:
        examine(path, without_digest=True)
    except UsageError as error:
        return str(error)
    return ""
