"""Autocast and models in 16 bits."""

import pytest
import torch
from lowrank_helpers import assert_near, converted, dense_twin, gradients_of, some_loss
from torch import nn

CASES = {
    "linear": (lambda: nn.Linear(32, 24), (64, 32)),
    "conv": (lambda: nn.Conv2d(8, 12, 3, padding=1, groups=2), (4, 8, 6, 6)),
    "attention": (lambda: nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), (3, 5, 16)),
}


layers = pytest.mark.parametrize(("make", "shape"), CASES.values(), ids=CASES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@layers
def test_autocast_as_for_the_dense_layer(make, shape, dtype, order):
    low = converted(make(), 4)
    twin = dense_twin(low)
    x = torch.randn(shape)
    results = []
    for model in (low, twin):
        with torch.autocast("cpu", dtype):
            y = model(x)
        some_loss(y).backward()
        results.append(y)
    assert results[0].dtype == results[1].dtype
    assert_near(results[0].float(), results[1].float(), 3e-2)
    for parameter in low.parameters():
        assert parameter.dtype == torch.float32
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@layers
def test_gradients_under_autocast_are_near_those_without(make, shape, dtype, order):
    low = converted(make(), 4)
    x = torch.randn(shape)
    gradients = []
    for enabled in (True, False):
        low.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            y = low(x)
        some_loss(y).backward()
        gradients.append(gradients_of(low))
    assert_near(*gradients, 3e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@layers
def test_models_in_16_bits_convert_and_train(make, shape, dtype, order):
    model = make().to(dtype)
    x = torch.randn(shape).to(dtype)
    low = converted(model)
    assert_near(low(x), model(x), 3e-2)
    some_loss(low(x)).backward()
    for parameter in low.parameters():
        assert parameter.dtype == dtype
        if parameter.requires_grad:
            assert parameter.grad.dtype == dtype
            assert parameter.grad.isfinite().all()


def test_float64_input_under_autocast_is_treated_as_torch_treats_it():
    layer = nn.Linear(8, 6).double()
    x = torch.randn(4, 8).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert converted(layer, 2)(x).dtype == layer(x).dtype == torch.float64
