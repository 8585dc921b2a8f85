"""`hpclr plan` on the command line."""

import json
import subprocess
import sys

import pytest
from planning_helpers import DENSE, OIALR, hpclr, written

SAID = ("--samples", 300, "--shape", "1x8x8", "--classes", 10)


def test_a_plan_for_people_fits_a_hundred_columns():
    done = hpclr("plan", written(), "--nodes", "1,2,4", "--gpu", "h100", *SAID)
    assert done.code == 0, done.err
    assert max(map(len, done.out.splitlines())) <= 100
    for heading in ("Parameters and work", "Memory of a process", "Time and energy", "Against dense", "Ranks that pay"):
        assert heading in done.out
    for word in ("Counted:", "Traced,", "Assumed:", "Least sure:", "Left out:"):
        assert word in done.out


def test_a_dense_run_is_compared_with_nothing():
    done = hpclr("plan", written(method=DENSE), "--gpu", "cpu", *SAID)
    assert done.code == 0, done.err
    assert "Against dense" not in done.out
    assert "Least sure" not in done.out


def test_a_plan_for_programs(few_digits):
    done = hpclr("plan", written(data={"path": str(few_digits), "batch_size": 60}), "--json", "--nodes", "1,2,7")
    plan = json.loads(done.out)
    assert [row["nodes"] for row in plan["rows"]] == [1, 2, 7]
    assert all(row["impossible"] for row in plan["rows"])  # eight GPUs a node do not share 60 samples equally
    assert plan["measured"] is None
    done = hpclr("plan", written(), "--json", "--gpus-per-node", 4, "--hardware", "watts=100", *SAID)
    row = json.loads(done.out)["rows"][0]
    assert row["total"]["low"] < row["total"]["high"]
    assert row["energy"]["low"] == pytest.approx(row["total"]["low"] * 4 * 60 / 3.6e6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "absent.h5 is not here"),
        (("--samples", 300), "add --shape and --classes"),
        (("--shape", "3x3"), "add --samples"),
        (("--samples", 300, "--shape", "3by3", "--classes", 2), "sizes with x between them"),
        ((*SAID, "--nodes", "1,x"), "whole numbers from 1 to 999,999"),
        ((*SAID, "--nodes", "0"), "whole numbers from 1"),
        ((*SAID, "--nodes", "9" * 5000), "whole numbers from 1 to 999,999"),
        ((*SAID, "--nodes", ",".join("1" * 101)), "at most 100"),
        ((*SAID, "--gpus-per-node", 10**20), "1<=x<=1000"),
        (("--samples", 10**17, "--shape", "8", "--classes", 10), "1<=x<=1000000000000"),
        (("--samples", 10**12, "--shape", "8", "--classes", 10, "train={epochs: 9}"), "plan counts up to 10,000"),
        ((*SAID, "train.steps=1000000000000"), "plan counts up to 10,000"),
        (
            (*SAID, "train.steps=1000000000000", "method={name: cuttlefish, every: 1, delay: 10000000000}"),
            "up to 10,000",
        ),
        (("--samples", 9, "--shape", "8", "--classes", 10**12), "1<=x<=10000000"),
        (("--samples", 9, "--shape", "9x9999999999", "--classes", 10), "1,000,000,000 numbers in a sample"),
        (("--samples", 9, "--shape", "9" * 5000, "--classes", 10), "1,000,000,000 numbers in a sample"),
        ((*SAID, "model.hidden=[1000000000,1000000000]"), "too large to be counted on this machine"),
        ((*SAID, "model.hidden=[10000000000,10000000000]"), "too large to be counted on this machine"),
        ((*SAID, "--partition", "accelerated"), "say which with --profile"),
        ((*SAID, "--hardware", "bandwidth=1e-300"), "a number from 1 to 1e+24"),
        ((*SAID, "--hardware", "bandwidth=1e300"), "a number from 1 to 1e+24"),
        ((*SAID, "--path", "cut=1e-9"), "from 0.001 to 1"),
        ((*SAID, "--hardware", "speed=1"), "one of the keys"),
        ((*SAID, "--hardware", "watts=-1"), "a number from 1"),
        ((*SAID, "--path", "cut=7"), "cut=SHARE,final=SHARE"),
        ((*SAID, "--like", "absent"), "cannot read absent/metrics.jsonl"),
        ((*SAID, "--like", "absent", "--path", "cut=0.1"), "two answers to one question"),
        ((*SAID, "--profile", "generic"), "has no partition"),
        ((*SAID, "--gpu", "b200"), "is not one of"),
        ((*SAID, "method.delay=99"), "nothing would ever become low-rank"),
        ((*SAID, "method.exclude=[nothing*]"), "matches no layer"),
        ((*SAID, "model.name=vit", "model.patch=3"), "patch"),
        ((*SAID, "--measure", "--gpu", "cpu", "--nodes", "3"), "cannot share data.batch_size"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_sentence(words, said):
    done = hpclr("plan", written(), *words)
    assert done.code == 2
    assert said in done.err
    assert len(done.err) < 1000 or "9" * 5000 in map(str, words)
    assert not done.out


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (OIALR, "factors of full rank from the first step; every 3 steps"),
        ({"name": "truncate", "at": 0, "rank": 0.5}, "two factors of 50% of full rank from the first step"),
    ],
)
def test_no_delay_is_said_as_such(method, said):
    delay = {"delay": 0, "freeze": "stable"} if method is OIALR else {}
    done = hpclr("plan", written(method=method | delay), *SAID)
    assert done.code == 0, done.err
    assert said in " ".join(done.out.split())
    assert "step 0" not in done.out
    assert "before the delay" not in done.out


@pytest.mark.parametrize("extreme", ["1", "1e24"])
def test_numbers_of_a_device_at_their_limits_are_planned_with(extreme):
    words = [f"--hardware={key}={extreme}" for key in ("half", "float32", "bandwidth", "inside", "between", "watts")]
    for devices in (1, 4):
        done = hpclr("plan", written(), *SAID, *words, "--gpus-per-node", devices)
        assert done.code == 0, done.err


def test_a_model_that_looks_at_its_data_is_refused(tmp_path, monkeypatch):
    source = (
        "from torch import nn\n"
        "class Picky(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        x = x.flatten(1)\n"
        "        return super().forward(x if x.sum() > 0 else -x)\n"
        "def make():\n"
        "    return nn.Sequential(nn.Linear(8, 8), Picky(64, 10), nn.Linear(10, 10))[1:]\n"
    )
    (tmp_path / "picky_for_plans.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    done = hpclr("plan", written(model={"target": "picky_for_plans:make"}, method=DENSE), *SAID)
    assert done.code == 2
    assert "cannot be counted without data" in done.err


def test_profiles_say_how_many_gpus_a_node_has():
    done = hpclr("plan", written(), "--profile", "horeka", "--json", *SAID)
    assert json.loads(done.out)["rows"][0]["processes"] == 4


def test_measured_steps_take_the_place_of_assumptions(few_digits):
    run = written(data={"path": str(few_digits), "batch_size": 60}, method=OIALR)
    done = hpclr("plan", run, "--measure", "--gpu", "cpu", "--gpus-per-node", 1, "--json")
    plan = json.loads(done.out)
    found = plan["measured"]
    assert found["data"] == "the run's data"
    assert set(found["timed"]) == {"dense", "begin", "end"}
    low, high = found["timed"]["dense"]["passes"]
    assert 0 < low <= high
    row = plan["rows"][0]
    assert row["dense"]["low"] == pytest.approx(0.85 * (low + found["timed"]["dense"]["optimizer"]))
    assert row["dense"]["high"] == pytest.approx(1.35 * (high + found["timed"]["dense"]["optimizer"]))
    text = hpclr("plan", run, "--measure", "--gpu", "cpu", "--gpus-per-node", 1, "method.name=dense").out
    assert "Measured on this machine's CPU" in text


def test_help_is_instant():
    code = "import sys; from hpclr.cli.plan import plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
