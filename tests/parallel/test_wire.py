"""What travels between processes arrives as it was; digests tell tensors apart; layers are shared out evenly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpclr.errors import RetryableError, UsageError
from hpclr.methods.placement import Outcome
from hpclr.parallel.digest import digest
from hpclr.parallel.group import Group
from hpclr.parallel.placement import _flat, _outcomes, largest_first
from hpclr.parallel.wire import pack, unpack

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def test_value_and_tensors_arrive_to_the_bit():
    torch.manual_seed(0)
    tensors = [torch.randn(3, 5).mul(9).to(dtype) for dtype in DTYPES]
    tensors += [torch.tensor(2.5), torch.zeros(0, 4), torch.randn(6, 4).T, torch.tensor([float("nan"), -0.0])]
    value = {"a": [1, 0.1, None, "é"], "b": True}
    found, received = unpack(pack(value, tensors, CPU))
    assert found == value
    for sent, got in zip(tensors, received, strict=True):
        assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
        assert torch.equal(got.reshape(-1).view(torch.uint8), sent.contiguous().reshape(-1).view(torch.uint8))
        assert got.is_contiguous()


@given(st.text(), st.floats(allow_nan=False))
def test_text_and_numbers_arrive(text, number):
    assert unpack(pack([text, number], [], CPU)) == ([text, number], [])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.complex64])
def test_any_changed_element_changes_the_digest(dtype):
    tensor = torch.zeros(40_000, dtype=dtype)
    before = digest([tensor])
    for place in (0, 1, 16_383, 16_384, 32_768, 39_999):
        changed = tensor.clone()
        changed[place] = 1
        assert digest([changed]) != before


@pytest.mark.parametrize("dtype", DTYPES[:4])
def test_changed_signs_change_the_digest(dtype):
    """Of a singular vector, say: an even number of them, in the highest bit of each word."""
    tensor = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    flipped = tensor.clone()
    flipped[:, 3] *= -1
    assert len({digest([tensor]), digest([flipped]), digest([-tensor])}) == 3


def test_order_shape_and_place_count():
    a, b = torch.zeros(3), torch.ones(3)
    assert digest([a, b]) != digest([b, a])
    assert digest([torch.zeros(3)]) != digest([torch.zeros(4)])
    rows = torch.zeros(16_384 * 65)  # more than one block of rows
    one, other = rows.clone(), rows.clone()
    one[5], other[16_384 * 64 + 5] = 1, 1
    assert len({digest([rows]), digest([one]), digest([other])}) == 3


def test_the_digest_does_not_depend_on_threads_or_strides():
    matrix = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        found = set()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found |= {digest([matrix]), digest([matrix.T.contiguous().T])}
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_the_largest_layers_are_shared_out_first():
    owners = largest_first({"a": 1.0, "b": 7.0, "c": 4.0, "d": 4.0}, 2)
    assert owners == {"a": 0, "b": 0, "c": 1, "d": 1}
    assert list(owners) == ["a", "b", "c", "d"]


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=40), st.integers(1, 8))
def test_no_plan_is_much_worse_than_the_best(costs, size):
    """Graham's bound, against what no plan can be better than."""
    plan = largest_first({str(i): cost for i, cost in enumerate(costs)}, size)
    loads = [sum(cost for i, cost in enumerate(costs) if plan[str(i)] == rank) for rank in range(size)]
    assert max(loads) <= sum(costs) / size + max(costs) * (1 - 1 / size) + 1e-9


def test_outcomes_arrive():
    from hpclr.lowrank.factors import svd

    basis = svd(torch.randn(4, 3))
    sent = {
        "a": Outcome(3, 0.25, basis),
        "b": Outcome(2, None, None, noise=0.5),
        "c": Outcome(1, None, None, None, "nan"),
    }
    got = _outcomes(*unpack(pack(*_flat(sent), CPU)))
    assert got["b"] == sent["b"]
    assert got["c"] == sent["c"]
    assert (got["a"].rank, got["a"].stability) == (3, 0.25)
    assert all(map(torch.equal, got["a"].basis, basis))


def test_a_process_alone_is_a_group():
    group = Group()
    tensor = torch.ones(2)
    assert (group.rank, group.size, group.is_first) == (0, 1, True)
    assert group.sum(tensor) is tensor
    assert group.gather("x") == ["x"]
    assert list(group.exchange(1, [tensor])) == [(1, [tensor])]
    assert group.on_first(lambda: 3) == group.together(lambda: 3) == 3
    for kind in (UsageError, RetryableError):
        with pytest.raises(kind):
            group.together(_raising(kind))


def _raising(kind):
    def fail():
        raise kind("no")

    return fail
