"""Runs of GPT-2 whose head and embedding become low-rank together: saved, continued, verified, exported."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file as load_safetensors
from training_helpers import OIALR, Bench, as_killed_after, assert_same_run, hpclr, last_tree, summary
from windows_helpers import CONTEXT, language
from windows_helpers import the_text as the_text

pytest.importorskip("transformers")

from hpclr.models import Samples
from hpclr.training.evaluation import _load_weights, load_run
from hpclr.training.factored import load_factored
from hpclr.training.model import build_model

TIED = OIALR | {"tied": True, "layer_fraction": 1.0}
HEAD, TABLE = "net.lm_head", "net.transformer.wte"
FACTORS = ("u", "sigma", "vh")


def sections(text, **more):
    return language(text, method=TIED, train={"ema": 0.8}, **more)


@pytest.fixture(scope="module")
def reference(text, digits, tmp_path_factory):
    """A run that saved after every step: weights become low-rank after 6 of 13, and are cut after 9 and 12."""
    bench = Bench(tmp_path_factory.mktemp("reference"), digits)
    done = hpclr("train", bench.write(**sections(text, checkpoint={"every": 1, "keep": 100})), "--runs-dir", bench.path)
    assert done.code == 0, done.err
    return bench.path / "run"


def original(run):
    """The model as its class makes it, and the number of its tokens."""
    loaded, file = load_run(run)
    tokens = len(last_tree(run)["/data"]["classes"])
    return build_model(file, Samples("language", (CONTEXT,), (CONTEXT, tokens)), weights=False), loaded, file, tokens


def test_the_head_is_a_layer_and_the_embedding_shares_its_factors(reference):
    layers = {layer["name"]: layer for layer in summary(reference)["layers"]}
    assert layers[HEAD]["converted"]
    assert TABLE not in layers
    tree = last_tree(reference)
    k = layers[HEAD]["rank"]
    assert 1 < k < 16
    for name in FACTORS:
        assert torch.equal(tree[f"/model/{HEAD}.{name}"], tree[f"/model/{TABLE}.{name}"])
    assert tree["/tied"] == {f"{HEAD}.{name}": f"{TABLE}.{name}" for name in FACTORS}
    assert {HEAD, TABLE} <= tree["/layers"].keys()
    assert tree["/optimizer/state/" + TABLE + ".sigma/exp_avg"].shape == (k, k)
    sizes = summary(reference)["sizes"]
    assert sizes["dense"] == sum(p.numel() for p in original(reference)[0].parameters())


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 6, pytest.param(11, marks=pytest.mark.slow)])
def test_continued_to_the_bit(step, reference, text, bench):
    """Before the conversion, right after it, between two cuts."""
    as_killed_after(reference, step, bench.run)
    assert_same_run(reference, bench.train(checkpoint={"every": 1000}, **sections(text)))


def test_what_was_saved_is_good_and_can_be_scored(reference):
    last = max((reference / "checkpoints").glob("step-*.h5"))
    for command, found in (("verify", ": good"), ("inspect", HEAD), ("evaluate", "perplexity"), ("spectrum", HEAD)):
        done = hpclr(command, last)
        assert done.code == 0, done.err
        assert found in done.out


def test_other_programs_load_it_dense_and_factored(reference, tmp_path):
    model, loaded, file, tokens = original(reference)
    _load_weights(model, file, loaded)
    x = torch.randint(tokens, (3, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.eval()(x)

    assert hpclr("export", reference, tmp_path / "dense.safetensors").code == 0
    dense = original(reference)[0].eval()
    dense.load_state_dict(load_safetensors(tmp_path / "dense.safetensors"))
    assert dense.net.lm_head.weight is dense.net.transformer.wte.weight
    torch.testing.assert_close(dense(x), expected)

    assert hpclr("export", reference, tmp_path / "low.safetensors", "--factored").code == 0
    low = load_factored(original(reference)[0], tmp_path / "low.safetensors").eval()
    torch.testing.assert_close(low(x), expected)
    assert low.net.transformer.wte.forward.func.__name__ == "rows"
    with safe_open(tmp_path / "low.safetensors", "pt") as opened:
        assert {HEAD, TABLE} <= json.loads(opened.metadata()["layers"]).keys()


@pytest.mark.parametrize("options", [("--factored",), ()])
def test_at_a_lower_rank_too(options, reference, tmp_path):
    """There the two names are of one tensor in memory, of which safetensors knows nothing."""
    done = hpclr("export", reference, tmp_path / "low.safetensors", "--rank-fraction", "0.25", *options)
    assert done.code == 0, done.err
    state = load_safetensors(tmp_path / "low.safetensors")
    for name in FACTORS if options else ("weight",):
        assert torch.equal(state[f"{HEAD}.{name}"], state[f"{TABLE}.{name}"])


@pytest.mark.parametrize("method", ["dense", "tied"])
def test_what_has_two_names_counts_once(method, reference, text, bench):
    """As in the sizes of the run, which counts parameters."""
    run = reference
    if method == "dense":
        done = hpclr("train", bench.write(**sections(text) | {"method": {"name": "dense"}}))
        assert done.code == 0, done.err
        run = bench.path / "runs" / "run"
    sizes = summary(run)["sizes"]
    shown = hpclr("inspect", run).out
    assert f"{sizes['stored']:,}" in shown
    exported = hpclr("export", run, bench.path / "model.safetensors").out
    assert f"({sizes['dense']:,} numbers, factored {sizes['stored']:,})" in exported
    if method == "tied":
        cut = hpclr("export", run, bench.path / "cut.safetensors", "--rank-fraction", "0.5").out
        assert f"({sizes['dense']:,} numbers, factored " in cut
    spectrum = hpclr("spectrum", run).out
    assert f"tied: it is '{TABLE}" in " ".join(spectrum.split())


def test_a_run_may_begin_with_what_is_exported(reference, text, bench):
    """Factors are multiplied out, and both names may be there."""
    for options in ((), ("--factored",)):
        assert hpclr("export", reference, bench.path / "w.safetensors", "--force", *options).code == 0
        changes = language(text, method={"name": "dense"}, train={"steps": 1})
        bench.train("--fresh", **changes | {"model": changes["model"] | {"weights": str(bench.path / "w.safetensors")}})


def test_a_plan_knows_of_it(text, bench):
    plan = hpclr("plan", bench.write(**sections(text))).out
    assert "17 x 16" in plan.replace("×", "x")  # of as many tokens


def test_a_model_without_such_a_head_is_refused(bench):
    done = hpclr("train", bench.write(method=TIED))
    assert done.code == 2
    assert "method: tied=True, but no nn.Linear" in done.err
