"""The benchmarks run, and hpclr has not become slower against dense training than it was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *options: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, BENCHMARKS / script, *map(str, options)]
    return subprocess.run(line, capture_output=True, text=True)


@pytest.mark.slow
def test_no_ratio_has_become_worse_by_more_than_15_percent():
    done = run("quick.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_worse_ratio_would_be_noticed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quick

    assert quick.too_low({"rank 0.5": 1.0, "rank 0.25": 1.71}, {"rank 0.5": 1.2, "rank 0.25": 2.0}) == ["rank 0.5"]


def test_a_layer_is_measured(tmp_path):
    file = tmp_path / "layer.json"
    done = run("layer.py", "--only", "192 x 192", "--rows", "64", "--repeats", "2", "--json", file)
    assert done.returncode == 0, done.stderr
    lines = json.loads(file.read_text())["results"]
    assert {line["layer"] for line in lines} == {"192 x 192"}
    assert all(line["hpclr"] > 0 and line["bound"] > 0 for line in lines)
