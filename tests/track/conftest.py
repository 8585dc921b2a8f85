"""Runs of the command line in this process, as in tests/training."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "training"))
from training_helpers import Bench


@pytest.fixture
def bench(few_digits, tmp_path, monkeypatch) -> Bench:
    """An empty current directory in which to train."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPCLR_RUNS", raising=False)
    return Bench(tmp_path, few_digits)
