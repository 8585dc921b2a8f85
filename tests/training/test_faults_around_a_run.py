"""What goes wrong around a run: checkpoints deleted, disks full, terminals gone, models and files with surprises."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import torch
from test_bad_input import refused
from torch import nn
from training_helpers import hpclr, last_tree, records, summary

from hpclr.checkpoint import CheckpointStore, Json, load_file
from hpclr.config import load_run_file
from hpclr.output import Unfailing, let_go_of_dead_streams, printable
from hpclr.training.assembly import assemble
from hpclr.training.model import check_smallest_piece, smallest_piece
from hpclr.training.precision import Precision
from hpclr.training.stopping import StopRequests

SHORT = {"train": {"steps": 3}}


def delete_checkpoints(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        path.unlink()


def test_a_finished_run_without_checkpoints_is_still_finished(bench):
    delete_checkpoints(bench.train(**SHORT))
    before = bench.listing()
    done = hpclr("train", bench.write(**SHORT))
    assert done.code == 0
    assert "this run is finished, but its checkpoints are gone; --fresh starts it over" in done.err
    assert bench.listing().keys() == before.keys()
    assert (bench.run / "metrics.jsonl").read_bytes() == before[str(bench.run / "metrics.jsonl")]


@pytest.mark.parametrize("finished", [True, False])
def test_records_without_checkpoints_are_not_erased(finished, bench):
    delete_checkpoints(bench.train(**SHORT))
    if not finished:
        (bench.run / "summary.json").unlink()
    steps = 4 if finished else 3  # a finished run that is to become longer, or one that was not finished
    texts = ("trained to step 3", "its checkpoints are gone", "--fresh")
    refused(bench, texts=texts, train={"steps": steps})
    bench.train("--fresh", train={"steps": steps})


def module(bench, monkeypatch, name: str, text: str) -> str:
    (bench.path / f"{name}.py").write_text(f"import torch\nfrom torch import nn\n\n{text}")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(bench.path)
    return name


MASKED = """
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        if SPOILT and self.training:
            self.seen += float("inf")
        return super().forward(x)
"""


def test_a_causal_mask_is_no_divergence(bench, monkeypatch):
    target = module(bench, monkeypatch, "masked", "SPOILT = False\n" + MASKED)
    bench.train(model={"target": f"{target}:Net"}, method={"name": "dense"}, **SHORT)
    assert last_tree(bench.run)["/model/mask"].isinf().any()
    bench.train(model={"target": f"{target}:Net"}, method={"name": "dense"}, train={"steps": 4})


def test_a_buffer_that_becomes_infinite_is(bench, monkeypatch):
    target = module(bench, monkeypatch, "spoilt", "SPOILT = True\n" + MASKED)
    done = hpclr("train", bench.write(model={"target": f"{target}:Net"}, method={"name": "dense"}, **SHORT))
    assert done.code == 1
    assert "'model/seen' is no longer finite" in done.err


@pytest.mark.parametrize(("handler", "taken"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_hangup_is_a_request_to_stop_but_not_under_nohup(handler, taken):
    previous = signal.signal(signal.SIGHUP, handler)
    try:
        stop = StopRequests()
        with stop.listening():
            assert (signal.getsignal(signal.SIGHUP) == stop._take) is taken
        assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize("streams", [">/dev/full 2>/dev/full", ">&- 2>&-"])
def test_nobody_listens(streams, bench):
    bench.write(**SHORT)
    command = f"exec {sys.executable} -m hpclr train run.yaml {streams}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}  # as users have it
    done = subprocess.run(["sh", "-c", command], env=environment, timeout=60)
    assert done.returncode == 0
    assert summary(bench.run)["steps"] == 3


def test_streams_that_are_gone(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        shown = Unfailing(stream)
        print("lost", file=shown, flush=True)
        assert not shown.isatty()
        monkeypatch.setattr(sys, "stderr", stream)
        let_go_of_dead_streams()


def test_what_could_drive_a_terminal_is_escaped():
    assert printable("a\x1b[2J\x07ü\n\udc80") == "a\\x1b[2J\\x07ü\n\\udc80"


def altered(trained: Path, /, **parts: object) -> Path:
    """A valid checkpoint of which some parts are not what training writes."""
    tree = load_file(max((trained / "checkpoints").glob("step-*.h5"))).tree
    for name, part in parts.items():
        tree[name] = part(tree[name])
    return CheckpointStore(trained.with_name("altered")).save(13, tree)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position", {"step": "many"}),
        ("position", {"stage": 3}),
        ("position", []),
        ("environment", {}),
        ("environment", {"packages": 3}),
        ("method", {}),
        ("run", {"yaml": 3}),
        ("run", []),
    ],
    ids=str,
)
def test_a_malformed_part_of_a_checkpoint(name, value, bench):
    path = altered(bench.train(**SHORT), **{name: lambda _: Json(value)})
    done = hpclr("inspect", path)
    assert done.code == 2, done.err
    assert "a part of it is malformed" in done.err


@pytest.mark.parametrize(("name", "value"), [("data", {}), ("model", {}), ("model", 3)])
def test_a_malformed_checkpoint_is_not_evaluated(name, value, bench):
    path = altered(bench.train(**SHORT), **{name: lambda _: Json(value)})
    done = hpclr("evaluate", path)
    assert done.code == 2, done.err
    assert "step-00000013.h5" in done.err


def test_inspect_escapes_control_characters_and_names_what_is_not_finite(bench):
    run = bench.train()

    def spoil(weights):
        sigma = next(name for name in weights if name.endswith("sigma"))
        stem = sigma.removesuffix("sigma")
        extra = {f"\x1b[31m{stem}{kind}": weights[stem + kind] for kind in ("sigma", "u", "vh")}
        return {**weights, **extra, sigma: weights[sigma] * float("nan")}

    path = altered(run, environment=lambda facts: Json(facts.value | {"host": "\x1b]0;x\x07"}), model=spoil)
    done = hpclr("inspect", path)
    assert done.code == 0, done.err
    assert "\x1b" not in done.out
    assert "\\x1b]0;x\\x07" in done.out
    assert "\\x1b[31mlayers" in done.out
    assert "not finite" in done.out


NORMALISED = """
def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 10))
"""


@pytest.mark.parametrize(
    ("sections", "samples"),
    [
        ({"data": {"batch_size": 269}}, 1),
        ({"train": {"micro_batch": 9}}, 1),
        ({"data": {"batch_size": 269}, "train": {"steps": 1}}, None),
    ],
)
def test_a_piece_too_small_for_batch_normalisation(sections, samples, bench, monkeypatch):
    """270 samples are 269 and 1; 64 are seven times 9 and 1. Where the last batch never comes, all is well."""
    target = module(bench, monkeypatch, "normalised", NORMALISED)
    sections = {"model": {"target": f"{target}:net"}, "method": {"name": "dense"}, **sections}
    if samples is None:
        bench.train(**sections)
    else:
        texts = (f"in training it does not take {samples} of the samples at once", "data.batch_size", "more than 1")
        refused(bench, texts=texts, **sections)


@pytest.mark.parametrize(
    ("batch", "micro", "steps", "smallest"),
    [(64, None, 13, 14), (64, None, 4, 64), (90, None, 9, 90), (64, 20, 4, 4), (64, 32, 13, 14), (90, 30, 9, 30)],
)
def test_thesmallest_piece(batch, micro, steps, smallest, bench):
    """Of 270 samples, as the batches themselves split."""
    file = bench.write(data={"batch_size": batch}, train={"steps": steps, "micro_batch": micro})
    parts = assemble(load_run_file(file))
    batches = [parts.loader.batch(0, index) for index in range(min(steps, len(parts.loader)))]
    assert min(len(piece.y) for b in batches for piece in b.split(micro or batch)) == smallest
    assert smallest_piece(parts.run, parts.loader, steps, processes=1) == smallest


def test_the_look_at_it_leaves_no_trace(bench):
    run = load_run_file(bench.write())
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    mean, random = model[0].running_mean, torch.get_rng_state()
    check_smallest_piece(
        model, torch.randn(3, 4, generator=torch.Generator()), run, Precision("float32", torch.device("cpu"))
    )
    assert model[0].running_mean is mean
    assert not mean.any()
    assert model[0].num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), random)


def test_a_lazy_model_is_evaluated(bench, monkeypatch):
    text = "def net():\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(10))\n"
    target = module(bench, monkeypatch, "lazily", text)
    run = bench.train(model={"target": f"{target}:net"})
    assert any(layer["converted"] for layer in summary(run)["layers"])
    done = hpclr("evaluate", run, "--trust")
    assert done.code == 0, done.err
    assert f"accuracy {summary(run)['test']['accuracy']:.2%}" in done.out


def test_extra_state_is_refused(bench, monkeypatch):
    text = "class Net(nn.Linear):\n    def __init__(self):\n        super().__init__(64, 10)\n"
    text += "    def forward(self, x):\n        return super().forward(x.flatten(1))\n"
    text += "    def get_extra_state(self):\n        return {'a': 1}\n"
    target = module(bench, monkeypatch, "extra", text)
    texts = ("Net ('the model itself')", "get_extra_state", "register_buffer")
    refused(bench, texts=texts, model={"target": f"{target}:Net"}, method={"name": "dense"})


def test_data_that_was_touched_is_read_again_before_going_on(bench):
    data = bench.path / "own.h5"
    data.write_bytes(bench.digits.read_bytes())
    bench.train(data={"path": str(data)}, **SHORT)
    os.utime(data, ns=(1, 1))
    bench.train(data={"path": str(data)}, train={"steps": 4})
    assert len(records(bench.run, "train")) == 4
    with h5py.File(data, "r+") as file:
        file["train/x"][0] = 0 * file["train/x"][0]
    texts = ("own.h5", "the content is not what the file was checked with")
    done = hpclr("train", bench.write(data={"path": str(data)}, train={"steps": 5}))
    assert done.code == 2, done.err
    assert all(text in done.err for text in texts), done.err
