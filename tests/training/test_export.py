"""`hpclr export`: other programs get the weights that the run is judged by, whole, or a reason why not."""

import errno
import hashlib
import json
import logging
import os
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file as load_safetensors
from training_helpers import OIALR, SVD, VIT, Bench, hpclr

from hpclr.checkpoint import CheckpointStore, Json, load_file
from hpclr.checkpoint.digest import write_sidecar
from hpclr.errors import HpclrError
from hpclr.lowrank.interchange import dense_state_dict
from hpclr.models import Samples
from hpclr.training import export
from hpclr.training.evaluation import _load_weights, load_run
from hpclr.training.export import _Weights, _write_safetensors, _write_torch, export_checkpoint
from hpclr.training.factored import load_factored
from hpclr.training.model import build_model
from hpclr.training.onnx_export import _quiet
from hpclr.training.stored_weights import stored_weights
from hpclr.training.written_files import written_whole

sys.path.append(str(Path(__file__).parents[1] / "docs"))
from documents import ROOT, blocks, commands, split

SAMPLES = Samples("classification", (1, 8, 8), (10,))
ALL = OIALR | {"max_aspect": 100.0, "keep_last": False, "layer_fraction": 1.0}
ALL_SVD = SVD | {"max_aspect": 100.0, "keep_last": False}
RUNS = {
    "mlp": {},
    "dense": {"method": {"name": "dense"}},
    "averaged": {"train": {"ema": 0.8}},
    "vit": {"model": VIT | {"pool": "cls"}, "method": ALL, "train": {"precision": "float64"}},
    "vgg": {"model": {"name": "vgg16", "width": 0.03}, "method": ALL, "train": {"steps": 4}},
    "resnet": {"model": {"name": "resnet20", "width": 2}, "method": ALL, "train": {"steps": 4}},
    "everything": {"model": {"target": "export_models:Everything"}, "method": ALL, "train": {"ema": 0.5}},
    "svd": {"model": {"target": "export_models:Everything"}, "method": ALL_SVD, "train": {"ema": 0.5}},
    "svd, spatial": {
        "model": {"target": "export_models:Everything"},
        "method": ALL_SVD | {"decomposition": "spatial"},
        "train": {"steps": 8},
    },
    "lazy": {"model": {"target": "export_models:lazy"}, "method": ALL},
    "branching": {"model": {"target": "export_models:Branching"}, "train": {"steps": 2}},
    "fixed": {"model": {"target": "export_models:Fixed"}, "train": {"steps": 2}},
}


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """Runs of the table above by name, each trained once."""

    @cache
    def run(name):
        if RUNS[name].get("model", {}).get("target") == "export_models:Everything":
            pytest.importorskip("transformers")
        bench = Bench(tmp_path_factory.mktemp(name), digits)
        done = hpclr("train", bench.write(**RUNS[name]), "--runs-dir", bench.path / "runs")
        assert done.code == 0, done.err
        return bench.run

    return run


def original(run):
    """The model as its class makes it, in evaluation mode."""
    _, file = load_run(run)
    model = build_model(file, SAMPLES, weights=False)
    if file.model.__class__.__name__ == "Target":
        model(torch.zeros(2, 1, 8, 8))  # lazy layers
    return model.double().eval()


def own_outputs(run, x):
    """What hpclr itself computes with the weights that the run is judged by, in float64."""
    loaded, file = load_run(run)
    model = original(run)
    _load_weights(model, file, loaded)
    with torch.no_grad():
        return model(x)


def samples(number=6):
    return torch.randn(number, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "name", ["mlp", "dense", "averaged", "vit", "resnet", "everything", "lazy", "vgg", "svd", "svd, spatial"]
)
def test_the_original_class_computes_the_same(name, trained, tmp_path):
    run, x = trained(name), samples()
    expected = own_outputs(run, x)

    export_checkpoint(run, tmp_path / "dense.safetensors", dtype="float64")
    dense, state = original(run), load_safetensors(tmp_path / "dense.safetensors")
    names = list(dense.state_dict())
    dense.load_state_dict(state, strict=True)
    assert (dense(x) - expected).abs().max() < 1e-9
    assert names == dense_names(run)

    export_checkpoint(run, tmp_path / "low.safetensors", factored=True)
    low = load_factored(original(run), tmp_path / "low.safetensors").eval()
    assert (low(x) - expected).abs().max() < 1e-9
    with safe_open(tmp_path / "low.safetensors", "pt") as file:
        layers = json.loads(file.metadata()["layers"])
    assert bool(layers) == (name != "dense")


def dense_names(run):
    """In the order of the checkpoint: a safetensors file has its own."""
    tree = load_run(run)[0].tree
    stored = stored_weights(tree, run)
    return list(dense_state_dict(stored.state, stored.layers))


def test_everything_was_factored(trained):
    layers = load_run(trained("everything"))[0].tree["layers"].value
    assert {"grouped", "attention.in_proj", "cross.k_proj", "expand", "one", "other"} <= layers.keys()
    assert "tied" not in layers
    assert layers["expand"]["transposed"]
    assert layers["grouped"]["shape"] == [8, 4, 3, 3]


def test_all_formats_hold_the_same(trained, tmp_path):
    run = trained("everything")
    for factored in (False, True):
        files = [tmp_path / f"{factored}{suffix}" for suffix in (".safetensors", ".pt", ".pth", ".h5")]
        for file in files:
            export_checkpoint(run, file, factored=factored)
        first, pt, pth, h5 = files
        expected = load_safetensors(first)
        content = torch.load(pt, weights_only=True)
        with safe_open(first, "pt") as file:
            layers = json.loads(file.metadata()["layers"])
        tree = load_file(h5).tree
        assert tree["layers"].value == layers
        assert bool(layers) == factored
        if factored:
            assert content["layers"] == layers
            content = content["state_dict"]
        for found in (content, tree["model"]):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected)
            assert {key: value.dtype for key, value in found.items()} == {k: v.dtype for k, v in expected.items()}
        assert content["norm.num_batches_tracked"].dtype == torch.int64
        assert pth.read_bytes()[:4] == b"PK\x03\x04"


def test_where_the_weights_come_from_is_noted(trained, tmp_path):
    run = trained("averaged")
    source = run / "checkpoints" / "step-00000013.h5"
    line = str(export_checkpoint(run, tmp_path / "a.safetensors"))
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        noted = file.metadata()
    assert noted["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert (noted["step"], noted["weights"], noted["format"]) == ("13", "averaged", "pt")
    state = load_safetensors(tmp_path / "a.safetensors")
    dense, factored = (sum(v.numel() for v in values.values()) for values in (state, load_run(run)[0].tree["model"]))
    size = (tmp_path / "a.safetensors").stat().st_size
    assert line == (
        f"{tmp_path / 'a.safetensors'}: dense averaged weights ({dense:,} numbers, factored {factored:,}) of step 13, "
        f"{size:,} bytes"
    )


def test_averages_are_taken_where_there_are_any_also_for_tied_weights(trained, tmp_path):
    run = trained("everything")
    tree = load_run(run)[0].tree
    export_checkpoint(run, tmp_path / "averaged.h5", factored=True)
    export_checkpoint(run, tmp_path / "own.h5", factored=True, average=False)
    averaged, own = (load_file(tmp_path / f"{name}.h5").tree["model"] for name in ("averaged", "own"))
    assert all(torch.equal(own[key], value) for key, value in tree["model"].items())
    for key, value in tree["ema"]["averages"].items():
        assert torch.equal(averaged[key], value)
    for alias, first in {"tied.weight": "up.weight", "other.sigma": "one.sigma", "other.bias": "one.bias"}.items():
        assert torch.equal(averaged[alias], averaged[first])
        assert not torch.equal(averaged[alias], own[alias])


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_types(name, dtype, trained, tmp_path):
    run = trained("resnet")
    export_checkpoint(run, tmp_path / "exact.safetensors", dtype="float64")
    export_checkpoint(run, tmp_path / "small.safetensors", dtype=name)
    exact, small = (load_safetensors(tmp_path / f"{file}.safetensors") for file in ("exact", "small"))
    for key, value in small.items():
        assert torch.equal(value, exact[key].to(dtype) if exact[key].is_floating_point() else exact[key]), key
    assert small["norm.num_batches_tracked"].dtype == torch.int64


def altered(run, directory, change):
    """A checkpoint that was changed and committed again."""
    loaded, _ = load_run(run)
    change(loaded.tree)
    return CheckpointStore(directory).save(loaded.step, loaded.tree)


def test_numbers_too_large_for_the_type(trained, tmp_path):
    def grow(tree):
        tree["model"]["head.weight"][3, 2] = 1e6

    source = altered(trained("mlp"), tmp_path / "big", grow)
    done = hpclr("export", source, tmp_path / "a.pt", "--dtype", "fp16")
    assert done.code == 2
    assert "'head.weight' holds numbers up to 1e+06, too large for float16" in done.err
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (lambda tree: tree.pop("layers"), ("holds factored layers (such as layers.", "an older hpclr has written it")),
        (lambda tree: tree.pop("model"), ("expected a checkpoint with an entry 'model'",)),
        (lambda tree: tree["model"].pop("layers.1.u"), ("layer 'layers.1'", "found shapes [None")),
        (lambda tree: tree.update(layers=Json([1])), ("layers: Expected `object`",)),
        (lambda tree: tree.update(layers=Json({"L": {"weight": 1}})), ("layers: ", "damaged or was not written")),
        (lambda tree: tree.update(tied=Json({"a": ["b"]})), ("tied: Expected `str`", "damaged or was not written")),
        (lambda tree: tree["ema"]["averages"].update(x=torch.ones(2)), ("the average of 'x' has shape (2,)",)),
        (
            lambda tree: tree["model"].update(phase=torch.ones(2, dtype=torch.complex128)),
            ("safetensors has no type torch.complex128",),
        ),
        (
            lambda tree: tree["ema"]["averages"].update({"head.bias": torch.ones(2)}),
            ("the average of 'head.bias' has shape (2,), the model shape (10,)",),
        ),
    ],
)
def test_checkpoints_that_do_not_say_enough(change, texts, trained, tmp_path):
    source = altered(trained("averaged"), tmp_path / "other", change)
    done = hpclr("export", source, tmp_path / "a.safetensors")
    assert done.code == 2, done.err
    assert all(text in done.err for text in texts), done.err
    assert "Traceback" not in done.err


def test_names_of_one_parameter_are_one_tensor_unless_somebody_changed_one(trained, tmp_path):
    tree = load_run(trained("everything"))[0].tree
    state = stored_weights(tree, tmp_path, average=False).state
    assert state["tied.weight"] is state["up.weight"]
    for change in (lambda value: value + 1, lambda value: value.double()):
        other = tree | {"model": tree["model"] | {"tied.weight": change(tree["model"]["tied.weight"])}}
        state = stored_weights(other, tmp_path, average=False).state
        assert torch.equal(state["tied.weight"], change(state["up.weight"]))
        assert state["tied.weight"].dtype == other["model"]["tied.weight"].dtype


def test_dense_weights_of_an_older_checkpoint(trained, tmp_path):
    source = altered(trained("dense"), tmp_path / "other", lambda tree: [tree.pop(key) for key in ("layers", "tied")])
    export_checkpoint(source, tmp_path / "a.safetensors")


def test_an_export_can_be_exported(trained, tmp_path):
    export_checkpoint(trained("vit"), tmp_path / "a.h5", factored=True)
    export_checkpoint(tmp_path / "a.h5", tmp_path / "b.safetensors")
    export_checkpoint(trained("vit"), tmp_path / "c.safetensors")
    b, c = load_safetensors(tmp_path / "b.safetensors"), load_safetensors(tmp_path / "c.safetensors")
    assert all(torch.equal(b[key], c[key]) for key in c)
    done = hpclr("export", tmp_path / "a.h5", tmp_path / "a.onnx")
    assert "it holds no data and no run, so the model cannot be built" in done.err


def test_places_that_are_refused(trained, tmp_path, monkeypatch):
    run = trained("mlp")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.pt").write_text("mine")
    (tmp_path / "folder.pt").mkdir()
    newest = run / "checkpoints" / "step-00000013.h5"
    copy = tmp_path / "copy.h5"
    copy.write_bytes(newest.read_bytes())
    copy.with_name("copy.h5.sha256").write_text(f"{hashlib.sha256(newest.read_bytes()).hexdigest()}  copy.h5\n")
    (tmp_path / "link.h5").symlink_to(copy)
    before = {path: path.read_bytes() for path in newest.parent.iterdir()}
    for arguments, text in {
        (run, "a.bin"): "expected one of .safetensors, .pt, .pth, .onnx, .h5, found '.bin'",
        (run, "a"): "found ''; choose another name, or say --format",
        (run, "there.pt"): "there.pt: it is there already; pass --force",
        (run, "folder.pt"): "expected the name of a file, it is a directory",
        (run, "no/a.pt"): "there is no directory no",
        (copy, "copy.h5", "--force"): "copy.h5: it is the checkpoint itself",
        (copy, "link.h5", "--force"): "link.h5: it is the checkpoint itself",
        (run, newest, "--force"): "it is the checkpoint itself",
        (run, newest.with_name("step-00000099.h5")): "lie the checkpoints of a run",
        (run, "/proc/a.pt"): "/proc/a.pt: it cannot be written",
        ("nowhere", "a.pt"): "nowhere: no such checkpoint file or run directory",
        (tmp_path / "there.pt", "a.pt"): "there.pt",
    }.items():
        done = hpclr("export", *arguments)
        assert done.code == 2, (arguments, done.err)
        assert text in done.err
    assert before == {path: path.read_bytes() for path in newest.parent.iterdir()}
    assert (tmp_path / "there.pt").read_text() == "mine"
    done = hpclr("export", run, "there.pt", "--force", "--best")
    assert done.code == 0, done.err
    assert "head.weight" in torch.load("there.pt", weights_only=True)
    assert hpclr("export", run, "weights.bin", "--format", "torch").code == 0


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".h5"])
def test_a_disk_that_is_full_leaves_the_old_file(suffix, trained, tmp_path):
    run, out = trained("mlp"), tmp_path / f"a{suffix}"
    export_checkpoint(run, out)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        done = hpclr("export", run, out, "--force", "--dtype", "float64")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.code == 2, done.err  # EFBIG: that limit stays
    assert f"{out}: it cannot be written" in done.err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_hdf5_export_has_its_digest_also_when_replaced(trained, tmp_path):
    out = tmp_path / "a.h5"
    for dtype in ("float32", "float64", "float64"):
        export_checkpoint(trained("mlp"), out, dtype=dtype, force=True)
        assert load_file(out).tree["model"]["head.bias"].dtype == getattr(torch, dtype)
        assert (tmp_path / "a.h5.sha256").read_text() == f"{hashlib.sha256(out.read_bytes()).hexdigest()}  a.h5\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "a.h5.sha256"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".h5"])
def test_a_full_disk_is_worth_another_try(suffix, trained, tmp_path):
    """Its own file system, of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount")
    try:
        (disk / "ballast").write_bytes(bytes(60_000))
        done = hpclr("export", trained("mlp"), disk / f"a{suffix}")
        assert [path.name for path in disk.iterdir()] == ["ballast"]
    finally:
        subprocess.run(["umount", disk], check=True)
    assert done.code == 75, done.err
    assert f"a{suffix}: it cannot be written: " in done.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 75),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 75),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), 75),
        (SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)"), 2),
        (SafetensorError("Error while serializing"), 2),
        (OSError(errno.EROFS, "Read-only file system"), 2),
    ],
    ids=str,
)
def test_what_is_worth_another_try(error, code, tmp_path):
    with pytest.raises(HpclrError, match=r"a\.pt: it cannot be written: ") as raised, written_whole(tmp_path / "a.pt"):
        raise error
    assert raised.value.exit_code == code


def test_only_a_regular_file_is_replaced(trained, tmp_path):
    os.mkfifo(tmp_path / "a.h5")
    (tmp_path / "b.h5").symlink_to("/dev/null")
    for name in ("a.h5", "b.h5"):
        done = hpclr("export", trained("mlp"), tmp_path / name, "--force")
        assert done.code == 2
        assert f"{name}: expected the name of a file, it is a device, a FIFO or a socket" in done.err
    assert (tmp_path / "a.h5").is_fifo()


@pytest.mark.parametrize("name", ["a\udcff.h5", "a\\n.h5", "a\nb.h5", "a\rb.h5", "a b'.h5"], ids=ascii)
def test_a_name_of_any_bytes(name, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = hpclr("export", trained("mlp"), name)
    assert done.code == 0, done.err
    done.out.encode()
    assert subprocess.run(["sha256sum", "-c", name + ".sha256"], check=False, capture_output=True).returncode == 0
    Path(name + ".sha256").write_bytes(subprocess.run(["sha256sum", name], check=True, capture_output=True).stdout)
    assert hpclr("verify", name).code == 0
    for out in ("out.safetensors", "out.h5"):
        done = hpclr("export", name, out)
        assert done.code == 0, done.err
    Path(name + ".sha256").unlink()
    done = hpclr("verify", name)
    assert done.code == 1
    done.out.encode()


def test_a_name_that_is_too_long(trained, tmp_path):
    done = hpclr("export", trained("mlp"), tmp_path / ("x" * 300 + ".h5"))
    assert done.code == 2
    assert "File name too long" in done.err
    assert "unexpected" not in done.err


def test_a_digest_goes_with_the_file_that_it_was_of(trained, tmp_path):
    out = tmp_path / "a.h5"
    export_checkpoint(trained("mlp"), out)
    export_checkpoint(trained("mlp"), out, format="torch", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


def test_a_checkpoint_without_its_digest(trained, tmp_path):
    newest = trained("mlp") / "checkpoints" / "step-00000013.h5"
    copy = tmp_path / "copy.h5"
    copy.write_bytes(newest.read_bytes())
    for command in (("inspect", copy), ("evaluate", copy), ("export", copy, tmp_path / "a.safetensors")):
        done = hpclr(*command)
        assert done.code == 2
        assert "`hpclr verify --without-digest`" in done.err
        assert "--untrusted" in done.err
        done = hpclr(*command, "--untrusted")
        assert done.code == 0, done.err
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["source_sha256"] == hashlib.sha256(copy.read_bytes()).hexdigest()
    copy.with_name("copy.h5.sha256").write_text(f"{'0' * 64}  copy.h5\n")
    assert hpclr("inspect", copy, "--untrusted").code == 2


def test_the_source_may_be_deleted_once_it_is_loaded(trained, tmp_path, monkeypatch):
    """As by the retention of training, which goes on meanwhile. While it is replaced it has two digests."""
    newest = trained("mlp") / "checkpoints" / "step-00000013.h5"
    digest = hashlib.sha256(newest.read_bytes()).hexdigest()
    for number, lines in enumerate(([digest], ["0" * 64, digest])):
        copy = tmp_path / f"copy-{number}.h5"
        copy.write_bytes(newest.read_bytes())
        write_sidecar(copy, *lines)

        def load_and_lose(path, **options):
            loaded = load_file(path, **options)
            path.unlink()
            return loaded

        monkeypatch.setattr(export, "load_file", load_and_lose)
        export_checkpoint(copy, tmp_path / "a.safetensors", force=True)
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            assert file.metadata()["source_sha256"] == digest


def test_no_model_is_imported_but_for_onnx_and_only_if_trusted(trained, tmp_path, monkeypatch):
    run = trained("lazy")
    monkeypatch.delitem(sys.modules, "export_models")
    for name in ("a.safetensors", "a.pt", "a.h5"):
        assert hpclr("export", run, tmp_path / name).code == 0
    done = hpclr("export", run, tmp_path / "a.onnx")
    assert done.code == 2
    assert "names the model 'export_models:lazy', which would be imported and run; pass --trust" in done.err
    assert "export_models" not in sys.modules
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize("write", [_write_torch, _write_safetensors])
def test_a_view_is_written_without_what_lies_behind_it(write, tmp_path):
    """A checkpoint may be read into one buffer, of which its tensors are parts."""
    buffer = torch.arange(100_000.0)
    write(tmp_path / "a", _Weights({"a": buffer[:10], "b": buffer[20:30]}, {}, None, {}, 0))
    assert (tmp_path / "a").stat().st_size < 5_000


# ONNX


def in_onnxruntime(file, x):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 1, 8, 8]
    return torch.from_numpy(session.run(["logits"], {"samples": x.numpy()})[0])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("averaged", ()),
        ("averaged", ("--factored",)),
        ("averaged", ("--dtype", "fp16")),
        ("lazy", ("--trust",)),
        pytest.param("everything", ("--trust",), marks=pytest.mark.slow),
        pytest.param("everything", ("--factored", "--trust"), marks=pytest.mark.slow),
        pytest.param("vit", ("--dtype", "float32"), marks=pytest.mark.slow),
        pytest.param("vit", ("--factored", "--dtype", "float32"), marks=pytest.mark.slow),
        pytest.param("vgg", ("--factored",), marks=pytest.mark.slow),
        pytest.param("resnet", (), marks=pytest.mark.slow),
    ],
    ids=lambda part: "".join(part),
)
def test_the_graph_computes_what_the_model_does(name, options, trained, tmp_path):
    pytest.importorskip("onnxscript")
    done = hpclr("export", trained(name), tmp_path / "a.onnx", *options)
    assert done.code == 0, done.err
    assert "onnxruntime differs by at most" in done.out
    assert done.err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]
    dtype = torch.float16 if "fp16" in options else torch.float32
    x = samples(5).to(dtype)
    found, expected = in_onnxruntime(tmp_path / "a.onnx", x), own_outputs(trained(name), x.double())
    assert found.dtype == dtype
    assert (found - expected).abs().max() < (0.02 if dtype == torch.float16 else 1e-4)


def test_a_factored_graph_holds_factors(trained, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    export_checkpoint(trained("averaged"), tmp_path / "a.onnx", factored=True)
    graph = onnx.load(tmp_path / "a.onnx")
    shapes = [list(value.dims) for value in graph.graph.initializer]
    sigma = load_run(trained("averaged"))[0].tree["model"]["layers.1.sigma"]
    assert list(sigma.shape) in shapes
    assert {entry.key: entry.value for entry in graph.metadata_props}["step"] == "13"


def test_what_cannot_become_a_graph(trained, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    for name, text in {
        "branching": "torch cannot export Branching to ONNX",
        "fixed": "torch can export Fixed for 2 samples at a time only",
    }.items():
        done = hpclr("export", trained(name), tmp_path / "a.onnx", "--trust")
        assert done.code == 2, done.err
        assert text in done.err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    done = hpclr("export", trained("mlp"), tmp_path / "a.onnx")
    assert done.code == 2
    assert "ONNX needs onnxscript, not found here: pip install 'hpclr[onnx]'" in done.err
    assert not list(tmp_path.iterdir())


def test_what_the_exporter_remarks_is_not_shown(caplog):
    """Such as on constants that it leaves alone, which depends on the model."""
    logger = logging.getLogger("onnxscript.optimizer._constant_folding")
    with _quiet():
        logger.warning("Skipping constant folding")
    assert caplog.messages == []
    logger.warning("not of an export")
    assert caplog.messages == ["not of an export"]


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("float64", marks=pytest.mark.slow)])
def test_what_onnxruntime_cannot_run_is_written_all_the_same(dtype, trained, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    done = hpclr("export", trained("vit" if dtype == "float64" else "mlp"), tmp_path / "a.onnx", "--dtype", dtype)
    assert done.code == 0, done.err
    assert "not compared: onnxruntime cannot run it here (" in done.out
    assert (tmp_path / "a.onnx").exists()


def test_without_onnxruntime_it_says_so(trained, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = hpclr("export", trained("mlp"), tmp_path / "a.onnx")
    assert done.code == 0
    assert "not compared: onnxruntime is not installed" in done.out


# The page


def test_the_page_does_what_it_says(trained, tmp_path, monkeypatch):
    """docs/export.md, its commands and programs one after the other, and its module without hpclr."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    page = ROOT / "docs" / "export.md"
    module, *programs = sorted(blocks(page, "python"), key=lambda block: block.file is None)
    assert module.text == (ROOT / "hpclr" / "training" / "factored.py").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("factored.py").write_text(module.text)
    run = trained("averaged")
    Path("runs").mkdir()
    Path("runs/digits").symlink_to(run)
    for line in commands(page):
        done = hpclr(*split(line)) if "CHECKPOINT" not in line else None
        assert done is None or done.code == 0, done.err
    _, file = load_run(run)
    x = samples().float()
    namespace = {"make_model": lambda: build_model(file, SAMPLES, weights=False).eval(), "samples": x}
    for block in programs:
        exec(compile(block.text, "export.md", "exec"), namespace)
    with torch.no_grad():
        expected = own_outputs(run, x.double())
        for outputs in (namespace["model"](x), namespace["low_rank"](x), torch.from_numpy(namespace["logits"])):
            assert (outputs - expected).abs().max() < 1e-6
    assert not [name for name in sys.modules["factored"].__dict__ if "hpclr" in name]
    namespace["make_model"]().load_state_dict(torch.load("half.pt", weights_only=True), strict=True)
