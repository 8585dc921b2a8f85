from collections.abc import Iterator

import pytest
import torch

from hpclr.lowrank import product


@pytest.fixture(autouse=True)
def one_thread_and_a_seed() -> Iterator[None]:
    """Small matrices are quickest on one thread, and one thread gives the same bits everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["through", "rebuild"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both orders of multiplication, whatever the sizes would choose."""
    monkeypatch.setattr(product, "through_factors", lambda *sizes, **options: request.param == "through")
    return request.param
