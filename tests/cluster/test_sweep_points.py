"""Sweep files: which runs they stand for, what these are called, what is refused."""

import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_helpers import hpclr, make_sweeps

from hpclr.cluster.sweep.names import run_name
from hpclr.cluster.sweep.points import load_sweep
from hpclr.config import load_run_file
from hpclr.config.schema import RunName
from hpclr.errors import UsageError

ROOT = Path(__file__).parents[2]
TOO_MANY = ", ".join(f"train.x{i}: {list(range(10))}" for i in range(5))
ENERGY = {"rule": "energy", "share": 0.9}


@pytest.fixture
def sweeps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_sweeps(tmp_path)


def refusal(sweeps, **parts) -> str:
    with pytest.raises(UsageError) as error:
        sweeps.load(**parts)
    return str(error.value)


def test_a_grid_is_multiplied_and_a_list_is_added(sweeps):
    sweep = sweeps.load(grid={"optimizer.lr": [0.001, 0.003], "train.seed": [0, 1]}, list=[{"method.name": "dense"}])
    assert [point.values for point in sweep.points] == [
        *({"optimizer.lr": lr, "train.seed": seed} for lr in (0.001, 0.003) for seed in (0, 1)),
        {"method.name": "dense"},
    ]
    assert [point.name for point in sweep.points][::4] == ["sweep-lr-0.001-seed-0", "sweep-method-dense"]
    assert sweep.keys == ["optimizer.lr", "train.seed", "method.name"]


def test_a_point_is_the_run_file_with_its_overrides(sweeps):
    """Also where an override changes the kind of a section, and what stood in it means nothing any more."""
    words = ("method.name=dense", "optimizer.betas=[0.9, 0.99]")
    (point,) = sweeps.load(list=[{"method.name": "dense", "optimizer.betas": [0.9, 0.99]}]).points
    assert point.run == load_run_file(sweeps.path / "run.yaml", [*words, f"name={point.name}"])
    assert point.name == "sweep-method-dense-betas-0.9_0.99"


def test_the_run_file_is_found_from_the_sweep_file(sweeps, monkeypatch, tmp_path_factory):
    file = sweeps.write(list=[{}])
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert load_sweep(file, lambda name: False).points[0].name == "sweep"


def test_the_example_is_what_the_page_shows():
    text = (ROOT / "jobs" / "sweep.yaml").read_text(encoding="utf-8")
    shown = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert shown in (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    names = [point.name for point in load_sweep(ROOT / "jobs" / "sweep.yaml", lambda name: False).points]
    assert (len(names), names[0]) == (10, "sweep-cutoff-0.1-lr-0.001-seed-0")


def test_equal_points_are_one(sweeps):
    """The base has the seed 0 and the learning rate 0.003; a section may be written as a whole or by its keys."""
    names = sweeps.names(
        grid={"train.seed": [0, 1, 0], "optimizer.lr": [0.003]},
        list=[{"train.seed": 1}, {}, {"method": {"name": "dense"}}, {"method.name": "dense"}],
    )
    assert names == ["sweep-lr-0.003-seed-0", "sweep-lr-0.003-seed-1", "sweep-method-dense"]


def test_a_run_that_was_started_keeps_its_name(sweeps):
    parts = {"list": [{"train.seed": 0, "optimizer.lr": 0.003}, {"train.seed": 0}, {"optimizer.lr": 0.003}]}
    assert sweeps.names(**parts) == ["sweep-lr-0.003-seed-0"]
    (point,) = sweeps.load(["sweep-seed-0"], **parts).points
    assert point.name == "sweep-seed-0"


def test_numbers_are_the_same_however_they_are_written(sweeps):
    file = sweeps.write()
    named = []
    for rate in ("1e-3", "0.001", ".0010"):
        file.write_text(f"run: run.yaml\ngrid: {{optimizer.lr: [{rate}], optimizer.weight_decay: [1]}}")
        named += [point.name for point in load_sweep(file, lambda name: False).points]
    assert named == ["sweep-lr-0.001-weight_decay-1.0"] * 3


def test_values_that_are_no_words_become_checksums(sweeps):
    names = sweeps.names(list=[{"data.path": path} for path in ("a/b.h5", "a b.h5", "ab.h5", "ä.h5", "true", "-1")])
    assert len(set(names)) == 6
    assert names[2] == "sweep-path-ab.h5"
    assert all(name.startswith("sweep-path-0x") for name in names[:2] + names[3:])


def test_long_names_become_short(sweeps):
    key = {f"model.args.{'x' * 40}{i}": i for i in range(4)}
    (name,) = sweeps.names(base={"model": {"target": "net:make"}}, list=[key])
    assert name.startswith("sweep-0x")
    assert len(name) < 30


VALUES = st.one_of(
    st.integers(-(10**6), 10**6),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.booleans(),
    st.none(),
    st.lists(st.integers(0, 300) | st.floats(0, 1), max_size=3),
)
KEYS = [
    "optimizer.lr",
    "train.seed",
    "method.name",
    "model.name",
    "model.args.a",
    "model.args.b-c",
    "data.path",
    "model.dim",
]
POINTS = st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=4)


@settings(deadline=None)
@given(POINTS, POINTS)
def test_two_runs_never_share_a_name(one, other):
    """And names are the same whatever the order is; `repr` tells 1, 1.0 and true apart."""
    names = [run_name("sweep", dict(random.sample(sorted(p.items()), len(p)))) for p in (one, other)]
    assert names == [run_name("sweep", point) for point in (one, other)]
    assert names == msgspec.convert(names, list[RunName])
    assert (names[0] == names[1]) == ({k: repr(v) for k, v in one.items()} == {k: repr(v) for k, v in other.items()})


@settings(deadline=None, max_examples=15)
@given(st.permutations(range(6)), st.integers(1, 6))
def test_names_stay_when_points_are_added_or_moved(tmp_path_factory, order, count):
    sweeps = make_sweeps(tmp_path_factory.mktemp("sweep"))
    points = [{"train.seed": 1}, {"method.name": "dense"}, {"method.cutoff": ENERGY}, {"method.cutoff": 0.2}]
    points += [{"optimizer.lr": 1, "train.seed": 2}, {"train.steps": None, "train.epochs": 3}]
    names = dict(zip(map(str, points), sweeps.names(list=points), strict=True))
    some = [points[index] for index in order][:count]
    assert sweeps.names(list=some) == [names[str(point)] for point in some]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "must hold keys and values"),
        ("run: run.yaml", "says of no key what values it takes"),
        ("grid: {train.seed: [1]}", "run must be the path of a run file, relative to this file, found null"),
        ("run: run.yaml\nseeds: [1]", "line 2: seeds is not a key of a sweep file"),
        ("run: nothing.yaml\nlist: [{}]", "cannot read the run file that"),
        ("run: run.yaml\ngrid:\n  train.seed: 3", "line 3: grid.train.seed must be a list of the values"),
        ("run: run.yaml\ngrid:\n  train.seed: []", "line 3: grid.train.seed must be a list of the values"),
        ("run: run.yaml\ngrid: [1]", "line 2: grid must be a section of keys"),
        ("run: run.yaml\nlist: {train.seed: 1}", "line 2: list must be a list of items"),
        ("run: run.yaml\nlist: [dense]", "line 2: list.0 must be keys and values"),
        ("run: run.yaml\nname: my sweep\nlist: [{}]", "line 2: name must be a name of at most 64 letters"),
        (f"run: run.yaml\nname: {'x' * 65}\nlist: [{{}}]", "line 2: name must be a name of at most 64 letters"),
        ("run: run.yaml\nlist: [{name: x}]", "line 2: name cannot be varied"),
        ("run: run.yaml\nlist: [{'a=b.c': x}]", "must have the form section.key"),
        ("run: run.yaml\nlist: [{train..seed: 1}]", "must have the form section.key"),
        (f"run: run.yaml\ngrid: {{{TOO_MANY}}}", "stands for 100000 runs"),
    ],
)
def test_what_a_sweep_file_cannot_say(text, said, sweeps):
    file = sweeps.write()
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        load_sweep(file, lambda name: False)
    assert said in str(error.value)


def test_a_file_whose_name_cannot_be_the_sweeps_must_say_one(sweeps):
    file = sweeps.write(list=[{}]).rename(sweeps.path / "my sweep.yaml")
    with pytest.raises(UsageError, match=r"the file's name becomes that of the sweep.*add `name:` to it"):
        load_sweep(file, lambda name: False)


def test_all_wrong_points_are_named_at_once_with_their_lines(sweeps):
    file = sweeps.write()
    file.write_text(
        "run: run.yaml\ngrid:\n  optimizer.lr: [0.001, -1]\n  train.sed: [0, 1]\nlist:\n  - {method.name: densee}\n"
        "  - {train.epochs: 3}\n"
    )
    done = hpclr("sweep", file)
    assert done.code == 2
    lines = done.err.splitlines()
    assert lines[0].endswith(f"runs of {file} are wrong:")
    assert "line 4: train.sed is not a key of train (did you mean seed?)" in lines[1]
    assert lines[1].endswith("(in 4 of 6 runs)")
    assert f"{file} line 3: optimizer.lr must be a number > 0, found -1 (in 2 of 6 runs)" in lines
    assert any(line.startswith(f"{file} line 6: method.name cannot be 'densee'") for line in lines)
    assert any("exactly one of epochs and steps" in line for line in lines)
    assert len(lines) == 5
    assert not sweeps.runs.exists()
