"""`hpclr spectrum --data`: ranks by what layers do to samples, and linear maps from samples to targets."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from training_helpers import OIALR, VIT, hpclr, last_tree, run_file
from windows_helpers import forecasting, language, the_series, the_text  # noqa: F401 - fixtures

from hpclr.data import Loader, open_dataset

MODULE = """
import torch
from torch import nn

def flat(inputs=64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 20), nn.ReLU(), nn.Linear(20, 10))

class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = flat(), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """A module in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "factories_for_data.py").write_text(MODULE)
    yield "factories_for_data"
    sys.modules.pop("factories_for_data", None)


def found(*arguments):
    done = hpclr("spectrum", *arguments, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def named(layers, name):
    return next(one for one in layers if one["name"] == name)


def training_split(digits) -> torch.Tensor:
    dataset = open_dataset([digits])
    return Loader(dataset, "train", dataset.sizes["train"], 0, shuffle=False).batch(0, 0).x.flatten(1).double()


def prepared(path, x, y):
    """A data set of one's own; the same for training and testing."""
    arrays = {f"x_{split}": x.astype(np.float32) for split in ("train", "test")}
    np.savez(path / "own.npz", **arrays, **{f"y_{split}": y.astype(np.int64) for split in ("train", "test")})
    done = hpclr("data", "prepare", "npz", path / "own.npz", path / "own.h5")
    assert done.code == 0, done.err
    return path / "own.h5"


def test_values_are_those_of_the_weight_times_the_root_of_its_inputs_moment(factories, digits):
    spectra = found(f"{factories}:flat", "--data", digits)
    x, weight = training_split(digits), sys.modules[factories].flat()[1].weight.detach().double()
    layer = named(spectra["outputs"]["layers"], "1")
    expected = torch.linalg.svdvals(x @ weight.T) / len(x) ** 0.5  # of the outputs themselves, without the bias
    torch.testing.assert_close(torch.tensor(layer["singular_values"]).double(), expected, rtol=1e-6, atol=1e-6)
    kept = layer["kept"]["energy 0.9"]
    assert kept["energy"] == pytest.approx(float(expected[: kept["rank"]].square().sum() / expected.square().sum()))
    assert kept["rank"] < named(spectra["layers"], "1")["kept"]["energy 0.9"]["rank"]


def test_fewer_samples_are_taken_if_asked(factories, digits):
    some, all_ = (found(f"{factories}:flat", "--data", digits, "--samples", n) for n in (40, 10**6))
    assert some["outputs"] != all_["outputs"]
    assert named(some["linear"], "the samples")["rank"] is None  # 64 inputs, and no more samples than that
    assert named(all_["linear"], "the samples")["rank"] == 9  # ten classes whose shares sum to one


@pytest.mark.parametrize("classes", [1, 3])
def test_widths_are_proposed_for_what_stands_out_of_the_noise(factories, tmp_path, classes):
    """Labels that depend on nothing, and ones that are told apart by two directions among twelve."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(600, 12)), np.arange(600) % 4
    if classes == 3:
        x[:, :2] += 3 * np.array([[0, 0], [0, 1], [1, 0], [1, 1]])[y]
    spectra = found(f"{factories}:flat", "inputs=12", "--data", prepared(tmp_path, x, y))
    view = named(spectra["linear"], "the samples")
    rank = 2 if classes == 3 else 0
    assert (view["inputs"], view["outputs"], view["rank"]) == (12, 4, rank)
    assert view["units"] == {"tanh": rank, "relu": 2 * rank, "gelu": 2 * rank}
    assert (view["explained"] > 0.2) == (classes == 3)


def test_a_run_file_s_model_starts_as_its_init_says(bench):
    file = bench.write(model={"name": "mlp", "hidden": [32], "init": "svd"}, method={"name": "dense"})
    with_data, without = found(file, "--data", bench.digits), found(file)
    assert with_data["layers"] == without["layers"]
    assert named(with_data["linear"], "head")["rank"] == 9
    plain = found(file, "model.init=null")
    assert plain["layers"] != without["layers"]
    assert "linear" not in plain


def test_factored_layers_of_a_run_are_judged_by_their_products(bench):
    run = bench.train(model={"name": "mlp", "hidden": [32, 24]}, method=OIALR | {"keep_last": False})
    spectra, tree = found(run, "--data", bench.digits, "--layers", "layers.1"), last_tree(run)
    u, sigma, vh = (tree[f"/model/layers.1.{factor}"].double() for factor in ("u", "sigma", "vh"))
    expected = torch.linalg.svdvals(training_split(bench.digits) @ (u @ sigma @ vh).T) / 270**0.5
    (layer,) = spectra["outputs"]["layers"]
    torch.testing.assert_close(torch.tensor(layer["singular_values"]).double(), expected, rtol=1e-5, atol=1e-6)
    assert [view["name"] for view in spectra["linear"]] == ["the samples", "layers.1"]


def test_windows_are_those_of_the_run_file(bench, series, text):
    model = {"name": "mlp", "hidden": [20]}
    windows = found(bench.write(**forecasting(series, model=model, method={"name": "dense"})), "--data", series)
    view = named(windows["linear"], "the samples")
    assert (view["inputs"], view["outputs"]) == (16 * 3, 4 * 3)
    tokens = found(bench.write(**language(text, method={"name": "dense"})), "--data", text, "--samples", "60")
    assert tokens["linear"] == []
    assert tokens["outputs"]["layers"]


def test_the_tables_show_both_ranks_and_proposals(factories, digits):
    done = hpclr("spectrum", f"{factories}:Idle", "--data", digits)
    assert done.code == 0, done.err
    for words in ("each rule would keep", "directions of the outputs", "9 (tanh), 18 (relu, gelu)", "the samples"):
        assert words in done.out
    outputs = done.out[done.out.index("directions of the outputs") :]
    assert "idle" in done.out  # which no sample reaches
    assert "idle" not in outputs


def test_what_data_cannot_go_through_is_refused(bench, factories, series):
    save_file({"a.weight": nn.Linear(3, 2).weight.detach()}, "weights.safetensors")
    target = {"target": f"{factories}:flat"}
    run = bench.train(model=target, method={"name": "dense"})
    cases = {
        (f"{factories}:flat", "--samples", "3"): "go with --data",
        ("weights.safetensors", "--data", bench.digits): "no model that --data could go through",
        (run, "--data", bench.digits): "pass --trust",
        (f"{factories}:flat", "inputs=9", "--data", bench.digits): "does not take samples of shape (1, 8, 8)",
        (f"{factories}:flat", "--data", series): "is for forecasting",
        (f"{factories}:flat", "--data", "none.h5"): "none.h5",
    }
    for arguments, words in cases.items():
        done = hpclr("spectrum", *arguments)
        assert done.code == 2, arguments
        assert words in done.err
    assert found(run, "--data", bench.digits, "--trust")["linear"]


def test_a_vision_transformer_s_layers_are_all_reached(bench):
    (bench.path / "spectra.yaml").write_text(json.dumps(run_file(bench.digits, model=VIT, method={"name": "dense"})))
    spectra = found(bench.path / "spectra.yaml", "--data", bench.digits, "--samples", "64")
    assert [one["name"] for one in spectra["outputs"]["layers"]] == [one["name"] for one in spectra["layers"]]
    assert [one["name"] for one in spectra["linear"]] == ["the samples", "head"]
