"""`hpclr spectrum` of models that can be imported, run files, checkpoints and files of weights."""

import json
import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from training_helpers import OIALR, VIT, hpclr, last_tree, run_file

MODULE = """
import torch
from torch import nn

def planted(rank=5):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(120, 100), nn.LayerNorm(100), nn.Conv2d(8, 64, 3), nn.Embedding(9, 4))
    with torch.no_grad():
        model[0].weight += torch.randn(100, rank) @ torch.randn(rank, 120) / 10
    return model

def broken():
    model = planted()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    return model
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """A module in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "factories_of_spectra.py").write_text(MODULE)
    yield "factories_of_spectra"
    sys.modules.pop("factories_of_spectra", None)


def found(*arguments):
    done = hpclr("spectrum", *arguments, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def layer(spectra, name):
    return next(one for one in spectra["layers"] if one["name"] == name)


def write_run(bench, **sections):
    file = bench.path / "spectra.yaml"
    file.write_text(json.dumps(run_file(bench.digits, **sections)))
    return file


def test_a_model_is_imported_and_its_planted_rank_found(factories):
    spectra = found(f"{factories}:planted", "rank=7")
    model = sys.modules[factories].planted(rank=7)
    expected = torch.linalg.svdvals(model[0].weight.detach().double())
    first = layer(spectra, "0")
    torch.testing.assert_close(torch.tensor(first["singular_values"]).double(), expected, rtol=1e-6, atol=1e-6)
    assert first["shape"] == [100, 120]
    assert first["stable_rank"] == pytest.approx(float(expected.square().sum() / expected[0] ** 2), rel=1e-5)
    assert first["kept"]["marchenko_pastur"]["rank"] == 7
    assert expected[6] > first["noise_edge"] > expected[7]
    share = float(expected[:7].square().sum() / expected.square().sum())
    assert first["kept"]["marchenko_pastur"]["energy"] == pytest.approx(share, rel=1e-5)
    assert layer(spectra, "2")["kept"]["marchenko_pastur"]["rank"] == 0
    assert spectra["left_alone"] == {"1": "LayerNorm has no low-rank form", "3": "Embedding has no low-rank form"}
    dense = 100 * 120 + 64 * 72
    assert spectra["rules"]["marchenko_pastur"]["stored"] == pytest.approx(7 * (100 + 120 + 7) / dense)
    assert spectra["rules"]["marchenko_pastur"]["trained"] == pytest.approx(49 / dense)


def test_the_table_names_layers_rules_and_reasons(factories):
    done = hpclr("spectrum", f"{factories}:planted", "--rule", "0.2", "--rule", "{rule: energy, share: 0.5}")
    assert done.code == 0, done.err
    for text in ("100×120", "64×72", "relative", "energy", "parameters stored", "LayerNorm has no low-rank form"):
        assert text in done.out
    assert "gavish" not in done.out


def test_layers_are_chosen_by_name(factories):
    spectra = found(f"{factories}:planted", "--layers", "[23]")
    assert [one["name"] for one in spectra["layers"]] == ["2"]
    assert list(spectra["left_alone"]) == ["3"]


def test_a_weight_that_is_not_finite_is_left_alone(factories):
    spectra = found(f"{factories}:broken")
    assert [one["name"] for one in spectra["layers"]] == ["2"]
    assert "not finite" in spectra["left_alone"]["0"]


def test_a_run_file_brings_its_rule_and_its_choice_of_layers(bench):
    method = OIALR | {"cutoff": {"rule": "energy", "share": 0.7}, "exclude": ["layers.1"], "keep_last": True}
    spectra = found(write_run(bench, method=method), "model.hidden=[48, 24, 16]")
    names = [one["name"] for one in spectra["layers"]]
    assert "layers.1" not in names
    assert spectra["left_alone"]["layers.1"] == "excluded by name"
    assert "keep_last" in " ".join(spectra["left_alone"].values())
    assert next(iter(spectra["rules"])) == "energy 0.7"
    assert layer(spectra, "layers.4")["shape"] == [24, 48]


def test_a_target_in_a_run_file_needs_no_data(bench, factories):
    run = write_run(bench, model={"target": f"{factories}:planted"}, data={"path": "none.h5"}, method={"name": "dense"})
    assert [one["name"] for one in found(run)["layers"]] == ["0", "2"]


def test_a_run_s_factored_layers_have_the_values_of_their_products(bench):
    run = bench.train(model=VIT)
    spectra, tree = found(run), last_tree(run)
    factored = [one for one in spectra["layers"] if one["factored"]]
    assert {one["name"] for one in factored} >= {"blocks.0.attention.qkv", "blocks.0.mlp.0"}
    for one in factored:
        u, sigma, vh = (tree[f"/model/{one['name']}.{factor}"].double() for factor in ("u", "sigma", "vh"))
        expected = torch.linalg.svdvals(u @ sigma @ vh)[: len(sigma)]
        torch.testing.assert_close(torch.tensor(one["singular_values"]).double(), expected, rtol=1e-5, atol=1e-6)
    assert next(iter(spectra["rules"])) == "relative 0.3"  # the run's own
    assert "no matrix" in spectra["left_alone"]["head.bias"]


def test_files_of_weights_are_read_without_importing_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    state = nn.Sequential(nn.Linear(30, 20), nn.Conv1d(4, 6, 3)).state_dict() | {"count": torch.tensor([[1, 2]])}
    save_file(state, "w.safetensors")
    torch.save({"state_dict": state, "epoch": 3}, "w.pt")
    one, other = found("w.safetensors"), found("w.pt")
    assert [layer["shape"] for layer in other["layers"]] == [[20, 30], [6, 12]]
    assert sorted(map(str, one["layers"])) == sorted(map(str, other["layers"]))
    assert "int64" in one["left_alone"]["count"]


def test_factors_in_a_plain_file_are_known_by_their_names(tmp_path):
    torch.manual_seed(0)
    u, vh = torch.linalg.qr(torch.randn(12, 3)).Q, torch.linalg.qr(torch.randn(9, 3)).Q.T.contiguous()
    sigma = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    torch.save({"a.u": u, "a.sigma": sigma, "a.vh": vh, "b.u": u, "b.s": torch.ones(7), "b.vh": vh}, tmp_path / "f.pt")
    spectra = found(tmp_path / "f.pt")
    assert layer(spectra, "a")["singular_values"] == pytest.approx([3, 2, 1])
    assert [one["name"] for one in spectra["layers"]] == ["a"]  # those of b do not fit together


EIGHT_BITS = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"]


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_weights_of_eight_bits_have_the_values_of_the_numbers_they_stand_for(tmp_path, dtype):
    torch.manual_seed(0)
    weight, u, vh = (torch.randn(*shape).to(getattr(torch, dtype)) for shape in ((20, 30), (12, 3), (3, 9)))
    factors = {"a.u": u, "a.s": torch.ones(3).to(u.dtype), "a.vh": vh}
    save_file({"b.weight": weight, "c.weight": weight.clone(), "c.weight_scale": torch.ones(20, 1)} | factors,
              tmp_path / "w.safetensors")  # fmt: skip
    spectra = found(tmp_path / "w.safetensors")
    for name, matrix in (("b", weight.double()), ("a", u.double() @ vh.double())):
        values = torch.tensor(layer(spectra, name)["singular_values"]).double()
        expected = torch.linalg.svdvals(matrix)[: len(values)]
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    assert "to be scaled by its entry '…weight_scale'" in spectra["left_alone"]["c.weight"]


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no numbers of four bits")
def test_weights_that_torch_cannot_convert_are_left_alone(tmp_path):
    weight = torch.empty(4, 4, dtype=torch.float4_e2m1fn_x2)
    torch.save({"a.weight": torch.ones(2, 2), "b.weight": weight}, tmp_path / "w.pt")
    spectra = found(tmp_path / "w.pt")
    assert "float4_e2m1fn_x2, which torch cannot convert" in spectra["left_alone"]["b"]
    assert [one["name"] for one in spectra["layers"]] == ["a"]


def test_names_of_layers_stay_on_their_line_of_the_table(tmp_path):
    torch.save({"a\nb\x1b[2J.weight": torch.eye(2), "c\nd\x07.bias": torch.ones(2)}, tmp_path / "w.pt")
    done = hpclr("spectrum", tmp_path / "w.pt")
    assert done.code == 0, done.err
    assert "a\\nb\\x1b[2J" in done.out
    assert "c\\nd\\x07.bias" in done.out
    assert not {"\x1b", "\x07"} & set(done.out)


def test_a_checkpoint_without_its_digest_is_read_as_the_error_says(bench):
    run = bench.train(model=VIT)
    file = max((run / "checkpoints").glob("step-*.h5"))
    file.with_name(f"{file.name}.sha256").unlink()
    done = hpclr("spectrum", file)
    assert done.code == 2
    assert "`spectrum` read it with --untrusted" in done.err
    assert found(file, "--untrusted")["layers"]


class _Hostile:
    def __reduce__(self):
        return print, ("ran",)


def test_what_cannot_be_looked_at_is_refused(bench, factories):
    (bench.path / "evil.pt").write_bytes(b"\x80\x02" + pickle.dumps(_Hostile(), 2)[2:])
    (bench.path / "text.safetensors").write_text("no weights")
    torch.save({"w.weight": torch.ones(2, 2)}, bench.path / "w.pt")
    for arguments, texts in {
        ("nothing",): ("expected package.module:factory", "there is no file"),
        ("not_there:model",): ("cannot import 'not_there:model'",),
        (f"{factories}:planted", "width=3"): ("cannot be called with {'width': 3}",),
        (f"{factories}:planted", "--layers", "x*"): ("'x*' matches no layer", "its layers are 0, 2"),
        (f"{factories}:planted", "--rule", "2"): ("--rule '2'", "below 1"),
        (f"{factories}:planted", "--rule", "{rule: magic}"): ("Unknown rank rule 'magic'",),
        (f"{factories}:planted", "--plot", "a.gif"): ("must end in one of",),
        ("w.pt", "a=1"): ("take no settings",),
        ("evil.pt",): ("damaged or holds more than tensors",),
        ("text.safetensors",): ("expected a safetensors file",),
        (".",): ("holds no checkpoint",),
        ("w.pt", "--best"): ("w.pt is no run directory", "leave it out"),
        (f"{factories}:planted", "--best"): ("is no run directory",),
        ("w" * 300,): ("cannot be read", "File name too long"),
    }.items():
        done = hpclr("spectrum", *arguments)
        assert done.code == 2, (arguments, done.out, done.err)
        assert all(text in done.err for text in texts), done.err
        assert "ran" not in done.out


def test_the_picture_is_the_same_each_time(factories, tmp_path):
    pytest.importorskip("matplotlib")
    for file in ("a.svg", "b.svg", "a.png"):
        done = hpclr("spectrum", f"{factories}:planted", "--plot", file)
        assert done.code == 0, done.err
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_nothing_or_of_too_much_is_refused(factories):
    pytest.importorskip("matplotlib")
    done = hpclr("spectrum", f"{factories}:planted", "--layers", "1", "--plot", "a.svg")
    assert done.code == 2
    assert "draws 1 to 200 layers, there are 0" in done.err
