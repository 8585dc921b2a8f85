"""Real data for real runs: scikit-learn's digits, prepared once by the command line."""

from pathlib import Path

import pytest
import torch
from training_helpers import Bench, hpclr


@pytest.fixture(autouse=True)
def _one_thread():
    """Small models are quickest on one thread, and one thread gives the same bits everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """300 pictures to train on, so that an epoch of batches of 64 has five steps, the last of them smaller."""
    path = tmp_path_factory.mktemp("data") / "digits.h5"
    done = hpclr("data", "prepare", "digits", path, "--valid-fraction", "0.1", "--limit", "300")
    assert done.code == 0, done.err
    return path


@pytest.fixture
def bench(digits, tmp_path, monkeypatch) -> Bench:
    """An empty current directory in which to train."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPCLR_RUNS", raising=False)
    return Bench(tmp_path, digits)
