"""Whatever is wrong is said in one paragraph, with exit code 2, before anything is written."""

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from training_helpers import OIALR, Done, hpclr, last_tree, records, steps_kept

from hpclr.checkpoint import load_file
from hpclr.training.run_directory import _unusable


def check_refused(done: Done, *texts: str) -> None:
    assert done.code == 2, done.err
    assert done.err.startswith("hpclr: ")
    assert "Traceback" not in done.err
    assert done.err.count("\n") == 1, "one paragraph"
    for text in texts:
        assert text in done.err


def refused(bench, *arguments: object, texts: tuple[str, ...], **sections: object) -> None:
    """Refused with these texts, and nothing has come into being or changed."""
    file = bench.write(**sections)
    before = bench.listing()
    check_refused(hpclr("train", file, *arguments), *texts)
    assert bench.listing() == before


NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        (["optimiser.lr=1"], ("optimiser", "did you mean optimizer?")),
        (["train.epoch=1"], ("train.epoch", "did you mean epochs?")),
        (["model.hiden=[3]"], ("model.hiden", "did you mean hidden?")),
        (["optimizer.lr=quick"], ("optimizer.lr", "quick", "number")),
        (["train.steps=1.5"], ("train.steps", "1.5", "whole number")),
        (["train.threads=1025"], ("train.threads", "found 1025", "from 1 to 1024")),
        (["train.precision=fp8"], ("train.precision", "fp8", "bf16")),
        (["method.cutoff=1.5"], ("method.cutoff", "1.5", "0", "1")),
        (["method.cutoff=0"], ("method.cutoff", "found 0")),
        (["data.path=nowhere.h5"], ("nowhere.h5", "No such file", "hpclr data prepare")),
        (["data.path=run.yaml"], ("run.yaml", "expected an HDF5 file")),
        (["data.batch_size=271"], ("batch_size is 271", "train split has 270 samples", "from 1 to 270")),
        (["method.delay=13"], ("method:", "delay is 13", "13 steps", "less than 13")),
        (["method.include=['nothing.*']"], ("method:", "nothing.*")),
        (["method.exclude=['layers.*']"], ("method:", "no layer that OIALR can convert", "exclude")),
        (["model.hidden=[]"], ("method:", "no layer that OIALR can convert")),
        (["model.name=vit", "model.patch=3"], ("model:", "patch 3", "8x8")),
        (["optimizer.name=lbfgs"], ("optimizer.name", "LBFGS", "adamw")),
        (["optimizer.name=SparseAdam"], ("optimizer.name", "SparseAdam", "sparse gradients", "adamw")),
        (["optimizer.name=lbfgs", "method.name=dense"], ("optimizer.name", "LBFGS")),
        (["optimizer.name=adamm"], ("optimizer.name", "'adamm'", "did you mean adam?")),
        (["optimizer.momentum=0.9"], ("optimizer.momentum", "AdamW has no such option", "betas")),
        (["optimizer.args={wd: 1}"], ("optimizer.wd", "AdamW has no such option", "weight_decay")),
        (["optimizer.name=muon"], ("optimizer:", "Muon", "2D")),
        (["optimizer.args={fused: true, foreach: true}"], ("optimizer:", "AdamW", "fused")),
        (["train.micro_batch=65"], ("train.micro_batch (65)", "data.batch_size (64)")),
        pytest.param(["train.device=cuda"], ("train: device is cuda", "use train.device=cpu"), marks=NO_CUDA),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_fault_in_the_run_file(overrides, texts, bench):
    refused(bench, *overrides, texts=texts)


def test_several_faults_are_told_at_once(bench):
    done = hpclr("train", bench.write(), "train.epoch=1", "data.batchsize=3")
    assert done.code == 2
    assert "2 faults" in done.err
    assert "batch_size" in done.err
    assert not (bench.path / "runs").exists()


def test_there_is_no_run_file(bench):
    check_refused(hpclr("train", "nowhere.yaml"), "cannot read the run file nowhere.yaml", "No such file")
    assert not list(bench.path.iterdir())


def test_1e_3_is_a_number(bench):
    text = bench.write(train={"steps": 2}).read_text().replace('"lr": 0.003', '"lr": 1e-3')
    (bench.path / "run.yaml").write_text(text)
    assert hpclr("train", "run.yaml").code == 0
    assert records(bench.run, "train")[0]["lr"] == 0.001


def write_data(path: Path, **changes: object) -> Path:
    """A small data set by hand, as docs/data.md describes it and unchecked; None leaves a part out."""
    rng = np.random.default_rng(0)
    parts: dict[str, object] = {"mean": np.zeros(6), "std": np.ones(6)}
    parts["classes"] = np.frombuffer(b'["a", "b"]', dtype=np.uint8)
    for split, size in (("train", 20), ("valid", 8), ("test", 8)):
        parts[f"{split}/x"] = rng.standard_normal((size, 6)).astype(np.float32)
        parts[f"{split}/y"] = rng.integers(0, 2, size)
    with h5py.File(path, "w") as file:
        file.attrs.update({"format": "hpclr-data", "version": 1, "task": "classification"})
        for name, value in (parts | changes).items():
            if value is not None:
                file[name] = value
    return path


def spoilt(shape: tuple[int, ...], where: int, value: float) -> np.ndarray:
    x = np.zeros(shape, dtype=np.float32)
    x[where] = value
    return x


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"train/y": None}, ("/train/y is missing", "Expected:")),
        ({"test/x": None, "test/y": None}, ("/test is missing",)),
        ({"classes": None}, ("/classes is missing",)),
        ({"train/y": np.array([0] * 13 + [2] + [1] * 6)}, ("train split, sample 13", "2")),
        ({"valid/y": np.array([0, -1] * 4)}, ("valid split, sample 1", "-1")),
        ({"train/x": spoilt((20, 6), 7, np.nan)}, ("train split, sample 7", "NaN or infinite")),
        ({"test/x": spoilt((8, 6), 3, np.inf)}, ("test split, sample 3", "NaN or infinite")),
        ({"std": np.zeros(6)}, ("/std must hold finite numbers",)),
        ({"train/x": np.zeros((19, 6), np.float32)}, ("/train/x has 19 samples but /train/y 20",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_fault_in_the_data(changes, texts, bench):
    data = write_data(bench.path / "bad.h5", **changes)
    refused(bench, texts=("bad.h5", *texts), data={"path": str(data), "batch_size": 10})


def test_data_made_by_hand_is_good_data(bench):
    """So that the refusals above are of what was changed."""
    data = write_data(bench.path / "good.h5")
    bench.train(data={"path": str(data), "batch_size": 10}, train={"steps": 8})


def test_patience_needs_a_validation_split(bench):
    data = write_data(bench.path / "two.h5", **{"valid/x": None, "valid/y": None})
    sections = {"data": {"path": str(data), "batch_size": 10}, "validation": {"patience": 2}}
    refused(bench, texts=("validation.patience", "two.h5 has no validation split", "--valid-fraction"), **sections)
    bench.train("validation.patience=null", **sections, train={"steps": 8})
    assert not records(bench.run, "valid")


def test_pictures_are_flipped_vectors_are_not(bench):
    data = write_data(bench.path / "vectors.h5")
    sections = {"data": {"path": str(data), "batch_size": 10, "flip": True}}
    refused(bench, texts=("vectors.h5", "flip and crop are for pictures"), **sections)


@pytest.mark.parametrize("arguments", [[], ["--fresh"]])
@pytest.mark.parametrize("kind", ["directory", "file"])
def test_the_place_of_the_run_is_taken_by_something_else(kind, arguments, bench):
    bench.run.parent.mkdir()
    if kind == "file":
        bench.run.write_text("thesis")
    else:
        bench.run.mkdir()
        (bench.run / "thesis.tex").write_text("thesis")
    refused(bench, *arguments, texts=("runs/run exists but holds no run", "run.yaml", "name="))


def test_runs_directory_that_is_a_file(bench):
    (bench.path / "runs").write_text("")
    refused(bench, texts=("runs/run cannot be used: Not a directory", "--runs-dir"))


@pytest.fixture
def nobody():
    """A user to whom permissions apply, also where root runs the tests."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    yield
    os.seteuid(was)


@pytest.fixture
def public(digits):
    """A directory that anybody may enter, with the data."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    shutil.copy(digits, path / "digits.h5")
    yield path
    for directory in (path, *path.rglob("*")):
        if directory.is_dir():
            directory.chmod(0o755)
    shutil.rmtree(path)


@pytest.mark.parametrize("there", [False, True])
def test_a_runs_directory_that_cannot_be_written(there, public, bench, request):
    file = bench.write(data={"path": str(public / "digits.h5")}, train={"steps": 2})
    target = shutil.copy(file, public / "run.yaml")
    os.chmod(target, 0o644)
    if there:
        assert hpclr("train", target, "--runs-dir", public / "runs").code == 0
    (public / "runs").mkdir(exist_ok=True)
    for directory in (public / "runs", public / "runs" / "run"):
        if directory.exists():
            directory.chmod(0o555)
    os.chdir(public)
    request.getfixturevalue("nobody")
    done = hpclr("train", target, "--runs-dir", public / "runs", "train.steps=3")
    check_refused(done, "runs/run cannot be used: Permission denied", "make it writable", "--runs-dir")


def test_a_full_disk_is_worth_another_try():
    assert _unusable(Path("a"), OSError(errno.ENOSPC, "No space left on device")).exit_code == 75
    assert _unusable(Path("a"), OSError(errno.EROFS, "Read-only file system")).exit_code == 2


def test_a_run_file_in_the_run_directory_that_is_damaged(bench):
    bench.train(train={"steps": 2})
    (bench.run / "run.yaml").write_text("name: [")
    refused(bench, texts=("run.yaml",), train={"steps": 2})


def test_records_that_are_damaged_end_no_run(bench):
    bench.train(train={"steps": 2})
    environment, metrics = bench.run / "environment.json", bench.run / "metrics.jsonl"
    environment.write_text(environment.read_text()[:100])
    with metrics.open("ab") as file:
        file.write(b'5\n[1]\n{"step": "x", "kind": 1}\n"\xff"\nnull\n{"kind": "tr')
    done = hpclr("train", bench.write(train={"steps": 4}))
    assert done.code == 0, done.err
    assert "environment.json is damaged, its records of earlier attempts are lost" in done.err
    assert len(json.loads(environment.read_text())["attempts"]) == 1
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()][-1] == 4


@pytest.mark.parametrize(
    ("method", "every"), [({"name": "dense"}, 1), ({"name": "dense"}, 1000), (OIALR, 1), (OIALR | {"delay": 1}, 2)]
)
def test_a_loss_that_is_not_finite_ends_the_run(method, every, bench):
    sections = {"method": method, "optimizer": {"name": "sgd", "lr": 1e30}, "checkpoint": {"every": every, "keep": 20}}
    done = hpclr("train", bench.write(**sections))
    assert done.code == 1
    assert "Traceback" not in done.err
    kept = steps_kept(bench.run)
    assert f"The last good checkpoint is that of step {kept[-1]} in runs/run/checkpoints" in done.err
    assert "the loss of step " in done.err or "no longer finite" in done.err
    assert "optimizer.lr" in done.err
    for step in kept:
        tree = load_file(bench.run / "checkpoints" / f"step-{step:08d}.h5").tree
        assert all(torch.isfinite(value).all() for value in tree["model"].values())
    assert not (bench.run / "summary.json").exists()
    for line in (bench.run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are not JSON


def test_moments_that_are_not_finite_are_not_saved(bench):
    """Gradients of 1e30 have infinite squares: the weights stand still, finite, and the run is lost all the same."""
    (bench.path / "steep.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a = nn.Linear(64, 10)\n\n"
        "    def forward(self, x):\n"
        "        y = self.a(x.flatten(1))\n"
        "        return y + 1e30 * (y - y.detach())\n"
    )
    done = hpclr("train", bench.write(model={"target": "steep:Net"}, method={"name": "dense"}, checkpoint={"every": 1}))
    assert done.code == 1
    assert "after step 1 'optimizer/state/a.weight/exp_avg_sq' is no longer finite" in done.err
    assert "The last good checkpoint is that of step 0" in done.err
    assert steps_kept(bench.run) == [0]
    assert last_tree(bench.run)["/position"]["step"] == 0


def test_after_divergence_the_same_command_says_the_same_again(bench):
    sections = {"method": {"name": "dense"}, "optimizer": {"name": "sgd", "lr": 1e30}}
    first = hpclr("train", bench.write(**sections))
    again = hpclr("train", bench.write(**sections))
    assert (first.code, again.code) == (1, 1)
    assert first.err.splitlines()[-1] == again.err.splitlines()[-1]
