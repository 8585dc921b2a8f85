"""Event files as TensorBoard reads them: every step once, also after a requeue; pictures; faults."""

import contextlib
import io
import json
import resource
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from track_helpers import check, train
from training_helpers import OIALR, as_killed_after, hpclr, records

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpclr.track.heatmap import HeatMap
from hpclr.track.tensorboard import TensorBoard

IMAGE = pytest.importorskip("PIL.Image")
ALL = {"scalars": 0, "images": 0, "tensors": 0}


def read(directory) -> EventAccumulator:
    found = EventAccumulator(str(directory), size_guidance=ALL)
    found.Reload()
    return found


def steps(found: EventAccumulator, tag: str = "train/loss") -> list[int]:
    return [event.step for event in found.Scalars(tag)]


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(IMAGE.open(io.BytesIO(content)).convert("RGB"))


def test_a_run_has_all_its_records_there(bench):
    run = bench.train(method=OIALR, track={"tensorboard": True})
    found = read(run / "tensorboard")
    for tag, kind, key in (("train/loss", "train", "loss"), ("valid/accuracy", "valid", "accuracy")):
        expected = [(r["step"], r["time"], np.float32(r[key])) for r in records(run, kind)]
        assert [(e.step, e.wall_time, np.float32(e.value)) for e in found.Scalars(tag)] == expected
    scalars = set(found.Tags()["scalars"])
    assert {"train/learning_rate", "parameters/trained", "parameters/stored", "test/loss", "memory/bytes"} <= scalars
    assert {"communication/gradient_bytes", "pace/steps_per_second", "pace/check"} <= scalars
    assert set(found.Tags()["images"]) == {"layers/rank", "layers/stability", "layers/outside"}
    layers = records(run, "check")[0]["ranks"]
    text = found.Tensors("layers/rows")[-1].tensor_proto.string_val[0].decode()
    assert [f"`{name}`" in text for name in layers] == [True] * len(layers)


def test_after_a_requeue_every_step_is_there_once(bench):
    run = bench.train(track={"tensorboard": True}, checkpoint={"every": 1, "keep": 20})
    whole = read(run / "tensorboard").Scalars("train/loss")
    killed = as_killed_after(run, 7, bench.path / "killed")
    run.rename(bench.path / "uninterrupted")
    killed.rename(run)
    watching = read(run / "tensorboard")  # a TensorBoard that runs meanwhile
    assert steps(watching) == list(range(1, 14))
    done = hpclr("train", bench.write(track={"tensorboard": True}, checkpoint={"every": 1, "keep": 20}))
    assert done.code == 0, done.err
    fresh = read(run / "tensorboard")
    assert [(e.step, e.value) for e in fresh.Scalars("train/loss")] == [(e.step, e.value) for e in whole]
    watching.Reload()
    for tag in fresh.Tags()["scalars"]:
        assert steps(watching, tag) == steps(fresh, tag) == sorted(set(steps(fresh, tag))), tag
    assert [r["attempt"] for r in records(run, "attempt")] == [1, 2]
    assert len(list((run / "tensorboard").iterdir())) == 1


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"")
    (tmp_path / "events.out.tfevents.x.hpclr").write_bytes(b"")
    for _ in range(2):
        TensorBoard(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "events.out.tfevents.0000000002.hpclr",
        "events.out.tfevents.1.host",
    ]


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """Nothing more can be written to any file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_goes_only_when_there_is_one_in_its_place(tmp_path):
    board = TensorBoard(tmp_path)
    board.write([train(1), train(2)])
    board.close()
    with no_room(), pytest.raises(OSError, match="File too large"):
        TensorBoard(tmp_path)
    assert steps(read(tmp_path)) == [1, 2]
    again = TensorBoard(tmp_path)  # what is there now can be read whatever becomes of this process
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size > 0
    again.close()


def test_a_directory_that_cannot_be_written_harms_no_training(bench):
    bench.train(train={"steps": 3})
    (bench.run / "tensorboard").symlink_to("/proc/self")
    done = hpclr("train", bench.write(track={"tensorboard": True}, train={"steps": 5}))
    assert done.code == 0, done.err
    assert done.err.count("warning: TensorBoard") == 1
    assert records(bench.run, "train")[-1]["step"] == 5


def test_a_full_disk_harms_no_training(bench, monkeypatch):
    run = bench.train(track={"tensorboard": True}, train={"steps": 5})
    (run / "tensorboard" / "events.out.tfevents.0000000002.hpclr").symlink_to("/dev/full")
    done = hpclr("train", bench.write(track={"tensorboard": True}, train={"steps": 8}))
    assert done.code == 0
    assert steps(read(run / "tensorboard"))[-1] == 8
    (run / "tensorboard").rename(run / "other")
    (run / "tensorboard").write_text("in the way")
    done = hpclr("train", bench.write(track={"tensorboard": True}, train={"steps": 9}))
    assert done.code == 0
    assert done.err.count("warning: TensorBoard: FileExistsError") == 1
    assert records(run, "train")[-1]["step"] == 9


@pytest.mark.parametrize(("settings", "extra"), [({"tensorboard": True}, "track"), ({"mlflow": {}}, "mlflow")])
def test_what_to_install(bench, monkeypatch, settings, extra):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tensorboard", "mlflow")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path_importer_cache", {})
    done = hpclr("train", bench.write(track=settings))
    assert done.code == 2
    assert f"pip install 'hpclr[{extra}]'" in done.err
    assert not bench.run.exists()


def test_a_run_goes_on_with_other_tracking(bench):
    bench.train(train={"steps": 5})
    run = bench.train(train={"steps": 8}, track={"tensorboard": True})
    assert steps(read(run / "tensorboard")) == list(range(1, 9))
    assert not json.loads((run / "summary.json").read_text()).get("track")


def test_colours_of_a_heat_map():
    heat_map = HeatMap()
    heat_map.add({"a": 0.0, "b": None})
    heat_map.add({"a": 5.0, "b": 10.0})
    content, width, height = heat_map.png()
    seen = pixels(content)
    assert seen.shape == (height, width, 3)
    corners = seen[:: height - 1, :: width - 1].reshape(4, 3).tolist()
    assert corners == [[68, 1, 84], [33, 144, 141], [128, 128, 128], [253, 231, 37]]


def test_a_heat_map_of_a_long_run_stays_small():
    heat_map = HeatMap()
    for check_number in range(3000):
        heat_map.add({f"layer {n}": check_number for n in range(30)})
    content, width, height = heat_map.png()
    assert max(width, height) <= 1024
    assert len(content) < 200_000
    seen = pixels(content)[0].astype(int)
    assert (np.diff(seen[:, 1]) >= 0).all()  # from dark to bright: the columns are in order


@pytest.mark.parametrize("ranks", [{}, {"a": None}, {"a": "x", "b": float("nan")}, {"a": 3}])
def test_checks_of_which_little_is_known(tmp_path, ranks):
    board = TensorBoard(tmp_path)
    board.write([train(1), check(1, **ranks), {"kind": "check", "step": 2, "ranks": 3}])
    board.close()
    assert steps(read(tmp_path)) == [1]
