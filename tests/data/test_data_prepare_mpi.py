import json
import struct
import time

import numpy as np
import pytest
from mpi_runs import hpclr, messages, needs_mpi, python

from hpclr.data import prepare

pytestmark = needs_mpi


@pytest.fixture
def tree(tmp_path):
    """Pictures of which five fill a block; 10 blocks in train, 3 in test."""
    image = pytest.importorskip("PIL.Image")
    for number in range(61):
        folder = tmp_path / "tree" / ("test" if number >= 50 else "train") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (512, 512), (number, number * 4, 255 - number)).save(folder / f"{number:02}.png")
    (tmp_path / "tree" / "train" / "a" / "notes.txt").write_text("no picture")
    return tmp_path / "tree"


def test_the_file_is_the_one_of_a_single_process(tree, tmp_path):
    with pytest.warns(UserWarning, match=r"notes\.txt"):
        prepare("imagefolder", tree, tmp_path / "one.h5", seed=3)
    done = hpclr(4, "prepare", "imagefolder", tree, tmp_path / "many.h5", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'many.h5'}: train 45, valid 5, test 11\n"
    assert len(messages(done)) == 1  # the warning
    assert (tmp_path / "many.h5").read_bytes() == (tmp_path / "one.h5").read_bytes()


SHARED = """
import json
import os
import sys
from pathlib import Path
from hpclr.data import prepare
from hpclr.data.teamwork import read_share
from hpclr.parallel.team import gather_team
team = gather_team("this test", os.environ)
for reader, source, out in json.loads(sys.argv[1]):
    try:
        if team.rank:
            team.follow(lambda: read_share(reader, Path(source), None, team))
        with team.leading():
            prepare(reader, Path(source), Path(out), team=team)
    except SystemExit as end:
        assert end.code == 0
"""


def test_every_other_reader(tmp_path):
    rng = np.random.default_rng(0)
    write_idx(tmp_path / "idx", rng)
    write_cifar(tmp_path / "cifar", rng)
    x = rng.normal(size=(600, 3000)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.arange(600) % 3, x_test=x[:5], y_test=np.zeros(5, int))
    np.savetxt(tmp_path / "a.csv", rng.normal(size=(50, 3)), delimiter=",")
    sources = [("idx", "idx"), ("cifar10", "cifar"), ("npz", "a.npz"), ("csv", "a.csv")]
    for reader, name in sources:
        prepare(reader, tmp_path / name, tmp_path / f"one-{reader}.h5")
    work = [(reader, str(tmp_path / name), str(tmp_path / f"many-{reader}.h5")) for reader, name in sources]
    done = python(2, "-c", SHARED, json.dumps(work))
    assert done.returncode == 0, done.stderr
    for reader, _ in sources:
        assert (tmp_path / f"many-{reader}.h5").read_bytes() == (tmp_path / f"one-{reader}.h5").read_bytes()


def write_idx(folder, rng):
    folder.mkdir()
    for prefix, count in (("train", 12_000), ("t10k", 10)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, *pixels.shape) + bytes(pixels))
        labels = bytes(number % 7 for number in range(count))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + labels)


def write_cifar(folder, rng):
    folder.mkdir()
    for name, count in [*((f"data_batch_{number}", 400 * number) for number in range(1, 6)), ("test_batch", 9)]:
        records = rng.integers(0, 10, (count, 3073), dtype=np.uint8)
        (folder / f"{name}.bin").write_bytes(bytes(records))


def left(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def test_an_error_of_one_process_ends_all_with_one_message(tree, tmp_path):
    bad = tree / "train" / "a" / "12.png"  # in the second block, which the second process reads
    bad.write_bytes(bad.read_bytes()[:200])
    done = hpclr(2, "prepare", "imagefolder", tree, tmp_path / "many.h5", "--image-size", "512")
    assert done.returncode == 2
    assert [line.startswith(f"hpclr: {bad}: ") for line in messages(done)[1:]] == [True]  # the first is the warning
    assert left(tmp_path) == ["tree"]


def test_an_output_that_is_there_ends_all_with_one_message(tree, tmp_path):
    (tmp_path / "many.h5").write_text("precious")
    done = hpclr(4, "prepare", "imagefolder", tree, tmp_path / "many.h5")
    assert done.returncode == 2
    assert len(messages(done)) == 1
    assert "exists already" in messages(done)[0]
    assert (tmp_path / "many.h5").read_text() == "precious"


def test_a_killed_process_ends_the_others(tree, tmp_path):
    program = """
import os, signal, sys
from hpclr.cli import main
import hpclr.data.teamwork
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    hpclr.data.teamwork.open_source = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""
    start = time.monotonic()
    done = python(2, "-c", program, "data", "prepare", "imagefolder", tree, tmp_path / "many.h5")
    assert done.returncode != 0
    assert not (tmp_path / "many.h5").exists()
    assert time.monotonic() - start < 20


def test_without_mpirun_there_is_no_mpi(tmp_path):
    program = (
        "import sys\nfrom hpclr.cli.data import data\n"
        f"data(['prepare', 'digits', {str(tmp_path / 'd.h5')!r}], standalone_mode=False)\n"
        "print({'mpi4py', 'torch'} & set(sys.modules))"
    )
    assert python(0, "-c", program).stdout.endswith("set()\n")
