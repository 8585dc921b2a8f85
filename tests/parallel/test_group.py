"""The collectives of a group of processes."""

import pytest
from together import together


@pytest.mark.parametrize("size", [2, 3])
def test_collectives(size):
    results = together(size, "collectives.py")
    for rank, got in enumerate(results):
        first = rank == 0
        assert got["eval_mode"] == results[0]["eval_mode"]
        assert "a forward pass that went around the replica" in got["went_around"][1].lower()
        assert got["sum"] == [size, sum(range(size))]
        assert got["gather"] == [[r] * r for r in range(size)]
        assert got["broadcast"] == [{"from": size - 1}, [size - 1] * 3]
        assert got["exchange"] == [[r, [r]] for r in range(size)]
        assert got["moved"] == (["hello", [0, 1, 2, 3]] if first else None)
        assert got["on_first"] == [0, "first"]
        assert got["on_first_fails"] == ["RetryableError", "wrong on 0", not first]
        assert got["together"] == rank
        assert got["together_fails"] == ["UsageError", f"rank 1 of {size}: wrong on 1", not first]
        assert got["all_fail"] == ["UsageError", "wrong on 0", not first]
        assert got["equal"] is None
        name, message, _ = got["drifted"]
        assert name == got["kind"]
        assert ("ranks 1 differ from the other 2" if size == 3 else "no majority") in message
