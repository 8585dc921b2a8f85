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


@pytest.fixture(params=["through", "folded", "rebuild"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every order of multiplication, whatever the sizes would choose; "through" is by plain products."""
    monkeypatch.setattr(product, "through_factors", lambda *sizes, **options: request.param != "rebuild")
    monkeypatch.setattr(product, "_WORTH_FOLDING", 0 if request.param == "folded" else float("inf"))
    product._known_order.cache_clear()
    yield request.param
    product._known_order.cache_clear()
