"""`hpclr report`: what is on the page, from files alone; what it does with runs that go on, are damaged, or lie."""

import csv
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from click.testing import CliRunner
from report_helpers import OIALR, make_run, pace, records, saved, summary

from hpclr.cli.report import report
from hpclr.errors import UsageError
from hpclr.report.page import page_of
from hpclr.report.runs import read_runs

PROGRAM = """
import sys
from hpclr.cli import hpclr
hpclr({arguments!r}, standalone_mode=False)
print(*sorted({{"torch", "numpy", "h5py", "matplotlib"}} & set(sys.modules)), file=sys.stderr)
"""


def page(*runs, spectra=False):
    return page_of(read_runs(runs, spectra=spectra)).decode()


def numbers(page, name):
    return list(csv.reader(io.StringIO(saved(page, "csv")[name])))[1:]


def cells(page, label):
    """A row of the tables."""
    found = re.search(rf'<th scope="row"[^>]*>{re.escape(label)}</th>(.*?)</tr>', page)
    assert found, label
    return [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", found[1])]


def test_a_trained_run_has_all_its_plots(trained):
    content = page(trained, spectra=True)
    names = saved(content, "svg").keys()
    assert {
        "run1-parameters",
        "loss-steps",
        "loss-time",
        "valid-accuracy-steps",
        "lr-steps",
        "optimizer-bytes",
    } <= names
    of_layers = {name.removeprefix("run1-digits-") for name in names}
    assert {"stability", "outside", "rank", "relative-rank", "spectra"} <= of_layers
    recorded = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    checks = {record["step"]: record["outside"] for record in recorded if record["kind"] == "check"}
    counts = {step: len(found) for step, found in checks.items()}
    assert counts == dict.fromkeys((2, 4, 6), 0) | dict.fromkeys((8, 10, 12, 14, 16), 2)
    shares = {(layer, int(step)): float(share) for layer, step, share, _ in numbers(content, "run1-digits-outside")}
    assert shares == pytest.approx({(n, step): share for step, found in checks.items() for n, share in found.items()})
    losses = [(record["step"], record["loss"]) for record in recorded if record["kind"] == "train"]
    drawn = {float(x): float(y) for _, x, y in numbers(content, "loss-steps")}
    assert drawn == pytest.approx(dict(losses))
    result = json.loads((trained / "summary.json").read_text())
    assert cells(content, "trainable parameters") == [f"{result['sizes']['trainable']:,}"]
    assert cells(content, "test accuracy") == [f"{result['test']['accuracy']:.2%}"]
    assert cells(content, "state") == ["finished"]


def test_ranks_and_spectra_are_those_of_the_newest_checkpoint(trained):
    content = page(trained, spectra=True)
    result = json.loads((trained / "summary.json").read_text())
    ranks = {layer["name"]: layer["rank"] for layer in result["layers"] if layer["converted"]}
    last = {layer: int(rank) for layer, _, rank, _ in numbers(content, "run1-digits-rank")}
    spectra = [layer for layer, _, _ in numbers(content, "run1-digits-spectra")]
    assert last == ranks
    assert {layer: spectra.count(layer) for layer in ranks} == ranks
    assert "Dashed: the cutoff, 0.4." in content


def test_where_layers_froze_is_marked(trained):
    frozen = [row for row in numbers(page(trained), "run1-digits-stability") if row[3] == "True"]
    assert {row[1] for row in frozen} == {"6"}


def test_requeues_are_marked_and_their_pause_is_empty(tmp_path):
    content = page(make_run(tmp_path, "run"))
    over_steps, over_time = (ET.fromstring(saved(content, "svg")[f"loss-{by}"]) for by in ("steps", "time"))
    for picture in (over_steps, over_time):
        texts = [node.text for node in picture.iter("{http://www.w3.org/2000/svg}text")]
        assert "attempt 2" in texts
        assert "attempt 1" not in texts
    assert [pieces_of_curve(picture) for picture in (over_steps, over_time)] == [1, 2]


def pieces_of_curve(picture):
    paths = picture.iter("{http://www.w3.org/2000/svg}path")
    return max(path.get("d").count("M") for path in paths if path.get("class") == "curve s0")


def test_time_by_what_it_went_into(tmp_path):
    parts = {part: float(seconds) for _, part, seconds in numbers(page(make_run(tmp_path, "run")), "shares")}
    assert parts == {"computing": 240, "data": 40, "checks": 80, "saving": 20, "validation": 20}


def test_settings_that_differ_are_in_the_table_and_others_are_not(tmp_path):
    runs = [make_run(tmp_path, "a", lr=0.1), make_run(tmp_path, "b", lr=0.2, method="{name: dense}")]
    short, details = page(*runs).split("<details>")[:2]
    assert cells(short, "optimizer.lr") == ["0.1", "0.2"]
    assert cells(short, "method.name") == ["oialr", "dense"]
    assert "data.batch_size" not in short
    assert cells(details, "data.batch_size") == ["64", "64"]


def test_scores_against_parameters_of_several_runs(tmp_path):
    a = make_run(tmp_path, "a", summary=summary(0.9))
    b = make_run(tmp_path, "b", summary=summary(0.8, trainable=4000))
    rows = numbers(page(a, b, make_run(tmp_path, "c")), "score-parameters")
    assert rows == [["a", "4600", "3600", "0.9"], ["b", "4600", "4000", "0.8"]]
    assert "Not known: c." in page(a, b, make_run(tmp_path, "d")).replace("d.", "c.")


def test_a_run_that_has_just_begun(tmp_path):
    run = make_run(tmp_path, "run", ())
    (run / "metrics.jsonl").unlink()
    content = page(run, spectra=True)
    assert "No step is recorded yet." in content
    assert "No check of the layers has been recorded" in content
    assert "No spectra: " in content


def test_a_run_that_goes_on_shows_what_is_known_until_now(tmp_path):
    content = page(make_run(tmp_path, "run"))
    assert cells(content, "trainable parameters") == ["3,600"]
    assert cells(content, "best validation accuracy") == ["80.00%"]
    assert cells(content, "attempts") == ["2"]
    assert cells(content, "milliseconds a step, mean") == ["1,000.0"]
    assert cells(content, "state")[0].startswith("step 400 of 400")


VALIDATIONS = {10: (0.9, 0.6), 20: (0.5, 0.7), 30: (0.7, 0.8), 40: (0.6, 0.8)}  # step → loss, accuracy


@pytest.mark.parametrize(
    ("metric", "run_file", "best"),
    [
        ("loss", True, ["70.00%", "0.5000"]),
        ("accuracy", True, ["80.00%", "0.7000"]),  # the first of two that are equal, as training keeps it
        ("auto", True, ["80.00%", "0.7000"]),
        ("auto", False, ["80.00%", "0.7000"]),
    ],
)
def test_the_best_scores_until_now_are_those_of_one_step(tmp_path, metric, run_file, best):
    valid = [{"kind": "valid", "step": n, "loss": a, "accuracy": b} for n, (a, b) in VALIDATIONS.items()]
    run = make_run(tmp_path, "run", valid)
    text = f"{(run / 'run.yaml').read_text()}validation: {{metric: {metric}}}\n"
    (run / "run.yaml").write_text(text if run_file else "name: [")
    content = page(run)
    assert [cells(content, f"best validation {name}")[0] for name in ("accuracy", "loss")] == best


def test_a_damaged_checkpoint_is_told_and_the_rest_is_drawn(trained, tmp_path):
    run = make_run(tmp_path, "run")
    (run / "checkpoints").mkdir()
    for file in (trained / "checkpoints").iterdir():
        (run / "checkpoints" / file.name).write_bytes(file.read_bytes()[:-100])
    content = page(run, spectra=True)
    assert "No spectra: " in content
    assert "loss-steps" in saved(content, "svg")


class _Vanishing:
    """A directory that is gone just before it, or a file in it, is looked into for the nth time."""

    def __init__(self, path, looks):
        self.path, self.looks = str(path), looks

    def look(self, event, arguments):
        if event not in ("open", "os.listdir", "os.scandir") or not str(arguments[0]).startswith(self.path):
            return
        self.looks -= 1
        if self.looks == 0:
            shutil.rmtree(self.path)


_vanishing = []
sys.addaudithook(lambda *event: [one.look(*event) for one in _vanishing])


def test_a_run_that_vanishes_while_it_is_looked_at_does_no_harm(tmp_path, trained):
    """A page is made of what there was, or it is said that nothing could be read."""
    run, found = tmp_path / "run", []
    while True:
        shutil.copytree(trained, run, copy_function=os.link)
        _vanishing[:] = [_Vanishing(run, len(found) + 1)]
        try:
            found.append(page(run, spectra=True).endswith("</html>\n"))
        except UsageError as error:
            found.append("cannot be read" in str(error) or "there is no run" in str(error))
        finally:
            _vanishing.clear()
        if run.exists():  # it has not been looked at so often
            break
    assert all(found)
    assert len(found) > 10


def test_two_reports_into_one_file_leave_one_of_them(tmp_path):
    runs, output = [make_run(tmp_path, name) for name in ("a", "b")], tmp_path / "page.html"
    words = [[sys.executable, "-m", "hpclr", "report", str(run), "-o", str(output), "--no-spectra"] for run in runs]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in words]
    assert [process.wait(60) for process in both] == [0, 0]
    content = re.sub(r" on \S+ \S+ UTC", "", output.read_text())
    assert content in [re.sub(r" on \S+ \S+ UTC", "", page(run)) for run in runs]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["page.html"]


HOSTILE_SUMMARIES = {
    "not JSON": "{",
    "another form": "[1, 2]",
    "text for numbers": json.dumps({"test": {"accuracy": "<script>"}, "sizes": "x", "cost": [], "layers": [1, {}]}),
    "numbers beyond all": json.dumps({"test": {"accuracy": 10**400}, "sizes": {"trainable": -1, "dense": 0}}),
    "shapes that are none": json.dumps({"layers": [{"name": "x", "shape": [0, 0]}, {"name": "x", "shape": []}]}),
}


@pytest.mark.parametrize("text", HOSTILE_SUMMARIES.values(), ids=HOSTILE_SUMMARIES)
def test_a_summary_that_is_none_does_no_harm(tmp_path, text):
    run = make_run(tmp_path, "run")
    (run / "summary.json").write_text(text)
    content = page(run)
    assert "<script" not in content
    assert "loss-steps" in saved(content, "svg")


def test_a_damaged_run_file_is_told(tmp_path):
    run = make_run(tmp_path, "run")
    (run / "run.yaml").write_text("name: [")
    content = page(run)
    assert "settings are not known" in content
    assert "loss-steps" in saved(content, "svg")


EXTREME = {
    "one step": [{"kind": "train", "step": 0, "loss": 0.0, "lr": 0.0}],
    "huge": [{"kind": "train", "step": 2**53, "loss": s * 1e299, "lr": 1e299, "time": s * 1e299} for s in (-1, 1)],
    "tiny": [{"kind": "train", "step": s, "loss": s * 5e-324, "lr": 5e-324, "time": s * 5e-324} for s in (1, 2)],
    "many attempts": [{"kind": "attempt", "step": n, "attempt": n, "time": float(n)} for n in range(999)],
    "odd layers": [{"kind": "check", "step": 1, "ranks": {"": 1, "\u0000": 0, "a" * 9999: -5}, "stability": {"x": 2}}],
    "no layers": [{"kind": "check", "step": 1, "ranks": [], "stability": None, "frozen": "x"}],
    "other layers each time": [{"kind": "check", "step": s, "ranks": {f"l{s}": s}} for s in range(3000)],
    "no pace": [pace(1, 2.0) | {"seconds": 0, "steps": 0, "memory": None}],
    "backwards": [pace(1, 2.0) | {"seconds": -1, "data": 50.0}],
}  # fmt: skip


@pytest.mark.parametrize("lines", EXTREME.values(), ids=EXTREME)
def test_extreme_records_make_a_page(tmp_path, lines):
    content = page(make_run(tmp_path, "run", lines))
    for picture in saved(content, "svg").values():
        assert not re.search(r"\b(nan|inf)\b", picture)
        ET.fromstring(picture)


def test_a_pipe_for_a_run_file_does_not_hold_up_whoever_looks(tmp_path):
    run = make_run(tmp_path, "run")
    (run / "run.yaml").unlink()
    os.mkfifo(run / "run.yaml")
    assert "is no regular file" in page(run)


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / place, "run") for place in ("a", "b")]
    assert [run.name for run in read_runs([*runs, runs[0]], spectra=False)] == [str(run) for run in runs]


def test_without_spectra_no_large_package_is_loaded(tmp_path):
    arguments = ["report", str(make_run(tmp_path, "run")), "-o", str(tmp_path / "page.html"), "--no-spectra"]
    program = PROGRAM.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "\n")
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_faults_are_told_on_the_page_and_to_whoever_asks(tmp_path):
    run = make_run(tmp_path, "run", ["<script>alert(1)</script>", *records()])
    done = CliRunner().invoke(report, [str(run), "-o", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done
    assert "1 of " in done.stderr
    assert "lines are no records" in done.stderr
    assert "lines are no records" in (tmp_path / "page.html").read_text()


def test_the_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    place = tmp_path / "page.html"
    place.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    done = CliRunner().invoke(report, [str(make_run(tmp_path, "run")), "-o", str(place)])
    assert isinstance(done.exception, UsageError)
    assert "cannot write" in str(done.exception)
    assert place.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]


def test_a_file_of_the_run_is_not_replaced(tmp_path):
    run = make_run(tmp_path, "run")
    done = CliRunner().invoke(report, [str(run), "-o", str(run / "metrics.jsonl")])
    assert done.exit_code == 2
    assert "must end in .html" in done.output


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no run"):
        read_runs([tmp_path], spectra=False)
    with pytest.raises(UsageError, match="there is no run"):
        read_runs([tmp_path / "absent"], spectra=False)


def test_nothing_outside_is_asked_for_and_no_script_is_there(tmp_path):
    content = page(make_run(tmp_path, "run", method=OIALR))
    assert "<script" not in content
    assert not re.search(r'(href|src)="(?!data:)', content)
    assert not re.search(r'\son[a-z]+="', content)
    assert "default-src &#x27;none&#x27;" in content or "default-src 'none'" in content
