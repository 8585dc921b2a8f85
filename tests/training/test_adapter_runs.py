"""Runs with `method: {name: sara|mo_sara|edora|lora}`: resumed to the bit, on two processes, looked at, exported."""

import re
import warnings

import pytest
import torch
from process_helpers import FLOAT64, assert_same_result, the_tasks, the_team  # noqa: F401 - fixtures
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save_file
from training_helpers import VIT, as_killed_after, assert_same_run, hpclr, last_tree, summary

from hpclr import load_adapter, save_adapter
from hpclr.checkpoint import load_file, write_tree
from hpclr.checkpoint.digest import write_sidecar
from hpclr.config import load_run_file
from hpclr.errors import UsageError
from hpclr.lowrank.adapters import adapted_modules, merge_adapters
from hpclr.models import MLP
from hpclr.training.weights import read_weights

STRICT = {"timeout": 30, "verify_every": 1}
METHODS = {
    "sara": {"name": "sara", "proportion": 0.2},
    "mo_sara": {"name": "mo_sara", "proportion": 0.3, "experts": 3},
    "edora": {"name": "edora", "rank": 4, "alpha": 4},
    "lora": {"name": "lora", "rank": 2, "alpha": 4},
}
MERGEABLE = [name for name in METHODS if name != "mo_sara"]
DECAYING = {"name": "adamw", "lr": 0.02, "weight_decay": 0.1}


@pytest.fixture
def pretrained(bench) -> dict[str, object]:
    """A model section that begins with weights of an earlier run."""
    dense = bench.train(method={"name": "dense"}, train={"seed": 5})
    file = bench.path / "pretrained.safetensors"
    assert hpclr("export", dense, file).code == 0
    dense.rename(bench.path / "pretraining")
    return {"name": "mlp", "hidden": [32, 24], "weights": str(file)}


@pytest.mark.parametrize("name", METHODS)
def test_killed_anywhere_and_continued_to_the_bit(name, bench):
    sections = {"method": METHODS[name], "optimizer": DECAYING, "train": {"ema": 0.8}}
    if name == "lora":
        sections["method"] = METHODS[name] | {"dropout": 0.2}  # whose random numbers must go on too
    if name == "edora":
        sections |= {"model": VIT, "train": {"micro_batch": 24, "clip_norm": 0.5, "precision": "bf16"}}
    reference = bench.train(checkpoint={"every": 1, "keep": 100}, **sections).rename(bench.path / "reference")
    for step in (0, 5):
        as_killed_after(reference, step, bench.run)
        assert_same_run(reference, bench.train(checkpoint={"every": 1000}, **sections))
        bench.run.rename(bench.path / f"continued-{step}")


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_give_the_result_of_one(name, team):
    sections = {"train": FLOAT64, "parallel": STRICT, "method": METHODS[name], "optimizer": DECAYING}
    one = team.srun(1, **sections)
    assert one.ended() == [0], one.console
    one.run.rename(team.bench.path / "one")
    two = team.srun(2, **sections)
    assert two.ended() == [0, 0], two.console
    assert_same_result(team.bench.path / "one", two.run)
    a, b = (last_tree(run) for run in (team.bench.path / "one", two.run))
    assert all(torch.allclose(a[key], b[key], atol=1e-8) for key in a if key.startswith("/model/"))


@pytest.mark.parametrize("name", METHODS)
def test_everything_that_looks_at_a_checkpoint_knows_the_form(name, bench, pretrained):
    run = bench.train(method=METHODS[name], optimizer=DECAYING, model=pretrained)
    done = hpclr("verify", run)
    assert (done.code, "not good" in done.out) == (0, False), done
    score = hpclr("evaluate", run)
    assert score.code == 0, score.err
    assert f"{summary(run)['test']['accuracy']:.2%}" in score.out
    tree, found = last_tree(run), summary(run)
    sizes, before = found["sizes"], load_safetensors(pretrained["weights"])
    assert sizes["dense"] == sum(value.numel() for value in before.values())
    assert sizes["stored"] == sum(value.numel() for key, value in tree.items() if key.startswith("/model/"))
    trained = [name for group in tree["/optimizer/groups"] for name in group["params"]]
    assert sizes["trainable"] == sum(tree[f"/model/{name}"].numel() for name in trained)
    assert sizes["trainable"] < sizes["dense"]
    assert sizes["dense_flops"] < sizes["flops"]
    assert found["cost"]["dense_training_flops"] > 0
    inspected = hpclr("inspect", run).out
    assert "factored layers" not in inspected
    for layer in ("layers.1", "layers.4"):
        base = f"{layer}.base_layer" if name == "lora" else layer
        assert torch.equal(tree[f"/model/{base}.weight"], before[f"{layer}.weight"])  # to the bit
        assert f"{base}.weight" not in trained
        assert re.search(rf"{layer} .* {name} ", inspected)
    assert {"head.weight", "head.bias"} <= set(trained)
    assert hpclr("spectrum", run).code == (2 if name == "mo_sara" else 0)
    assert_undescribed_adapters_are_named(run)


def assert_undescribed_adapters_are_named(run):
    path = max((run / "checkpoints").glob("step-*.h5"))
    loaded = load_file(path)
    without = path.with_name("step-00000099.h5")
    write_sidecar(without, write_tree(without, {k: v for k, v in loaded.tree.items() if k != "adapters"}, {"step": 99}))
    said = hpclr("verify", without).out
    assert "expected a description of every adapter in 'adapters', found none of layers.1." in said
    assert "no factors" not in said
    done = hpclr("export", without, run / "a.safetensors")
    assert done.code == 2
    assert "expected a description of every adapter, found none of layers.1." in done.err


@pytest.mark.parametrize("name", MERGEABLE)
def test_the_dense_export_computes_the_same(name, bench, pretrained):
    run = bench.train(method=METHODS[name], optimizer=DECAYING, model=pretrained, train={"ema": 0.5})
    file = bench.path / "merged.safetensors"
    refused = hpclr("export", run, file, "--factored")
    assert refused.code == 2
    assert "--factored does not go with these" in refused.err
    done = hpclr("export", run, file)
    assert done.code == 0
    assert "merged averaged weights (" in done.out
    assert "factored" not in done.out
    checkpoint = max((run / "checkpoints").glob("step-*.h5"))
    found = read_weights(checkpoint, "")  # as for `model.weights`
    assert all(torch.equal(value, found[key]) for key, value in load_safetensors(file).items())
    merged, before = load_safetensors(file), load_safetensors(pretrained["weights"])
    assert merged.keys() == before.keys()
    assert not torch.equal(merged["layers.1.weight"], before["layers.1.weight"])
    dense = bench.train(
        "--fresh",
        method={"name": "dense"},
        model=pretrained | {"weights": str(file)},
        optimizer={"name": "sgd", "lr": 1e-12},
        train={"steps": 1},
    )
    assert summary(dense)["test"]["loss"] == pytest.approx(loss_before(bench), rel=1e-4)


def loss_before(bench):
    """Of the run whose directory `--fresh` has set aside."""
    (old,) = (path for path in bench.path.glob("runs/run.*") if path.is_dir())
    return summary(old)["test"]["loss"]


def test_what_cannot_be_merged_says_so(bench):
    run = bench.train(method=METHODS["mo_sara"])
    done = hpclr("export", run, bench.path / "a.safetensors")
    assert done.code == 2
    assert "cannot be merged" in done.err
    assert "--adapter" in done.err
    assert not (bench.path / "a.safetensors").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "h5"])
@pytest.mark.parametrize("name", ["sara", "mo_sara", "edora"])
def test_adapters_alone_give_the_model_back(name, suffix, bench, pretrained):
    run = bench.train(method=METHODS[name], optimizer=DECAYING, model=pretrained)
    file = bench.path / f"adapter.{suffix}"
    done = hpclr("export", run, file, "--adapter")
    assert done.code == 0, done.err
    tree = last_tree(run)
    model = MLP((1, 8, 8), 10, hidden=(32, 24))
    model.load_state_dict(load_safetensors(pretrained["weights"]))
    with warnings.catch_warnings(action="error"):
        load_adapter(model, file)
    state = model.state_dict()
    assert {f"/model/{key}" for key in state} == {key for key in tree if key.startswith("/model/")}
    assert all(torch.equal(value, tree[f"/model/{key}"]) for key, value in state.items())
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {
        key for group in tree["/optimizer/groups"] for key in group["params"]
    }
    begun = hpclr("train", bench.write(model=pretrained | {"weights": str(file)}), "name=other")
    assert begun.code == 2
    assert "it has an adapter, which is trained beside weights" in begun.err
    again = bench.path / f"again.{suffix}"
    save_adapter(model, again)
    other = MLP((1, 8, 8), 10, hidden=(32, 24))
    other.load_state_dict(load_safetensors(pretrained["weights"]))
    load_adapter(other, again)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    assert summary(run)["adapter_bytes"] == sum(
        p.nbytes for key, p in state.items() if not key.startswith("layers") or "_" in key
    )


def test_a_saved_adapter_is_that_of_the_unmerged_model(tmp_path):
    from hpclr import SARA

    model = MLP((1, 8, 8), 10, hidden=(32, 24))
    SARA(model, proportion=0.2)
    with torch.no_grad():
        for _, layer in adapted_modules(model):
            layer.sara_b.normal_()
    save_adapter(model, tmp_path / "a.safetensors")
    merge_adapters(model)
    save_adapter(model, tmp_path / "b.safetensors")
    a, b = (load_safetensors(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert all(torch.equal(a[key], b[key]) for key in a.keys() | b.keys())


def test_what_does_not_fit_is_named_and_changes_nothing(bench):
    run = bench.train(method=METHODS["sara"])
    file = bench.path / "adapter.safetensors"
    assert hpclr("export", run, file, "--adapter").code == 0
    model = MLP((1, 8, 8), 7, hidden=(32, 20))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UsageError) as raised:
        load_adapter(model, file)
    said = str(raised.value)
    assert "'head.weight' has shape (7, 20) in the model, (10, 24) in the file" in said
    assert "layer 'layers.4' has a weight of 20×32" in said  # whatever else does not fit
    assert "'head.bias'" in said
    assert model.state_dict().keys() == before.keys()
    other = MLP((1, 8, 8), 10, hidden=(32, 20))
    other.head = torch.nn.Linear(24, 10)
    with pytest.raises(UsageError, match=r"layer 'layers.4' has a weight of 20×32"):
        load_adapter(other, file)
    changed = load_safetensors(file) | {"layers.1.weight": torch.zeros(32, 64)}
    save_file(changed, bench.path / "changed.safetensors")
    same = MLP((1, 8, 8), 10, hidden=(32, 24))
    with pytest.raises(UsageError, match=r"'layers.1.weight' is a weight under an adapter"):
        load_adapter(same, bench.path / "changed.safetensors")
    for path, content in {"x.h5": b"nonsense", "y.safetensors": b"nonsense", "z.pt": b""}.items():
        (bench.path / path).write_bytes(content)
        with pytest.raises(UsageError):
            load_adapter(model, bench.path / path)
    dense = bench.path / "dense.safetensors"
    assert hpclr("export", run, dense).code == 0
    with pytest.raises(UsageError, match="expected a file of an adapter"):
        load_adapter(model, dense)
    with pytest.raises(UsageError, match="there is no such file"):
        load_adapter(model, bench.path / "none.h5")


@pytest.mark.parametrize("arguments", [["--adapter", "--format", "torch"], ["--adapter", "--trust"]])
def test_options_that_do_not_go_with_adapters(arguments, bench):
    run = bench.train(method=METHODS["sara"])
    assert hpclr("export", run, bench.path / "a.h5", *arguments).code == 2
    assert hpclr("export", run, bench.path / "a.pt", "--adapter").code == 2
    dense = bench.train("--fresh", method={"name": "dense"})
    done = hpclr("export", dense, bench.path / "a.h5", "--adapter")
    assert done.code == 2
    assert "it has no adapters" in done.err


def test_the_run_file_is_kept_whole(bench):
    run = bench.train(method=METHODS["edora"] | {"train": ["layers.1.bias"]})
    assert load_run_file(run / "run.yaml").method.rank == 4
    groups = last_tree(run)["/optimizer/groups"]
    assert "layers.1.bias" in groups[0]["params"]
    assert "layers.4.bias" not in groups[0]["params"]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "sara"}, "method.proportion"),
        ({"name": "sara", "proportion": 2}, "method.proportion"),
        ({"name": "edora", "rank": 0}, "method.rank"),
        ({"name": "edora", "rank": 1000}, "too small for rank 1000"),
        ({"name": "lora", "dropout": 1}, "method.dropout"),
        ({"name": "sara", "proportion": 0.1, "train": ["none"]}, "matches no parameter"),
    ],
)
def test_what_is_wrong_in_a_run_file(method, said, bench):
    done = hpclr("train", bench.write(method=method))
    assert done.code == 2
    assert said in done.err
    assert not bench.run.exists()
