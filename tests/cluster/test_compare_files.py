"""Comparison files and run files: which runs are compared, what these are called, what is refused."""

import re
from pathlib import Path

import pytest
from compare_helpers import NOTHING, make_comparisons
from hypothesis import given, settings
from hypothesis import strategies as st
from training_helpers import OIALR

from hpclr.cluster.comparison.files import Wanted, load_comparison
from hpclr.cluster.comparison.starts import _STARTING_POINTS, method_names
from hpclr.config.schema import Cuttlefish, Dense, Oialr, SvdTraining
from hpclr.errors import UsageError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "comparing.md"
THREE = Wanted(("dense", "oialr", "svd_training"))


@pytest.fixture
def comparisons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_comparisons(tmp_path)


def refusal(comparisons, text: str, wanted: Wanted = NOTHING) -> str:
    comparisons.file()
    file = comparisons.path / "compare.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        load_comparison(file, wanted)
    return str(error.value)


def test_a_run_file_with_methods_and_seeds(comparisons):
    """Its own method keeps its settings, others get their starting points; `name` and the first seed are its own."""
    found = comparisons.found(THREE._replace(seeds=2, overrides=["train.seed=5", "name=mine", "method.cutoff=0.4"]))
    assert [point.name for points in found.entries.values() for point in points] == [
        f"mine-{method}-seed-{seed}" for method in ("dense", "oialr", "svd_training") for seed in (5, 6)
    ]
    assert {point.run.train.seed for points in found.entries.values() for point in points} == {5, 6}
    assert found.entries["oialr"][0].run.method == Oialr(**OIALR | {"cutoff": 0.4})
    assert found.entries["dense"][1].run.method == Dense()
    assert found.entries["svd_training"][0].run.method == SvdTraining(sparsity=0.03, prune_at=0.6, energy=0.02)
    assert (found.reference, found.equal) == ("dense", "steps")


def test_what_the_run_file_says_of_layers_counts_for_all_methods(comparisons):
    found = comparisons.found(THREE, base={"method": OIALR | {"exclude": ["0"], "keep_last": False}})
    svd = found.entries["svd_training"][0].run.method
    assert (svd.exclude, svd.keep_last) == (("0",), False)


def test_what_decides_its_settings_itself_gets_no_starting_point(comparisons):
    base = {"method": {"name": "truncate", "at": 0.5, "rank": 0.3, "keep_first": False, "exclude": ["0"]}}
    found = comparisons.found(base=base, methods={"dense": None, "auto": {"name": "oialr", "auto": True}})
    assert found.entries["auto"][0].run.method == Oialr(auto=True, exclude=("0",))


@pytest.mark.parametrize("name", method_names())
def test_every_method_has_a_starting_point(name, comparisons):
    found = comparisons.found(Wanted((name,)), base={"method": {"name": "dense"}})
    assert found.entries[name][0].run.method.name == name
    assert name in _STARTING_POINTS


def test_a_comparison_file_says_more(comparisons):
    found = comparisons.found(
        methods={
            "dense": {},
            "high": {"name": "oialr", "cutoff": 0.5, "set": {"optimizer.lr": 0.01}},
            "oialr": None,
            "svd": {"name": "svd_training", "energy": 0.3},
        },
        seeds=1,
        equal="flops",
        name="c",
    )
    assert [points[0].name for points in found.entries.values()] == [
        "c-dense-seed-0", "c-high-seed-0", "c-oialr-seed-0", "c-svd-seed-0",
    ]  # fmt: skip
    high = found.entries["high"][0].run
    assert (high.method, high.optimizer.lr) == (Oialr(**OIALR | {"cutoff": 0.5}), 0.01)
    assert found.entries["svd"][0].run.method == SvdTraining(sparsity=0.03, prune_at=0.6, energy=0.3)
    assert found.equal == "flops"


def test_the_command_line_counts_before_the_file(comparisons):
    parts = {"methods": {"dense": {}, "a": {"name": "oialr"}}, "seeds": 3, "equal": "flops"}
    found = comparisons.found(Wanted(("a", "dense"), 1, "time", ["train.steps=7", "name=other"]), **parts)
    assert [(label, len(points)) for label, points in found.entries.items()] == [("a", 1), ("dense", 1)]
    assert (found.equal, found.name, found.entries["a"][0].run.train.steps) == ("time", "other", 7)


def test_dense_is_what_others_are_compared_with(comparisons):
    sgd = {"name": "dense", "set": {"optimizer.name": "sgd"}}
    assert comparisons.found(methods={"sgd": sgd, "dense": {}}).reference == "dense"
    assert comparisons.found(methods={"oialr": {}, "sgd": sgd}).reference == "sgd"
    assert comparisons.found(methods={"oialr": {}}).reference is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "must hold keys and values"),
        ("run: run.yaml", "methods must be a section with a label for each method, found null"),
        ("run: run.yaml\ngrid: {train.seed: [1]}", "line 2: grid is not a key of a comparison file"),
        ("methods: {dense: {}}", "run must be the path of a run file, relative to this file, found null"),
        ("run: run.yaml\nmethods:\n  fast: {}", "line 3: methods.fast: 'fast' is no method, which are dense, oialr"),
        ("run: run.yaml\nmethods:\n  a: {name: oi}", "line 3: methods.a.name: 'oi' is no method"),
        ("run: run.yaml\nmethods:\n  dense: 3", "line 3: methods.dense must be a section of the method's keys"),
        ("run: run.yaml\nmethods:\n  oialr: {set: 3}", "line 3: methods.oialr.set must be a section of other keys"),
        ("run: run.yaml\nmethods:\n  a b: {name: dense}", "line 3: methods.a b must be called by a label of at most"),
        ("run: run.yaml\nmethods:\n  a-flops: {name: dense}", "not ending in -time or -flops, found 'a-flops'"),
        (f"run: run.yaml\nmethods:\n  {'x' * 33}: {{name: dense}}", "must be called by a label of at most 32"),
        ("run: run.yaml\nmethods:\n  oialr: {cutof: 1}", "line 3: method.cutof is not a key of method with name: oi"),
        ("run: run.yaml\nmethods:\n  oialr:\n    cutoff: 2", "line 4: method.cutoff must be"),
        ("run: run.yaml\nmethods:\n  dense: {set: {train.seed: 1}}", "train.seed cannot be set here"),
        ("run: run.yaml\nmethods:\n  dense: {set: {train.steps: 20}}", "line 3: train.steps cannot be set here: all"),
        ("run: run.yaml\nmethods:\n  dense: {set: {train: {epochs: 2}}}", "line 3: train.epochs cannot be set here"),
        ("run: run.yaml\nmethods:\n  dense: {set: {data.batch_size: 2}}", "line 3: data.batch_size cannot be set here"),
        ("run: run.yaml\nmethods:\n  dense: {set: {data.path: b.h5}}", "are compared on the same data"),
        ("run: run.yaml\nmethods:\n  dense: {set: {data: {path: b.h5}}}", "line 3: data.path cannot be set here"),
        ("run: run.yaml\nmethods:\n  dense: {set: {name: x}}", "line 3: name cannot be varied"),
        ("run: run.yaml\nmethods:\n  dense: {set: {optimizer.lr: -1}}", "line 3: optimizer.lr must be a number > 0"),
        ("run: run.yaml\nseeds: 0\nmethods: {dense: {}}", "line 2: seeds must be a whole number >= 1"),
        ("run: run.yaml\nseeds: true\nmethods: {dense: {}}", "line 2: seeds must be a whole number >= 1"),
        ("run: run.yaml\nseeds: 10001\nmethods: {dense: {}}", "stands for 10001 runs, expected at most 10000"),
        ("run: run.yaml\nequal: cost\nmethods: {dense: {}}", "line 2: equal must be one of steps, time, flops"),
        ("run: run.yaml\nequal: time\nmethods: {oialr: {}}", "dense is not among the methods: oialr"),
        ("run: run.yaml\nname: a b\nmethods: {dense: {}}", "line 2: name must be a name of at most 64 letters"),
    ],
)
def test_what_a_comparison_file_cannot_say(text, said, comparisons):
    assert said in refusal(comparisons, text)


def test_what_the_command_line_cannot_say(comparisons):
    text = "run: run.yaml\nmethods: {dense: {}}"
    assert "--methods: there is no 'oialr'; give some of dense" in refusal(comparisons, text, Wanted(("oialr",)))
    with pytest.raises(UsageError, match="'no' is no method"):
        comparisons.found(Wanted(("no",)))
    with pytest.raises(UsageError, match=r"patience ends runs when it sees fit.*dense, oialr"):
        comparisons.found(Wanted(("dense", "oialr"), None, "flops", ["validation.patience=3"]))
    with pytest.raises(UsageError, match=r"name has 65 characters"):
        comparisons.found(Wanted(overrides=[f"name={'x' * 65}"], methods=("dense",)))


@settings(deadline=None, max_examples=30)
@given(st.text(min_size=1, max_size=6))
def test_hostile_labels_are_refused_or_make_names_of_runs(tmp_path_factory, label):
    comparisons = make_comparisons(tmp_path_factory.mktemp("compare"))
    try:
        found = comparisons.found(methods={label: {"name": "dense"}}, seeds=1)
    except UsageError:
        assert not label.isalnum() or not label.isascii()
    else:
        (point,) = found.entries[label]
        assert point.name == f"compare-{label}-seed-0"
        assert set(label) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def test_cuttlefish_can_measure_often_enough_before_it_must_switch():
    start = _STARTING_POINTS["cuttlefish"]
    window = Cuttlefish(every=start["every"], delay=start["delay"]).window
    assert start["delay"] / start["every"] > window


def test_the_page_says_what_methods_begin_with():
    text = PAGE.read_text(encoding="utf-8")
    for name, start in _STARTING_POINTS.items():
        if start:
            assert f"| `{name}` | {', '.join(f'{key} {value}' for key, value in start.items())} |" in text


def test_the_example_of_the_page_is_one(tmp_path):
    (example,) = re.findall(r"^```text\n(run: .*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (tmp_path / "compare.yaml").write_text(example)
    (tmp_path / "quickstart.yaml").write_text((ROOT / "jobs" / "quickstart.yaml").read_text(encoding="utf-8"))
    found = load_comparison(tmp_path / "compare.yaml", NOTHING)
    assert [len(points) for points in found.entries.values()] == [3, 3, 3, 3]
    assert (found.equal, found.entries["steep"][2].run.method.cutoff) == ("flops", 0.3)
    assert found.entries["steep"][0].run.method.sigma_lr == found.entries["oialr"][0].run.method.sigma_lr == 2
