"""The outcomes of a check go round in turns, and are applied between them: nobody holds those of a whole model."""

import pytest
from together import together

LAYERS, FACTORS = 12, (2 * 64 + 1) * 64 * 4  # of the program: layers, and bytes of U, s and V of one


@pytest.mark.parametrize("way", ["rank0", "spread"])
def test_a_conversion_is_shared_and_applied_two_layers_at_a_time(way):
    first, second = together(2, "sharing_in_turns.py", way)
    for one in (first, second):
        large = [size for size in one["sent"] if size > FACTORS / 2]
        assert len(large) == LAYERS / 2
        assert max(large) < 2.5 * FACTORS
        assert max(one["dense"]) == LAYERS
        assert min(one["dense"]) == 2  # when the last were sent, all others had been converted
    assert first == second
