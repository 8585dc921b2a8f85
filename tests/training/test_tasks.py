"""Losses and metrics of forecasting and text: equal to sums written out, in runs, on one process and on several."""

import io
import json
import math
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import h5py
import pytest
import torch
from process_helpers import (  # noqa: F401 - the_tasks and the_team are fixtures
    FLOAT64,
    assert_same_result,
    the_tasks,
    the_team,
)
from rich.console import Console
from safetensors.torch import load_file as load_safetensors
from test_bad_input import refused
from training_helpers import SVD, as_killed_after, assert_same_run, hpclr, last_tree, records, run_file, summary
from windows_helpers import (  # noqa: F401 - the_series and the_text are fixtures
    CONTEXT,
    GPT2,
    HORIZON,
    PATCHTST,
    forecasting,
    language,
    literal_tokens,
    literal_windows,
    the_series,
    the_text,
)

from hpclr import models
from hpclr.checkpoint import CheckpointStore, Json
from hpclr.cluster.sweep.files import Point
from hpclr.cluster.sweep.points import Sweep
from hpclr.cluster.sweep.results import Results
from hpclr.cluster.sweep.standing import Standing
from hpclr.config import parse_run_file
from hpclr.data import Batch
from hpclr.models import Samples
from hpclr.training.state import position_of
from hpclr.training.tasks import Forecasting, NextToken

ROOT = Path(__file__).parents[2]
STEPS = 13
LAYER = PATCHTST | {"norm": "layer", "dropout": 0.0}  # gives the same on any number of processes

# A forecast that repeats the last row, shifted by a trained number; logits that depend on the last token alone.
KNOWN = """
import torch
from torch import nn

class Last(nn.Module):
    def __init__(self, horizon):
        super().__init__()
        self.horizon, self.shift = horizon, nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x[:, -1:].expand(-1, self.horizon, -1) + self.shift

class Table(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        angles = torch.arange(vocabulary * vocabulary, dtype=torch.float64)
        self.table = nn.Parameter((3 * torch.sin(angles)).reshape(vocabulary, vocabulary))

    def forward(self, x):
        return self.table[x]

class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x.flatten(1) @ torch.zeros(x[0].numel(), 3)
"""
STILL = {"method": {"name": "dense"}, "optimizer": {"name": "sgd", "lr": 1e-300}, "train": FLOAT64 | {"steps": 2}}


@pytest.fixture
def known(bench, monkeypatch):
    (bench.path / "known.py").write_text(KNOWN)
    monkeypatch.syspath_prepend(bench.path)
    yield bench
    sys.modules.pop("known", None)


def test_forecasts_are_scored_as_in_the_literature(known, series):
    model = {"target": "known:Last", "args": {"horizon": HORIZON}}
    run = known.train(**forecasting(series, model=model, **STILL))
    for split, found in (("test", summary(run)["test"]), ("valid", records(run, "valid")[-1])):
        windows = literal_windows(split)
        errors = [row[c] - past[-1][c] for past, future in windows for row in future for c in range(3)]
        assert len(errors) == len(windows) * HORIZON * 3
        assert found["loss"] == found["mse"] == pytest.approx(sum(e * e for e in errors) / len(errors), rel=1e-6)
        assert found["mae"] == pytest.approx(sum(map(abs, errors)) / len(errors), rel=1e-6)
    assert summary(run)["test"]["samples"] == len(literal_windows("test")) == 45


def test_next_tokens_are_scored_as_written_out(known, text):
    _, vocabulary = literal_tokens("test")
    size = len(vocabulary)
    model = {"target": "known:Table", "args": {"vocabulary": size}}
    run = known.train(**language(text, model=model, **STILL))
    tokens, _ = literal_tokens("test")
    windows = (len(tokens) - 1) // CONTEXT
    losses, right = [], 0
    for now, following in pairwise(tokens[: windows * CONTEXT + 1]):
        row = [3 * math.sin(now * size + j) for j in range(size)]
        losses.append(math.log(sum(map(math.exp, row))) - row[following])
        right += row[following] == max(row)
    found = summary(run)["test"]
    assert found["samples"] == windows
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-9)
    assert found["accuracy"] == pytest.approx(right / len(losses), rel=1e-12)


def test_training_losses_are_means_over_everything_predicted():
    g = torch.Generator().manual_seed(0)
    indices = torch.arange(3)
    outputs, y = torch.randn(3, 4, 2, generator=g), torch.randn(3, 4, 2, generator=g)
    loss = Forecasting().loss(outputs.bfloat16(), Batch(y, y, indices))
    expected = [(a - b) ** 2 for a, b in zip(outputs.bfloat16().flatten().tolist(), y.flatten().tolist(), strict=True)]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(sum(expected) / 24)

    logits, tokens = torch.randn(3, 4, 5, generator=g), torch.randint(5, (3, 4), generator=g)
    smoothing, losses = 0.2, []
    for row, token in zip(logits.double().flatten(0, 1).tolist(), tokens.flatten().tolist(), strict=True):
        logs = [value - math.log(sum(map(math.exp, row))) for value in row]
        losses.append(-(1 - smoothing) * logs[token] - smoothing * sum(logs) / 5)
    loss = NextToken(smoothing).loss(logits.double(), Batch(tokens, tokens, indices))
    assert loss.item() == pytest.approx(sum(losses) / 12)
    assert NextToken().loss(logits.half(), Batch(tokens, tokens, indices)).dtype == torch.float32


def shown_score(found):
    if "mse" in found:
        return f"mse {found['mse']:.4f}, mae {found['mae']:.4f}"
    return f"perplexity {found['perplexity']:.3f}, accuracy {found['accuracy']:.2%}, loss {found['loss']:.4f}"


@pytest.mark.parametrize("task", ["forecasting", "language"])
def test_a_run_speaks_of_its_own_metrics_only(task, bench, series, text, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    sections = forecasting(series) if task == "forecasting" else language(text)
    file = bench.write(**sections)
    done = hpclr("train", file)
    assert done.code == 0, done.err
    found, (last, *_) = summary(bench.run), records(bench.run, "valid")[::-1]
    names = {"loss", "mse", "mae"} if task == "forecasting" else {"loss", "perplexity", "accuracy"}
    assert found["task"] == task
    assert found["test"].keys() == names | {"samples"}
    assert last.keys() >= names
    best = min(records(bench.run, "valid"), key=lambda record: record["loss"])
    assert found["best_validation"] == {name: best[name] for name in (*names, "step")}
    assert f"step {STEPS}: validation {shown_score(last)}\n" in done.err

    score = hpclr("evaluate", bench.run)
    assert score.code == 0, score.err
    assert f": test {shown_score(found['test'])}, {found['test']['samples']} samples" in score.out
    shown = [done, score, *(hpclr(command, bench.run) for command in ("summary", "inspect", "status"))]
    assert all(each.code == 0 for each in shown), shown
    assert f"{shown_score(best)} at step {best['step']}" in shown[3].out
    if task == "forecasting":
        assert not any("accuracy" in each.out + each.err for each in shown)
    rows = dict(re.findall(r"│ (test \w+) +│ +(\S+) +│", shown[2].out))
    assert rows.keys() == {f"test {name}" for name in names - {"loss"}}


def rescaled(path: Path, source: Path) -> Path:
    """The same splits in a file whose own training rows have another mean and spread."""
    shutil.copy(source, path)
    with h5py.File(path, "a") as file:
        del file.attrs["checked"], file.attrs["digest"]
        file["mean"][...] += 3.0
        file["std"][...] *= 2.0
    return path


@pytest.mark.parametrize("task", ["forecasting", "classification"])
def test_other_data_is_scored_in_the_units_of_the_training(task, bench, series):
    sections, source = (forecasting(series), series) if task == "forecasting" else ({}, bench.digits)
    run = bench.train(**sections)
    other, expected = rescaled(bench.path / "other.h5", source), summary(run)["test"]
    score = hpclr("evaluate", run, "--data", other)
    assert score.code == 0, score.err
    shown = shown_score(expected) if task == "forecasting" else f"{expected['accuracy']:.2%}"
    assert shown in score.out

    store = CheckpointStore(run / "checkpoints")
    tree = dict(store.load(STEPS).tree)
    facts = tree["data"].value
    early = {key: value for key, value in facts.items() if key not in ("mean", "std")}
    CheckpointStore(bench.path / "early").save(STEPS, tree | {"data": Json(early)})
    before = hpclr("evaluate", bench.path / "early", "--data", other)
    assert before.code == 0, before.err  # by the file itself, as that version did
    assert shown not in before.out
    for number, bad in enumerate(([1.0] * 99, "x", [0.0] * len(facts["std"]))):
        CheckpointStore(bench.path / f"bad-{number}").save(STEPS, tree | {"data": Json(facts | {"std": bad})})
        assert "is malformed" in hpclr("evaluate", bench.path / f"bad-{number}", "--data", other).err


def test_the_metric_that_judges(bench, series):
    run = bench.train(**forecasting(series, validation={"metric": "mae", "every_steps": 2}, checkpoint={"every": 50}))
    best = min(records(run, "valid"), key=lambda record: record["mae"])
    noted = json.loads((run / "checkpoints" / "best.json").read_text())
    assert (noted["step"], noted["metric"]) == (best["step"], best["mae"])


def test_a_sweep_is_ordered_by_the_metric_of_the_task(series):
    def points(**validation):
        text = json.dumps(run_file(series, **forecasting(series, validation=validation)))
        return [Point(parse_run_file(text, "run.yaml", [f"name=r{mae}"]), {}) for mae in (0.5, 0.2)]

    def shown(points):
        test = {point.name: {"loss": 0.1, "mse": 0.1, "mae": float(point.name[1:])} for point in points}
        standings = {name: Standing("finished", False, 13, {"test": score}) for name, score in test.items()}
        out = io.StringIO()
        Results(Sweep("sweep", tuple(points)), standings).show(Console(file=out, width=200))
        return out.getvalue()

    table = shown(points(metric="mae"))
    assert table.index("0.2000") < table.index("0.5000")
    assert re.search(r"test\s.*\n.*mae", table)
    assert "accuracy" not in shown(points())


CASES = {
    "forecasting": {"train": {"ema": 0.9, "precision": "bf16"}, "data": {"stride": 3, "batch_size": 9}},
    "language": {"train": {"micro_batch": 20, "label_smoothing": 0.1}, "model": GPT2 | {"dropout": 0.1}},
    "forecasting with SVD training": {"method": SVD, "train": {"clip_norm": 1.0}},
    "language with SVD training": {"method": SVD, "train": {"ema": 0.9, "precision": "bf16"}},
}
slow = pytest.mark.slow


@pytest.mark.parametrize("case", [pytest.param(case, marks=slow if "SVD" in case else ()) for case in CASES])
def test_killed_anywhere_and_continued_to_the_bit(case, bench, series, text):
    make = forecasting if "forecasting" in case else language
    sections = make(series if make is forecasting else text, **CASES[case])
    reference = bench.train(checkpoint={"every": 1, "keep": 100}, **sections).rename(bench.path / "reference")
    for step in (3, 6):
        as_killed_after(reference, step, bench.run)
        assert_same_run(reference, bench.train(checkpoint={"every": 1000}, **sections))
        bench.run.rename(bench.path / f"continued-{step}")


@pytest.mark.parametrize(
    ("task", "sections", "size", "micro_batch"),
    [
        ("forecasting", {"model": {"name": "mlp", "hidden": [24, 16]}}, 3, None),
        ("language", {}, 2, 4),
        pytest.param("language", {}, 3, None, marks=slow),
        pytest.param("forecasting", {"model": LAYER, "data": {"stride": 2, "batch_size": 12}}, 2, 4, marks=slow),
        pytest.param("forecasting", {"model": LAYER, "method": SVD}, 3, None, marks=slow),
        pytest.param("language", {"method": SVD}, 2, 4, marks=slow),
    ],
)
def test_processes_and_pieces_change_rounding_only(task, sections, size, micro_batch, team, series, text):
    sections = forecasting(series, **sections) if task == "forecasting" else language(text, **sections)
    sections |= {"parallel": {"timeout": 30, "verify_every": 1}}
    one = team.srun(1, **sections, train=FLOAT64)
    assert one.ended() == [0], one.console
    alone = one.run.rename(team.bench.path / "one")
    many = team.srun(size, **sections, train=FLOAT64 | {"micro_batch": micro_batch})
    assert many.ended() == [0] * size, many.console
    assert_same_result(alone, many.run)
    assert summary(many.run)["test"] == pytest.approx(summary(alone)["test"], abs=1e-8)


@slow
def test_two_processes_killed_and_continued_to_the_bit(team, series):
    """With batch statistics and dropout."""
    sections = forecasting(series, parallel={"timeout": 30, "verify_every": 1})
    reference = team.srun(2, **sections, checkpoint={"every": 1, "keep": 100})
    assert reference.ended() == [0, 0], reference.console
    kept = reference.run.rename(team.bench.path / "reference")
    as_killed_after(kept, 7, team.bench.run)
    last = team.srun(2, **sections)
    assert last.ended() == [0, 0], last.console
    assert_same_run(kept, last.run)


@pytest.mark.parametrize("method", [None, pytest.param(SVD, marks=slow)], ids=["oialr", "svd_training"])
def test_layers_of_both_models_become_low_rank(method, bench, series, text):
    changes = {} if method is None else {"method": method}
    found = summary(bench.train(**forecasting(series, **changes)))
    converted = {layer["name"] for layer in found["layers"] if layer["converted"]}
    stem = "net.model.encoder.layers.0"
    assert converted >= {f"{stem}.self_attn.{name}_proj" for name in ("q", "k", "v", "out")} | {f"{stem}.ff.0"}
    assert 0 < found["sizes"]["flops"] != found["sizes"]["dense_flops"]

    found = summary(bench.train("--fresh", **language(text, **changes)))
    names = {layer["name"] for layer in found["layers"] if layer["converted"]}
    stem = "net.transformer.h.0"
    assert names >= {f"{stem}.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert not any("wte" in name or "lm_head" in name for name in names)
    assert 0 < found["sizes"]["flops"] != found["sizes"]["dense_flops"]
    assert last_tree(bench.run)["/tied"] == {"net.lm_head.weight": "net.transformer.wte.weight"}


def test_the_simple_baseline_of_forecasting_learns(bench, series):
    run = bench.train(**forecasting(series, model={"name": "mlp", "hidden": [64]}, train={"steps": 60}))
    losses = [record["loss"] for record in records(run, "train")]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("job", ["appliances-patchtst", "text-gpt2"])
def test_the_examples_of_the_jobs_train(job, bench, series, text):
    path, horizon = (text, "null") if "text" in job else (series, 4)
    changes = [f"data.path={json.dumps(str(path))}", "data.context=24", f"data.horizon={horizon}", "data.batch_size=8"]
    done = hpclr("train", ROOT / "jobs" / f"{job}.yaml", *changes, "train.steps=8", "train.threads=1")
    assert done.code == 0, done.err
    assert len(records(bench.path / "runs" / job, "check")[-1]["ranks"]) >= 12


def rebuilt(bench, task: str) -> tuple[torch.nn.Module, Samples]:
    """The model of a run, dense, with the weights that `hpclr export` gives."""
    done = hpclr("export", bench.run, bench.path / "out.safetensors")
    assert done.code == 0, done.err
    if task == "forecasting":
        samples, options = Samples(task, (CONTEXT, 3), (HORIZON, 3)), dict(PATCHTST)
    else:
        samples, options = Samples(task, (CONTEXT,), (CONTEXT, len(literal_tokens("test")[1]))), dict(GPT2)
    model = models.build(options.pop("name"), samples, **options)
    missing, unexpected = model.load_state_dict(load_safetensors(bench.path / "out.safetensors"), strict=False)
    assert not missing
    assert not unexpected
    return model.eval(), samples


@pytest.mark.parametrize("task", ["forecasting", "language"])
def test_exported_weights_give_the_scores_of_the_run(task, bench, series, text):
    bench.train(**(forecasting(series) if task == "forecasting" else language(text)))
    model, samples = rebuilt(bench, task)
    test = summary(bench.run)["test"]
    if task == "forecasting":
        x, y = (torch.tensor(part) for part in zip(*literal_windows("test"), strict=True))
        assert torch.mean((model(x) - y) ** 2).item() == pytest.approx(test["mse"], rel=1e-4)
    else:
        tokens, _ = literal_tokens("test")
        windows = torch.tensor(tokens).unfold(0, CONTEXT + 1, CONTEXT)
        logits = model(windows[:, :-1])
        assert (logits.argmax(2) == windows[:, 1:]).double().mean().item() == pytest.approx(test["accuracy"], abs=1e-3)
        assert logits[0].shape == samples.outputs


@slow
@pytest.mark.parametrize("task", ["forecasting", "language"])
def test_onnx_computes_what_the_model_does(task, bench, series, text):
    bench.train(**(forecasting(series) if task == "forecasting" else language(text)))
    done = hpclr("export", bench.run, bench.path / "out.onnx")
    assert done.code == 0, done.err
    assert "onnxruntime differs by at most" in done.out


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "sections", "texts"),
    [
        (
            "forecasting",
            {"data": {"horizon": None}},
            ("data.horizon is missing", "holds a time series", "data.context"),
        ),
        ("forecasting", {"data": {"context": None}}, ("data.context is missing", "and data.horizon")),
        ("forecasting", {"train": {"label_smoothing": 0.1}}, ("train.label_smoothing is 0.1", "means nothing")),
        ("forecasting", {"data": {"mixup": 0.2}}, ("mixup", "for pictures")),
        ("forecasting", {"data": {"flip": True}}, ("flip", "for pictures")),
        ("forecasting", {"data": {"context": 200}}, ("200", "204", "168")),
        ("forecasting", {"validation": {"metric": "accuracy"}}, ("validation.metric is accuracy", "mse and mae")),
        ("forecasting", {"model": GPT2}, ("gpt2 is a model for language", "mlp, patchtst")),
        ("forecasting", {"model": {"name": "vit"}}, ("vit is a model for classification", "mlp, patchtst")),
        ("forecasting", {"model": PATCHTST | {"patch": 16}}, ("patch must be less than the 16 rows", "found 16")),
        ("forecasting", {"model": PATCHTST | {"heads": 3}}, ("dim 16 and heads 3",)),
        ("language", {"data": {"context": None}}, ("data.context is missing", "holds text")),
        ("language", {"data": {"horizon": 4}}, ("data.horizon is 4", "holds text", "take it out")),
        ("language", {"data": {"crop": 2}}, ("crop", "for pictures")),
        ("language", {"validation": {"metric": "mae"}}, ("validation.metric is mae", "perplexity and accuracy")),
        ("language", {"model": {"name": "mlp"}}, ("mlp is a model for classification and forecasting", "gpt2")),
        ("classification", {"data": {"context": 4}}, ("data.context is 4", "samples with labels", "take it out")),
        ("classification", {"data": {"stride": 4}}, ("data.stride is 4",)),
        ("classification", {"validation": {"metric": "perplexity"}}, ("perplexity", "loss and accuracy")),
        ("classification", {"model": PATCHTST}, ("patchtst is a model for forecasting", "vit")),
    ],
)
def test_what_does_not_fit_the_task_is_refused(task, sections, texts, bench, series, text):
    whole = {"forecasting": forecasting, "language": language}.get(task, lambda _, **more: more)
    refused(bench, texts=texts, **whole(text if task == "language" else series, **sections))


def test_outputs_of_another_shape_are_refused(known, series, text):
    wrong = {"target": "known:Flat"}
    refused(known, texts=("each of the 4 rows to predict (data.horizon) and the 3 columns", "shape (4, 3); found (3,)"),
            **forecasting(series, model=wrong))  # fmt: skip
    refused(known, texts=("it does not take samples of shape (16,)",), **language(text, model=wrong))


def test_without_transformers_the_extra_is_named(bench, series, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(bench, texts=("model: patchtst needs the package transformers", "pip install 'hpclr[zoo]'"),
            **forecasting(series))  # fmt: skip


def test_other_data_than_the_run_was_for_is_refused(bench, series, text):
    bench.train(**forecasting(series))
    done = hpclr("evaluate", bench.run, "--data", text)
    assert done.code == 2
    assert "trained on data with task 'forecasting', this has 'language'" in done.err


# --- checkpoints of before -------------------------------------------------------------------------------------------


def test_the_best_score_of_an_old_checkpoint_is_read():
    old = {"step": 7, "seconds": 1.5, "best_accuracy": 0.75, "best_loss": 0.5, "best_step": 4, "finished": False}
    found = position_of({"position": Json(old | {"validations_since_best": 1})})
    assert (found.best_scores, found.best_step) == ({"accuracy": 0.75, "loss": 0.5}, 4)
    assert (found.best("accuracy"), found.best("loss"), found.best("mae")) == (0.75, 0.5, None)
    assert position_of({"position": Json(old | {"best_accuracy": None, "best_loss": None})}).best("accuracy") is None


def test_a_checkpoint_that_says_nothing_of_its_task_is_one_of_a_classifier(bench, digits):
    from hpclr.training.evaluation import load_run, saved_facts

    bench.train(train={"steps": 2})
    loaded, _ = load_run(bench.run)
    del loaded.tree["data"].value["task"]
    assert saved_facts(loaded).task == "classification"


def test_a_run_file_of_before_goes_on(digits):
    """Its metric was spelt out as accuracy."""
    run = parse_run_file(json.dumps(run_file(digits, validation={"metric": "accuracy"})), "run.yaml")
    assert run.data.context is None
