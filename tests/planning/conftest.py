import pytest
import torch


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """An empty current directory, and one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPCLR_RUNS", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
