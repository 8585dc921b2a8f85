"""Tables, files and pictures of comparisons whose results are made up."""

import builtins
import csv
import math
import os
import statistics
import xml.dom.minidom
from pathlib import Path

import pytest
from compare_helpers import cells, make_comparisons

from hpclr.cluster.comparison.budgets import as_sweep, trials
from hpclr.cluster.comparison.files import Wanted
from hpclr.cluster.comparison.numbers import digits, points, short
from hpclr.cluster.sweep.standing import remember
from hpclr.report.comparison import FORMATS, Series, _drawn, picture_of

TWO = Wanted(("dense", "oialr"), 3)
WORDS = ("--methods", "dense,oialr", "--seeds", 3)
DENSE, LOW = (0.90, 0.94, 0.92), (0.91, 0.90, 0.92)


@pytest.fixture
def comparisons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPCLR_RUNS", raising=False)
    return make_comparisons(tmp_path)


def results(accuracy, stored=4000, flops=8e12, **more):
    sizes = {"trainable": stored // 4, "stored": stored, "dense": 4000, "flops": 2 * stored * 5, "flops_samples": 5}
    cost = {"training_flops": flops, "peak_memory_bytes": 5e8, "gradient_bytes_mean": 1234.5}
    test = {"accuracy": accuracy, "loss": 1 - accuracy, "samples": 100}
    return {"test": test, "sizes": sizes | {"optimizer_bytes": 2 * stored}, "cost": cost} | more


def valid(*accuracies):
    return [{"accuracy": a, "loss": 1.0, "seconds": 2.0 * n, "flops": 1e12 * n} for n, a in enumerate(accuracies, 1)]


def invent_all(comparisons):
    """Three seeds of each. The mean of dense's last validations is 0.8."""
    found = comparisons.found(TWO)
    for point, accuracy in zip(found.entries["dense"], DENSE, strict=True):
        comparisons.invent(point, valid(0.5, 0.8), **results(accuracy))
    curves = (valid(0.5, 0.7), valid(0.81, 0.6), valid(0.2, 0.9))
    for seed, (point, accuracy, curve) in enumerate(zip(found.entries["oialr"], LOW, curves, strict=True)):
        comparisons.invent(point, curve, **results(accuracy, 2000 + 100 * seed, 6e12, seconds=12.0 + seed))


def test_the_table_is_what_one_computes_by_hand(comparisons):
    invent_all(comparisons)
    done = comparisons.compare("--table", *WORDS)
    assert done.code == 0, done.err
    table = cells(done.out)
    differences = [100 * (low - dense) for low, dense in zip(LOW, DENSE, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(3)
    assert table["finished runs"] == ["3 of 3", "3 of 3"]
    assert table["test accuracy, %"] == ["92.00±2.00", f"91.00±{100 * statistics.stdev(LOW):.2f}"]
    assert table["test accuracy, %: minus dense's"] == ["–", f"-1.00±{error:.2f}"]
    assert table["stored parameters"] == ["4.000k", "2.100±0.100k"]
    assert table["stored parameters: of dense"] == ["100.0%", "52.5%"]
    assert table["FLOPs of inference"] == ["8.000k", "4.200±0.200k"]
    assert table["FLOPs of training"] == ["8.000T", "6.000T"]
    assert table["FLOPs of training: of dense"] == ["100.0%", "75.0%"]
    assert table["optimiser, bytes: at most"] == ["–", "–"]
    assert table["peak memory, bytes"] == ["500.0M", "500.0M"]
    assert table["seconds"] == ["10.00", "13.00±1.00"]
    assert table["seconds to dense's score"] == ["4.000", "3.000 (2/3)"]
    assert table["FLOPs to dense's score"] == ["2.000T", "1.500T (2/3)"]


def test_the_file_has_all_digits(comparisons):
    invent_all(comparisons)
    assert comparisons.compare("--csv", "results.csv", *WORDS).code == 0
    with open("results.csv") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert len(rows) == 6
    row = rows["run-oialr-seed-2"]
    assert (row["label"], row["method"], row["seed"], row["state"]) == ("oialr", "oialr", "2", "finished")
    assert (float(row["test_accuracy"]), float(row["test_loss"])) == (0.92, 1 - 0.92)
    assert (int(row["stored_parameters"]), float(row["gradient_bytes"])) == (2200, 1234.5)
    assert (row["optimizer_bytes_peak"], float(row["training_flops"])) == ("", 6e12)
    assert (row["reached_dense"], float(row["seconds_to_dense"]), float(row["flops_to_dense"])) == ("yes", 4.0, 2e12)
    missed = rows["run-oialr-seed-0"]
    assert (missed["reached_dense"], missed["seconds_to_dense"]) == ("no", "")


def test_what_is_not_known_is_not_made_up(comparisons):
    """Runs of an earlier hpclr; one that has not finished, one whose summary is damaged; dense without a validation."""
    dense, low = comparisons.found(TWO).entries.values()
    old = {"test": {"accuracy": 0.5, "samples": 9}, "sizes": {"trainable": 10}}
    comparisons.invent(dense[0], **old)
    comparisons.invent(low[0], [{"accuracy": 0.4}], **old)
    (comparisons.invent(low[1]) / "summary.json").write_text("{")
    done = comparisons.compare("--csv", "results.csv", *WORDS)
    assert done.code == 0, done.err
    table = cells(done.out)
    assert table["finished runs"] == ["1 of 3", "1 of 3"]
    assert table["test accuracy, %: minus dense's"] == ["–", "+0.00"]
    for row in ("stored parameters", "FLOPs of training", "peak memory, bytes", "seconds to dense's score"):
        assert table[row] == ["–", "–"], row
    assert (
        "run-oialr-seed-1,oialr,oialr,1,damaged: runs/run-oialr-seed-1/summary.json" in Path("results.csv").read_text()
    )


def test_methods_that_never_get_there(comparisons):
    dense, low = comparisons.found(TWO).entries.values()
    comparisons.invent(dense[0], valid(0.9), **results(0.9))
    comparisons.invent(low[0], valid(0.8), **results(0.8))
    table = cells(comparisons.compare("--table", *WORDS).out)
    assert table["seconds to dense's score"] == ["2.000", "not reached"]


def test_of_losses_the_lower_is_better(comparisons):
    base = {"validation": {"metric": "loss"}}
    dense, low = comparisons.found(TWO, base=base).entries.values()
    comparisons.invent(dense[0], [{"loss": 0.3, "seconds": 1.0}], **results(0.91))
    comparisons.invent(low[0], [{"loss": 0.4, "seconds": 1.0}, {"loss": 0.3, "seconds": 5.0}], **results(0.74))
    table = cells(comparisons.compare("--table", *WORDS, base=base).out)
    assert table["test loss"] == ["0.0900", "0.260"]
    assert table["test loss: minus dense's"] == ["–", "+0.170"]
    assert table["seconds to dense's score"] == ["1.000", "5.000"]


def test_six_methods_fit_in_a_hundred_columns(comparisons):
    labels = ["dense", "svd_training", "fixed_rank", *(f"a-label-of-32-characters-is-lon{n}" for n in range(3))]
    parts = {"methods": {label: {"name": "dense"} for label in labels}, "seeds": 2}
    for points_ in comparisons.found(**parts).entries.values():
        for number, point in enumerate(points_):
            worst = results(
                0.1 + 0.5 * number, 123_456_789 * (1 + number), 9.87e17 * (1 + number), seconds=86400.0 * (1 + number)
            )
            comparisons.invent(point, valid(0.1, 0.2 * number), **worst)
    done = comparisons.compare("--table", **parts)
    assert max(map(len, done.out.splitlines())) <= 100
    assert cells(done.out)["seconds"][0] == "129600±61094"


@pytest.mark.parametrize(
    ("form", "mean", "spread", "text"),
    [
        (short, 0, None, "0"),
        (short, 84, None, "84"),
        (short, 84.5, None, "84.50"),
        (short, 202_058, 0.0, "202.1k"),
        (short, 202_058, 3.0, "202.1k"),
        (short, 1.5e21, None, "1500E"),
        (digits, 0.00123, 0.0004, "0.0012±0.0004"),
        (digits, 0.33689, 0.0184, "0.337±0.018"),
        (digits, -12.345, 1.0, "-12.35±1.00"),
        (digits, math.nan, None, "nan"),
        (points, 0.97493, 0.0031, "97.49±0.31"),
    ],
)
def test_numbers_are_short(form, mean, spread, text):
    assert form(mean, spread) == text


SERIES = [
    Series("dense", [97.5, 97.2], [2e5, 2e5], [1e11, 1e11], [[(1.0, 50.0), (2.0, 90.0)], [(1.1, 55.0)]]),
    Series("$\\frac{$ <b>&-->", [96.0], [1e5], [], [[]]),
    Series("_hidden", [97.4], [2.01e5], [1e11], [[(1.0, 40.0)]]),
]


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_results_are_the_same_picture_to_the_byte(kind):
    one, other = (picture_of(kind, "a $ title", "accuracy, %", SERIES) for _ in range(2))
    assert one == other
    assert one != picture_of(kind, "a $ title", "accuracy, %", SERIES[:1])
    if kind == "svg":
        assert xml.dom.minidom.parseString(one).documentElement.tagName == "svg"
        assert b"<script" not in one
        assert b"<b>" not in one


def test_a_picture_of_nothing():
    assert picture_of("png", "none", "loss", []).startswith(b"\x89PNG")


def test_pictures_are_written_where_they_are_asked_for(comparisons):
    invent_all(comparisons)
    done = comparisons.compare("--plot", "results.PNG", *WORDS)
    assert done.code == 0, done.err
    assert Path("results.PNG").read_bytes().startswith(b"\x89PNG")
    assert not (comparisons.runs / "run.compare").exists()  # who only looks writes nothing into other's directories
    assert comparisons.compare("--plot", "results.gif", *WORDS).code == 2
    done = comparisons.compare("--plot", "nowhere/results.svg", *WORDS)
    assert (done.code, "cannot write nowhere/results.svg" in done.err) == (2, True)


def test_looking_at_less_leaves_the_results_of_all(comparisons):
    invent_all(comparisons)
    found = comparisons.found(TWO)
    remember(as_sweep(found, trials(found, comparisons.runs)), comparisons.runs)
    kept = comparisons.runs / "run.compare"
    assert comparisons.compare("--table", *WORDS).code == 0
    before = {name: (kept / name).read_bytes() for name in ("results.csv", "results.svg")}
    done = comparisons.compare("--table", "--methods", "oialr", "--seeds", 1)
    assert (done.code, cells(done.out)["finished runs"]) == (0, ["1 of 1"])
    assert {name: (kept / name).read_bytes() for name in before} == before
    assert "left as it is, since 5 finished runs of the comparison are not in this table" in done.err
    assert comparisons.compare("--table", "--methods", "oialr,dense", "--seeds", 4).code == 0
    assert (kept / "results.csv").read_bytes().count(b"\n") == 9


def test_runs_on_different_data_are_not_compared(comparisons):
    """Those of an earlier hpclr, which does not say on what, are."""
    dense, low = comparisons.found(TWO).entries.values()
    comparisons.invent(dense[0], **results(0.9))
    comparisons.invent(dense[1], **results(0.9), data={"digest": "a" * 64})
    comparisons.invent(low[0], **results(0.9), data={"digest": "a" * 64})
    assert comparisons.compare("--table", *WORDS).code == 0
    comparisons.invent(low[1], **results(0.9), data={"digest": "b" * 64})
    done = comparisons.compare("--csv", "results.csv", *WORDS)
    assert (done.code, Path("results.csv").exists()) == (2, False)
    assert "run-dense-seed-1 and run-oialr-seed-1 are of different data" in done.err


@pytest.mark.parametrize("methods", ["", "dense,,oialr", "dense, "])
def test_methods_without_a_name_are_the_command_lines_fault(comparisons, methods):
    done = comparisons.compare("--methods", methods)
    assert (done.code, f"'--methods': expected labels with commas between, found {methods!r}" in done.err) == (2, True)


def test_a_dash_is_no_file(comparisons):
    invent_all(comparisons)
    done = comparisons.compare("--csv", "-", *WORDS)
    assert (done.code, "'--csv': expected the path of a file" in done.err, Path("-").exists()) == (2, True, False)


def test_costs_that_hardly_differ_do_not_fill_a_panel():
    series = [Series("a", [97.0], [2e5], [19.44e6], [[]]), Series("b", [96.0], [1e5], [19.62e6], [[]])]
    figure = _drawn("title", "accuracy, %", series)
    low, high = figure.axes[1].get_xlim()
    assert (19.62e6 - 19.44e6) / (high - low) < 0.1
    assert low < 19.44e6 < 19.62e6 < high
    assert figure.axes[0].get_xlim()[0] > 5e4


def test_labels_lie_on_no_marker():
    """Where the costs are as good as equal, labels to the left would lie on the markers there."""
    places = {"dense": (97.5, 19.5e6), "oialr": (97.2, 19.47e6), "truncate": (97.13, 19.56e6), "low": (95.9, 19.62e6)}
    panel = _drawn(
        "title", "accuracy, %", [Series(label, [y], [1], [x], [[]]) for label, (y, x) in places.items()]
    ).axes[1]
    markers = [panel.transData.transform(text.xy) for text in panel.texts]
    assert not [1 for text in panel.texts for x, y in markers if text.get_window_extent().contains(x, y)]


def test_without_matplotlib_there_is_a_table_all_the_same(comparisons, monkeypatch):
    invent_all(comparisons)
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    done = comparisons.compare("--plot", "results.svg", *WORDS)
    assert (done.code, "the extra `report`" in done.err) == (2, True)
    assert cells(done.out)["stored parameters"] == ["4.000k", "2.100±0.100k"]
    os.mkdir(comparisons.runs / "run.compare")
    done = comparisons.compare("--table", *WORDS)
    assert (done.code, "no picture: a picture needs matplotlib" in done.err) == (0, True), done.err
    assert [file.name for file in (comparisons.runs / "run.compare").iterdir()] == ["results.csv"]
