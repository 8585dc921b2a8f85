"""Fine-tuning on real text: what EDoRA and SARA are worth beside LoRA."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "finetuning.py"
SETTINGS = {"methods": "lora,edora,sara", "threads": 1}  # some ten minutes
SPREAD = 0.5  # points, over seeds


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Method → its accuracies (%), one a seed, and how many parameters it trains beside the head's."""
    file = tmp_path_factory.mktemp("finetuning") / "glosses.json"
    options = [text for key, value in SETTINGS.items() for text in (f"--{key}", str(value))]
    line = [sys.executable, SCRIPT, "glosses", "--json", file, *options]
    done = subprocess.run(line, capture_output=True, text=True)
    if "the glosses need" in done.stderr or "LoRA comes from" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())["results"]


@pytest.mark.slow
def test_edora_comes_within_a_point_of_lora_with_a_third_of_its_parameters(results):
    edora, lora = results["edora"], results["lora"]
    assert edora["trained"] <= lora["trained"] / 3
    assert fmean(edora["accuracy"]) >= fmean(lora["accuracy"]) - 1


@pytest.mark.slow
def test_sara_is_no_worse_than_lora_with_no_more_parameters(results):
    sara, lora = results["sara"], results["lora"]
    assert sara["trained"] <= lora["trained"]
    assert fmean(sara["accuracy"]) >= fmean(lora["accuracy"]) - SPREAD
