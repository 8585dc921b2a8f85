"""torch.compile before and after conversion, and through changes of rank."""

import pytest
import torch
from lowrank_helpers import assert_near, converted, gradients_of, small_net, some_loss
from torch import nn

from hpclr.lowrank import densify, factorize


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def conv_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2, padding="same"))


def results(forward, model, x):
    model.zero_grad()
    y = forward(x)
    some_loss(y).backward()
    return y.detach(), gradients_of(model)


def assert_same_results(compiled, model, x):
    for found, expected in zip(results(compiled, model, x), results(model, model, x), strict=True):
        assert_near(found, expected)


CASES = {"linear": (small_net, (300, 12)), "conv": (conv_net, (4, 3, 12, 12))}


@pytest.mark.parametrize(("make", "shape"), CASES.values(), ids=CASES)
def test_a_converted_model_is_one_graph_and_follows_its_ranks(make, shape):
    model = converted(make(), 2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(shape)
    assert_same_results(compiled, model, x)
    factorize(model, 1)
    assert_same_results(compiled, model, x)


def test_a_compiled_model_is_converted_afterwards_and_back():
    model = small_net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(300, 12)
    assert_same_results(compiled, model, x)
    assert any(report.converted for report in factorize(compiled, 3))
    assert model[0].sigma.shape == (3, 3)
    assert_same_results(compiled, model, x)
    densify(compiled)
    assert type(model[0]) is nn.Linear
    assert_same_results(compiled, model, x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "shape"),
    [*CASES.values(), (lambda: nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), (3, 5, 16))],
)
def test_with_the_default_backend(make, shape):
    model = make()
    compiled = torch.compile(model)
    x = torch.randn(shape)
    assert_same_results(compiled, model, x)
    for rank in (3, 2):
        factorize(model, rank)
        assert_same_results(compiled, model, x)
    with torch.no_grad():
        model.eval()
        assert_near(compiled(x), model(x))
