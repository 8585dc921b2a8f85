"""`model.weights`: a run begins with the weights in a file, or says why it cannot."""

import copy
import json
import random
import re

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from torch import nn
from training_helpers import VIT, hpclr, last_tree, run_file

from hpclr.checkpoint import Json, write_tree
from hpclr.checkpoint.digest import write_sidecar
from hpclr.config import parse_run_file
from hpclr.errors import UsageError
from hpclr.models import Samples
from hpclr.training.export import export_checkpoint
from hpclr.training.model import build_model
from hpclr.training.weights import load_initial_weights

SAMPLES = Samples("classification", (1, 8, 8), (10,))

DENSE = {"name": "dense"}


def net(seed=0, outputs=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, outputs))


def built(digits, model, seed=0):
    text = json.dumps(run_file(digits, model=model, train={"seed": seed}))
    return build_model(parse_run_file(text, "run.yaml"), SAMPLES)


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


def torch_file(content):
    return lambda path: torch.save(content, path)


def hdf5(tree):
    return lambda path: write_tree(path, tree, {"step": 0})


def padding_to(low_byte):
    """How many bytes more make the length of the header end in this byte: the file then starts as a pickle does."""
    length = int.from_bytes(safetensors.torch.save(STATE, {"padding": ""})[:8], "little")
    return (low_byte - length) % 256


STATE = net(seed=7).state_dict()
KINDS = {
    "safetensors": lambda path: save_file(STATE, path),
    "torch": torch_file(STATE),
    "torch, old form": lambda path: torch.save(STATE, path, _use_new_zipfile_serialization=False),
    "state_dict": torch_file({"state_dict": STATE, "epoch": 3}),
    "model": torch_file({"model": STATE, "args": {"lr": 0.1}}),
    "hdf5": hdf5({"model": dict(STATE)}),
    "float64": torch_file(
        {key: value.double() if value.is_floating_point() else value for key, value in STATE.items()}
    ),
    "header of 128 bytes": lambda path: save_file(STATE, path, {"padding": " " * padding_to(128)}),
}


@pytest.mark.parametrize("write", KINDS.values(), ids=KINDS)
def test_every_kind_of_file_gives_its_weights(write, tmp_path):
    write(tmp_path / "weights")  # the name says nothing
    model = net()
    before = {key: value.dtype for key, value in model.state_dict().items()}
    load_initial_weights(model, str(tmp_path / "weights"))
    assert same(model.state_dict(), STATE)
    assert {key: value.dtype for key, value in model.state_dict().items()} == before


@pytest.mark.parametrize("model", [{"name": "mlp", "hidden": [32, 24]}, VIT], ids=["mlp", "vit"])
def test_what_is_exported_is_a_starting_point(model, bench, digits):
    """Dense or factored, in any format, of a checkpoint too; what is averaged is taken averaged."""
    run = bench.train(model=model, train={"ema": 0.5, "steps": 8})
    export_checkpoint(run, bench.path / "expected.safetensors")
    expected = built(digits, model | {"weights": "expected.safetensors"}).state_dict()
    for name in ("a.pt", "b.safetensors", "c.h5"):
        export_checkpoint(run, bench.path / name, factored=True)
    for name in ("a.pt", "b.safetensors", "c.h5", "runs/run/checkpoints/step-00000008.h5"):
        assert same(built(digits, model | {"weights": name}, seed=3).state_dict(), expected)
    assert not same(built(digits, model).state_dict(), expected)


def test_a_run_starts_there_and_goes_on_without_the_file(bench):
    bench.train(train={"steps": 4}, method=DENSE)
    export_checkpoint(bench.run, bench.path / "first.safetensors")
    model = {"name": "mlp", "hidden": [32, 24], "weights": "first.safetensors"}
    once = last_tree(bench.train("--fresh", model=model, train={"steps": 7}, method=DENSE))
    assert not same_weights(once, last_tree(bench.train("--fresh", train={"steps": 7}, method=DENSE)))

    bench.train("--fresh", model=model, train={"steps": 3}, method=DENSE)
    (bench.path / "first.safetensors").rename(bench.path / "gone")
    assert same_weights(once, last_tree(bench.train(model=model, train={"steps": 7}, method=DENSE)))
    for command in ("evaluate", "inspect"):
        assert hpclr(command, bench.run).code == 0
    done = hpclr("train", bench.write(model=model | {"weights": "gone"}, train={"steps": 9}, method=DENSE))
    assert done.code == 2
    assert "model.weights: 'first.safetensors' in the run, 'gone' now" in done.err
    done = hpclr("train", bench.write(name="other", model=model))
    assert done.code == 2
    assert "model.weights: first.safetensors: there is no such file" in done.err
    assert not (bench.path / "runs" / "other").exists()


def same_weights(one, other):
    return all(torch.equal(one[key], other[key]) for key in one if key.startswith("/model/"))


def test_another_head(tmp_path):
    save_file(STATE | {"extra.0": torch.ones(2), "extra.1": torch.ones(2)}, tmp_path / "a")
    model = net(outputs=6)
    drawn = copy.deepcopy(model.state_dict())
    load_initial_weights(model, str(tmp_path / "a"), ["2.*", "extra.?"])
    assert torch.equal(model.state_dict()["0.weight"], STATE["0.weight"])
    assert torch.equal(model.state_dict()["2.weight"], drawn["2.weight"])
    with pytest.raises(UsageError, match=r"model.weights_except: 'head\*' matches no name .* has 0.weight, 0.bias"):
        load_initial_weights(model, str(tmp_path / "a"), ["2.*", "head*"])


def test_the_initial_values_that_stay_and_all_later_draws_are_those_of_the_seed(bench, digits):
    model = {"name": "mlp", "hidden": [32, 24]}
    built(digits, model, seed=5)
    drawn = torch.rand(3), random.random()
    torch.save(built(digits, model, seed=1).state_dict(), "a.pt")
    part = built(digits, model | {"weights": "a.pt", "weights_except": ["head.*"]}, seed=5)
    assert torch.equal(torch.rand(3), drawn[0])
    assert random.random() == drawn[1]
    assert torch.equal(part.head.weight, built(digits, model, seed=5).head.weight)
    assert torch.equal(part.layers[1].weight, torch.load("a.pt")["layers.1.weight"])


def test_exceptions_without_weights_are_refused(bench):
    done = hpclr("train", bench.write(model={"name": "mlp", "weights_except": ["head.*"]}))
    assert done.code == 2
    assert "but model.weights is null" in done.err


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight


@pytest.mark.parametrize("absent", ["one.weight", "two.weight", None])
def test_tied_weights_may_be_there_under_one_name(absent, tmp_path):
    state = {"one.weight": torch.eye(3), "two.weight": torch.eye(3), "one.bias": torch.ones(3)}
    state.pop(absent, None)
    save_file(state, tmp_path / "a")
    model = Tied()
    load_initial_weights(model, str(tmp_path / "a"))
    assert torch.equal(model.one.weight, torch.eye(3))
    assert model.one.weight is model.two.weight


def test_tied_weights_that_differ_are_refused(tmp_path):
    save_file({"one.weight": torch.eye(3), "two.weight": torch.ones(3, 3), "one.bias": torch.ones(3)}, tmp_path / "a")
    with pytest.raises(UsageError, match=r"'one.weight' and 'two.weight' are one and the same"):
        load_initial_weights(Tied(), str(tmp_path / "a"))


def test_lazy_layers_take_the_shapes_of_the_file(tmp_path):
    model = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.LazyLinear(3))
    save_file(STATE, tmp_path / "a")
    load_initial_weights(model, str(tmp_path / "a"), ["2.*"])
    model(torch.randn(2, 4))
    assert model[2].weight.shape == (3, 5)
    for key in ("0.weight", "0.bias"):
        assert torch.equal(model.state_dict()[key], STATE[key])


class Masked(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))


def test_a_mask_may_be_infinite(tmp_path):
    save_file(Masked().state_dict(), tmp_path / "a")
    load_initial_weights(Masked(), str(tmp_path / "a"))


class Mine:
    pass


def changed(**changes):
    return STATE | changes


def without(*names):
    return {key: value for key, value in STATE.items() if key not in names}


def factored(**changes):
    entry = {"weight": "0.weight", "factors": ["0.u", "0.sigma", "0.vh"], "shape": [5, 4], "transposed": False}
    state = without("0.weight") | {"0.u": torch.ones(5, 1), "0.sigma": torch.ones(1, 1), "0.vh": torch.ones(1, 4)}
    return {"state_dict": state, "layers": {"0": entry | changes}}


def damaged_hdf5(path):
    digest = write_tree(path, {"model": dict(STATE)}, {"step": 0})
    write_sidecar(path, digest)
    with path.open("r+b") as file:
        file.seek(-20, 2)
        file.write(b"rust")


def cut(write, size):
    def cut_short(path):
        write(path)
        path.write_bytes(path.read_bytes()[:size])

    return cut_short


REFUSED = {
    "nothing": (lambda path: None, "there is no such file"),
    "folder": (lambda path: path.mkdir(), "there is no such file, it is a directory"),
    "empty": (lambda path: path.write_bytes(b""), "found a file that starts with b''"),
    "text": (lambda path: path.write_text("name: vit"), "expected a safetensors file, a state dict of torch.save or"),
    "pickle": (
        torch_file({"state_dict": STATE, "args": Mine()}),
        r"more than tensors and plain values \(.*Mine\), which may run code",
    ),
    "whole model": (torch_file(net()), "may run code when it is read"),
    "list": (torch_file([1, 2]), "expected a state dict .*, found a list"),
    "numbers": (torch_file({"lr": 0.1}), "found 'lr': float"),
    "two wrappers": (torch_file({"model": {"state_dict": STATE}}), "found 'state_dict': OrderedDict"),
    "int names": (torch_file({0: torch.ones(2)}), "found 0: Tensor"),
    "cut torch": (cut(torch_file(STATE), 700), "it is damaged or no file of torch.save"),
    "cut safetensors": (cut(KINDS["safetensors"], 300), "it is damaged or no safetensors file"),
    "cut hdf5": (cut(KINDS["hdf5"], 3000), "damaged or was not written by hpclr"),
    "damaged hdf5": (damaged_hdf5, "the content has changed since it was saved"),
    "hdf5 without model": (hdf5({"weights": dict(STATE)}), "an entry 'model', found only weights"),
    "hdf5 with factors": (
        hdf5({"model": {"0.u": torch.ones(5, 1), "0.sigma": torch.ones(1, 1), "0.vh": torch.ones(1, 4)}}),
        r"holds factored layers \(such as 0\) but no entry 'layers'",
    ),
    "layers of another shape": (torch_file(factored(shape=[4, 5])), "layer '0': expected .* found shapes"),
    "layers of no kind": (torch_file(factored(factors=3)), "layers: Expected `array`"),
    "layers of text": (
        lambda path: save_file(STATE, path, {"layers": "{"}),
        "its metadata 'layers' is not JSON",
    ),
    "missing": (
        torch_file(without("0.weight", "0.bias", "2.weight", "2.bias")),
        "4 missing from it: 0.weight, 0.bias, 2.weight …",
    ),
    "unexpected": (
        torch_file({f"module.{key}": value for key, value in STATE.items()}),
        "9 not in the model: module.0",
    ),
    "another shape": (
        torch_file(changed(**{"2.weight": torch.ones(4, 5)})),
        r"1 of another shape: 2.weight \(\(4, 5\) in the file, \(3, 5\) in the model\)",
    ),
    "complex": (torch_file(changed(**{"0.bias": torch.ones(5) * 1j})), r"0.bias \(\(5,\) complex in the file"),
    "sparse": (torch_file(changed(**{"0.bias": torch.ones(5).to_sparse()})), r"0.bias \(\(5,\) sparse"),
    "nan": (torch_file(changed(**{"0.bias": torch.full((5,), torch.nan)})), "5 of the 5 numbers of '0.bias' are not"),
    "too large": (torch_file(changed(**{"0.bias": torch.full((5,), 1e300, dtype=torch.float64)})), "finite as float32"),
}


@pytest.mark.parametrize(("write", "text"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(write, text, tmp_path):
    write(tmp_path / "weights")
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError) as refused:
        load_initial_weights(model, str(tmp_path / "weights"))
    assert re.search(text, str(refused.value)), refused.value
    assert "weights_only=False" not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert same(model.state_dict(), before)


def test_factors_in_a_torch_file_are_multiplied_out(tmp_path):
    torch.save(factored(), tmp_path / "a")
    model = net()
    load_initial_weights(model, str(tmp_path / "a"))
    assert torch.equal(model[0].weight, torch.ones(5, 4))


def test_factors_in_an_hdf5_file_without_a_digest(tmp_path):
    content = factored()
    write_tree(tmp_path / "a", {"model": content["state_dict"], "layers": Json(content["layers"])}, {"step": 1})
    model = net()
    load_initial_weights(model, str(tmp_path / "a"))
    assert torch.equal(model[0].weight, torch.ones(5, 4))
