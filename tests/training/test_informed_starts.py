"""`model.init: svd`: runs that start as the best linear map of their data, or as the best factors for it."""

import json

import pytest
import torch
from process_helpers import the_tasks, the_team, weights  # noqa: F401 - two are fixtures
from training_helpers import VIT, as_killed_after, assert_same_run, hpclr, run_file
from windows_helpers import forecasting, the_series  # noqa: F401 - a fixture

from hpclr.config import load_run_file
from hpclr.lowrank import select
from hpclr.training.assembly import Assembly, assemble
from hpclr.training.informed import targets

STILL = {"name": "sgd", "lr": 1e-60}  # which is 0 in float32
FIXED = {"name": "fixed_rank", "rank": 0.25, "keep_last": False}
INFORMED = {"name": "mlp", "hidden": [32, 24], "init": "svd"}


def assembled(bench, **sections) -> Assembly:
    return assemble(load_run_file(bench.write(**sections)))


def pairs(parts: Assembly) -> tuple[torch.Tensor, torch.Tensor]:
    """The training split, inputs flattened, and what a linear map is to give."""
    parts.loader.order = None
    batches = [parts.loader.batch(0, index) for index in range(len(parts.loader))]
    outputs = torch.Size(parts.model.outputs).numel() if hasattr(parts.model, "outputs") else 10
    x, y = ([one(batch) for batch in batches] for one in (lambda b: b.x, lambda b: targets(b, outputs).double()))
    return torch.cat(x), torch.cat(y)


def linear_optimum(x: torch.Tensor, y: torch.Tensor, rank: int) -> float:
    """The least mean square error, an output, of an affine map of this rank: by projecting the fitted values."""
    x, y = (part.flatten(1).double() - part.flatten(1).double().mean(0) for part in (x, y))
    a, b, _ = torch.linalg.svd(x, full_matrices=False)
    a = a[:, b > 1.1e-7 * b[0]]  # what is smaller does not show in the squares
    fitted = a @ (a.T @ y)
    u, s, vh = torch.linalg.svd(fitted, full_matrices=False)
    return float(((u[:, :rank] * s[:rank]) @ vh[:rank] - y).square().mean())


@torch.no_grad()
def start_loss(parts: Assembly) -> float:
    x, y = pairs(parts)
    return float((parts.model.eval()(x).flatten(1).double() - y).square().mean())


def series_run(series, hidden, activation="relu", ridge=0.0, scale=10.0, **more):
    init = {"name": "svd", "ridge": ridge, "scale": scale}
    model = {"name": "mlp", "hidden": hidden, "activation": activation, "init": init}
    more = {"method": {"name": "dense"}} | more
    return forecasting(series, model=model, **more) | {"train": {"precision": "float64", "threads": 1, "steps": 2}}


@pytest.mark.parametrize(
    ("activation", "hidden", "rank"),
    [("relu", [64], 12), ("gelu", [10, 40], 5), ("relu", [], 12)],
)
def test_a_forecast_starts_at_the_linear_optimum(bench, series, activation, hidden, rank):
    parts = assembled(bench, **series_run(series, hidden, activation))
    assert start_loss(parts) == pytest.approx(linear_optimum(*pairs(parts), rank), rel=1e-6)


def test_with_tanh_it_is_above_the_optimum_by_the_square_of_the_scale(bench, series):
    above = []
    for scale in (40.0, 80.0):
        parts = assembled(bench, **series_run(series, [6], "tanh", scale=scale))
        above.append(abs(start_loss(parts) - linear_optimum(*pairs(parts), 6)))
    assert 3.5 < above[0] / above[1] < 4.5


def test_classes_start_with_the_logits_that_no_other_factor_makes_better(bench):
    parts = assembled(bench, model=INFORMED)
    x, y = pairs(parts)
    with torch.no_grad():
        logits = parts.model.eval()(x).double()
    loss, less, more = (
        float(torch.nn.functional.cross_entropy(factor * logits, y.argmax(1))) for factor in (1, 0.98, 1.02)
    )
    assert loss < min(less, more)
    assert float((logits.argmax(1) == y.argmax(1)).double().mean()) > 0.95
    hidden = parts.model.layers[1].weight
    assert torch.equal(hidden[:9], -hidden[9:18])  # nine values in pairs of units; ten targets sum to 1


def test_factors_of_a_fixed_rank_start_at_the_optimum_of_that_rank(bench, series):
    parts = assembled(bench, **series_run(series, [64, 48], method=FIXED))
    assert parts.method.ranks == {"layers.1": 12, "layers.4": 12, "head": 3}
    assert start_loss(parts) == pytest.approx(linear_optimum(*pairs(parts), 3), rel=1e-6)


@pytest.mark.parametrize(
    "method", [FIXED, {"name": "nested", "delay": 0, "fractions": [0.25, 0.1], "keep_last": False}]
)
def test_factors_of_other_models_are_the_best_for_their_inputs(bench, method):
    """The first layer, whose inputs are the data: its outputs are nearer to those of the dense one than they were."""
    dense = assembled(bench, model=VIT, method={"name": "dense"})
    informed, plain = (assembled(bench, model=VIT | {"init": init}, method=method) for init in ("svd", None))
    x, _ = pairs(dense)
    path = next(site.path for site in select(plain.model).candidates if site.is_lowrank)
    wanted, near, far = (outputs_of(parts.model.eval(), path, x) for parts in (dense, informed, plain))
    assert float((near - wanted).norm()) < 0.9 * float((far - wanted).norm())


@torch.no_grad()
def outputs_of(model, path, x):
    seen = []
    hook = model.get_submodule(path).register_forward_hook(lambda module, inputs, outputs: seen.append(outputs))
    model(x)
    hook.remove()
    return seen[0]


def test_a_sample_of_the_first_epoch_s_order_is_enough(bench):
    some, all_, other = (
        assembled(bench, model=INFORMED | {"init": {"name": "svd", "samples": samples}}, train={"seed": seed})
        for samples, seed in ((100, 0), (10**6, 0), (100, 1))
    )
    first = [parts.model.layers[1].weight[:18] for parts in (some, all_, other)]
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    again = assembled(bench, model=INFORMED | {"init": {"name": "svd", "samples": 100}})
    assert torch.equal(again.model.layers[1].weight[:18], first[0])


def test_two_processes_start_as_one_to_the_bit(team):
    sections = {"model": INFORMED, "optimizer": STILL, "method": FIXED, "train": {"steps": 1, "threads": 1}}
    one = team.bench.train(**sections).rename(team.bench.path / "one")
    started = team.srun(2, **sections)
    assert started.ended() == [0] * 2, started.console
    assert started.console.count("starts as the best linear map") == 1
    before, now = weights(one), weights(started.run)
    assert before.keys() == now.keys()
    assert all(torch.equal(before[name], now[name]) for name in before)


def test_a_continued_run_does_not_start_again(bench):
    sections = {"model": INFORMED, "checkpoint": {"every": 5, "keep": 100}}
    reference = bench.path / "reference"
    bench.train(**sections).rename(reference)
    as_killed_after(reference, 5, bench.run)
    done = hpclr("train", bench.write(**sections))
    assert done.code == 0, done.err
    assert "starts as" not in done.err
    assert_same_run(reference, bench.run)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": VIT | {"init": "svd"}}, "model.init: svd has no meaning here: of vit"),
        ({"model": INFORMED | {"hidden": [1]}}, "in 2 hidden units"),
        ({"model": INFORMED, "method": FIXED | {"init": "random"}}, "method.init: random replaces"),
        ({"model": INFORMED | {"init": "pca"}}, "model.init must be svd"),
        ({"model": INFORMED | {"init": {"ridge": -1}}}, "model.init.ridge must be"),
    ],
)
def test_runs_in_which_it_has_no_meaning_are_refused(bench, sections, words):
    done = hpclr("train", bench.write(**sections))
    assert done.code == 2
    assert words in done.err
    assert not bench.run.exists()


def test_weights_of_a_file_are_not_replaced(bench):
    run = bench.train(model={"name": "mlp", "hidden": [32, 24]}, method={"name": "dense"})
    model = INFORMED | {"weights": str(max((run / "checkpoints").glob("*.h5")))}
    done = hpclr("train", bench.write(model=model, name="next"), "name=next")
    assert done.code == 2
    assert "replace the weights of model.weights" in done.err
    parts = assembled(bench, model=model, method=FIXED, name="next")
    assert set(parts.method.ranks) == {"layers.1", "layers.4", "head"}


def test_a_sample_too_wide_is_refused(bench, monkeypatch):
    monkeypatch.setattr("hpclr.training.informed.LARGEST", 70)
    done = hpclr("train", bench.write(model=INFORMED))
    assert done.code == 2
    assert "10 outputs on 64 inputs is too large; it takes up to 70" in done.err


def test_the_run_file_keeps_what_was_asked(bench):
    assert run_file(bench.digits, model=INFORMED)["model"]["init"] == "svd"
    run = bench.train(model=INFORMED)
    again = hpclr("train", bench.path / "run.yaml", "model.init=null")
    assert again.code == 2
    assert "model.init" in again.err
    assert json.loads((run / "summary.json").read_text())["test"]["accuracy"] > 0.85
