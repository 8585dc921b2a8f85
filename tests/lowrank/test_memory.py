"""What autograd keeps between the forward and the backward pass."""

import weakref

import pytest
import torch
from lowrank_helpers import converted
from torch import nn

CASES = {
    "linear": (lambda: nn.Linear(64, 48), (200, 64), 200),
    "linear on sequences": (lambda: nn.Linear(64, 48), (10, 20, 64), 200),
    "conv": (lambda: nn.Conv2d(16, 24, 3, padding=1), (4, 16, 10, 10), 400),
    "conv same": (lambda: nn.Conv2d(16, 24, 3, padding="same"), (4, 16, 10, 10), 400),
    "conv in groups": (lambda: nn.Conv2d(16, 24, 3, padding=1, groups=2), (4, 16, 10, 10), 800),
}


def kept_by_autograd(layer: nn.Module, x: torch.Tensor) -> int:
    """Elements of all tensors saved for the backward pass, the layer's own parameters left out."""
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(size for pointer, size in sizes.items() if pointer not in own)


@pytest.mark.parametrize("input_has_gradient", [True, False])
@pytest.mark.parametrize(("make", "shape", "rows"), CASES.values(), ids=CASES)
def test_only_the_narrow_projection_is_kept(make, shape, rows, input_has_gradient):
    rank = 3
    dense = make()
    low = converted(dense, rank)
    x = torch.randn(shape, requires_grad=input_has_gradient)
    filters = low.vh.numel() * getattr(low, "groups", 1)
    assert kept_by_autograd(dense, x) >= x.numel()
    assert kept_by_autograd(low, x) <= rows * rank + filters
    assert kept_by_autograd(low, x) < x.numel() / 2


@pytest.mark.parametrize(("make", "shape", "rows"), CASES.values(), ids=CASES)
def test_the_input_is_gone_once_nobody_else_needs_it(make, shape, rows):
    low = converted(make(), 3)
    x = torch.randn(shape, requires_grad=True) + 1
    gone = weakref.ref(x)
    y = low(x)
    del x
    assert gone() is None
    y.sum().backward()


@pytest.mark.parametrize("rank", [3, 12, 24])
@pytest.mark.parametrize("groups", [1, 2])
def test_behind_a_relu_nothing_is_kept_beside_what_the_relu_keeps(rank, groups):
    """ReLU keeps its result, the convolution's input, for itself: what else is kept comes on top of the dense one's."""
    dense = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1, groups=groups))
    low = nn.Sequential(dense[0], dense[1], converted(dense[2], rank))
    x = torch.randn(16, 3, 16, 16)
    assert kept_by_autograd(low, x) <= kept_by_autograd(dense, x) + low[2].vh.numel() * groups


def test_behind_a_relu_the_narrow_projection_is_kept_where_the_weight_was_larger():
    """As in the last layers of a VGG: many channels, few positions; to compute it again would only cost time."""
    low = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), converted(nn.Conv2d(64, 64, 3, padding=1), 8))
    x = torch.randn(2, 3, 4, 4)
    narrow = 2 * 4 * 4 * 8
    assert kept_by_autograd(low, x) >= x.numel() + 2 * 64 * 16 + narrow


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_right_where_the_projection_is_computed_again(groups):
    low = converted(nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=groups).double(), 3)
    x = torch.randn(2, 4, 7, 5, dtype=torch.float64, requires_grad=True)
    sigma = low.sigma.detach().clone().requires_grad_()

    def layer(x, sigma):
        return torch.func.functional_call(low, {"sigma": sigma}, (torch.sigmoid(x),))

    assert torch.sigmoid(x).grad_fn is not None
    assert torch.autograd.gradcheck(layer, (x, sigma))
    assert torch.autograd.gradgradcheck(layer, (x, sigma))
