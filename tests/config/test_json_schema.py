"""What editors check run files by."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from hpclr.config.json_schema import as_text
from hpclr.config.yaml12 import read

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "run-file.schema.json"
JOBS = sorted(path for pattern in ("*.yaml", "paper/*.yaml") for path in (ROOT / "jobs").glob(pattern))


@pytest.fixture(scope="module")
def validator():
    return Draft202012Validator(json.loads(as_text()))


def test_the_file_is_the_one_that_the_schema_gives():
    assert FILE.read_text(encoding="utf-8") == as_text(), (
        "run `python -m hpclr.config.json_schema docs/run-file.schema.json`"
    )


def test_it_is_a_schema():
    Draft202012Validator.check_schema(json.loads(FILE.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", [path for path in JOBS if path.stem != "sweep"], ids=lambda path: path.stem)
def test_every_job_is_valid(path, validator):
    validator.validate(read(path.read_text(encoding="utf-8"), path.name).value)


@pytest.mark.parametrize(
    "change",
    [
        {"metod": {"name": "dense"}},
        {"method": {"name": "oialar"}},
        {"method": {"name": "oialr", "every": 1}},
        {"method": {"name": "oialr", "delay": 10, "every": 10, "cutof": 0.1}},
        {"train": {"epochs": "many"}},
        {"train": {"epochs": -1}},
        {"data": {"path": "x.h5"}},
    ],
)
def test_what_is_wrong_is_found(change, validator):
    whole = read((ROOT / "jobs" / "quickstart.yaml").read_text(encoding="utf-8"), "quickstart").value | change
    assert not validator.is_valid(whole)
