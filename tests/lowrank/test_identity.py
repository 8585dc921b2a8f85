"""Conversion changes what a layer is made of; whoever holds the layer, its Parameter or the model notices nothing."""

import warnings

import pytest
import torch
from lowrank_helpers import assert_near, converted, dense_twin, only_site, small_net
from torch import nn

from hpclr.lowrank import LowRankWarning, densify, factorize, select


def mixed_model():
    return nn.ModuleDict(
        {
            "linear": nn.Linear(8, 6),
            "conv": nn.Conv2d(3, 8, 3),
            "attention": nn.MultiheadAttention(8, 2),
            "separate": nn.MultiheadAttention(8, 2, kdim=4, vdim=5),
        }
    )


def test_modules_names_and_other_parameters_stay_the_same_objects():
    model = mixed_model()
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    weights = {site.name: site.parameter for site in select(model).eligible}
    factorize(model, 2)
    assert dict(model.named_modules()) == modules
    for name, parameter in parameters.items():
        if "bias" in name:
            assert model.get_parameter(name) is parameter
    for site in select(model).eligible:
        assert site.is_lowrank
        assert site.parameter is weights[site.name]
        assert site.parameter.shape == (2, 2)


@pytest.mark.parametrize(
    ("layer", "cls"),
    [
        (nn.Linear(8, 6), nn.Linear),
        (nn.Conv1d(3, 4, 3), nn.Conv1d),
        (nn.MultiheadAttention(8, 2), nn.MultiheadAttention),
    ],
)
def test_classes_still_hold(layer, cls):
    factorize(layer)
    assert isinstance(layer, cls)
    assert type(layer) is not cls


def test_order_of_parameters_and_state():
    model = nn.Sequential(nn.Linear(8, 6), nn.Conv2d(3, 8, 3))
    factorize(model)
    order = [f"{layer}.{name}" for layer in (0, 1) for name in ("u", "sigma", "vh", "bias")]
    assert [name for name, _ in model.named_parameters()] == order
    assert list(model.state_dict()) == order
    densify(model)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_trained_parameters_come_in_the_order_they_had():
    model = mixed_model()
    before = list(model.parameters())
    factorize(model)
    after = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [id(p) for p in after] == [id(p) for p in before]


def test_weight_reads_as_the_dense_product():
    for layer in (nn.Linear(8, 6), nn.Conv2d(4, 8, 3, groups=2)):
        before = layer.weight.detach().clone()
        factorize(layer)
        assert_near(layer.weight, before)
        assert layer.weight.requires_grad
    attention = nn.MultiheadAttention(8, 2)
    factorize(attention)
    assert attention.in_proj_weight.shape == (24, 8)
    assert attention.q_proj_weight is None


def test_hooks_go_on_firing():
    model = small_net()
    calls = []
    model[0].register_forward_hook(lambda module, args, output: calls.append("forward"))
    model[0].register_forward_pre_hook(lambda module, args: calls.append("before"))
    model[0].register_full_backward_hook(lambda module, grad_in, grad_out: calls.append("backward"))
    factorize(model)
    model(torch.randn(2, 12, requires_grad=True)).sum().backward()
    assert calls == ["before", "forward", "backward"]


def test_a_hook_on_the_weight_parameter_sees_the_gradient_of_sigma():
    layer = nn.Linear(8, 6)
    shapes = []
    layer.weight.register_hook(lambda gradient: shapes.append(tuple(gradient.shape)))
    factorize(layer, 3)
    layer(torch.randn(2, 8)).sum().backward()
    assert shapes == [(3, 3)]


def test_a_module_under_two_names_is_converted_once():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    x = torch.randn(4, 8)
    before = model(x)
    reports = factorize(model)
    assert [(report.name, report.converted) for report in reports] == [("0", True)]
    assert model[0] is model[2]
    assert_near(model(x), before)


@pytest.mark.parametrize("change", [lambda model: factorize(model, 2), densify])
def test_a_graph_of_the_step_before_does_not_block_the_next_backward_pass(change):
    """A `loss` variable that outlives its step keeps gradient accumulators that remember the old shape."""
    model = converted(small_net(), 3) if change is densify else small_net()
    x = torch.randn(4, 12)
    kept = model(x).square().mean()
    kept.backward()
    change(model)
    loss = model(x).square().mean()
    loss.backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad.shape == parameter.shape
    assert kept.grad_fn is not None


def test_two_cuts_with_graphs_kept_alive():
    model = small_net()
    x = torch.randn(4, 12)
    graphs = []
    for rank in (8, 4, 3):
        graphs.append(model(x).square().mean())
        graphs[-1].backward()
        factorize(model, rank)
        torch.optim.SGD(model.parameters(), 0.1).step()
    assert model[2].sigma.shape == (3, 3)


def test_thawing_the_whole_model_does_not_thaw_the_bases():
    model = converted(small_net(), 2)
    model.requires_grad_(True)
    with pytest.warns(LowRankWarning, match="u and vh of a LowRankLinear had been set to require gradients"):
        model(torch.randn(2, 12)).sum().backward()
    for site in select(model).eligible:
        u, sigma, vh = site.factors
        assert (u.requires_grad, sigma.requires_grad, vh.requires_grad) == (False, True, False)
        assert u.grad is None
        assert sigma.grad is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 12))


def test_a_frozen_and_thawed_model_trains_as_before():
    layer = converted(nn.Linear(8, 6), 2)
    layer.requires_grad_(False)
    assert not layer(torch.randn(2, 8)).requires_grad
    layer.sigma.requires_grad_(True)
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.sigma.grad is not None


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(8, 6),
        lambda: nn.Conv2d(4, 6, 3),
        lambda: nn.MultiheadAttention(8, 2),
        lambda: nn.MultiheadAttention(8, 2, kdim=4),
    ],
)
def test_densify_gives_class_parameter_and_weight_back(make):
    layer = make()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    parameters = dict(layer.named_parameters())
    factorize(layer)
    assert densify(layer) is layer
    assert type(layer) is type(make())
    assert {name: id(p) for name, p in layer.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, before[name])
        assert value.is_contiguous()
    assert densify(layer) is layer  # and once more changes nothing


def test_the_printed_form_tells_the_rank():
    assert repr(converted(nn.Linear(8, 6), 2)) == "LowRankLinear(in_features=8, out_features=6, bias=True, rank=2)"
    assert "in_proj_rank=3" in repr(converted(nn.MultiheadAttention(8, 2), 3))
    assert repr(dense_twin(converted(nn.Linear(8, 6)))) == repr(nn.Linear(8, 6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_converted_model_changes_type_as_a_whole(dtype):
    model = converted(small_net(), 3).to(dtype)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    x = torch.randn(4, 12).to(dtype)
    assert_near(model(x), dense_twin(model)(x))
    model(x).float().square().mean().backward()
    assert model[0].sigma.grad.dtype == dtype


def test_half_and_back():
    model = converted(small_net(), 3)
    before = model[0].weight.detach().clone()
    assert model.half().float()[0].sigma.dtype == torch.float32
    assert_near(model[0].weight, before, 4e-3)


def test_a_second_conversion_keeps_the_parameter():
    layer = converted(nn.Linear(8, 6))
    sigma = layer.sigma
    factorize(layer, 2)
    assert only_site(layer).parameter is sigma
    assert sigma.requires_grad
