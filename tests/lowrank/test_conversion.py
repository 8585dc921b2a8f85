"""Factors in the place of a weight compute what the weight computed: outputs and gradients, every layer type."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lowrank_helpers import LAYERS, LINEAR, TOLERANCE, assert_near, converted, dense_twin, distance, only_site
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from hpclr.lowrank import factorize, product
from hpclr.lowrank.product import ConvGeometry, Factors, convolution, linear, through_factors

CASES = [pytest.param(make, x, id=name) for name, (make, x) in LAYERS.items()]
NOT_EMPTY = [case for case in CASES if 0 not in case.values[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("make", "x_shape"), NOT_EMPTY)
def test_full_rank_preserves_the_function(make, x_shape, dtype, order):
    layer = make().to(dtype)
    x = torch.randn(x_shape).to(dtype)
    assert_near(converted(layer)(x), layer(x))


@pytest.mark.parametrize(("make", "x_shape"), NOT_EMPTY)
def test_a_cut_layer_equals_its_dense_form(make, x_shape, order):
    layer = converted(make().double(), 2)
    x = torch.randn(x_shape, dtype=torch.float64)
    assert only_site(layer).rank == 2
    assert_near(layer(x), dense_twin(layer)(x))
    assert_near(layer.eval()(x), dense_twin(layer)(x))


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize(("make", "x_shape"), NOT_EMPTY)
def test_gradients_are_those_of_the_dense_layer(make, x_shape, rank, order):
    layer = converted(make().double(), rank)
    twin = dense_twin(layer)
    site = only_site(layer)
    x, x_twin = (torch.randn(x_shape, dtype=torch.float64).requires_grad_() for _ in range(2))
    x_twin.data.copy_(x.data)
    y, y_twin = layer(x), twin(x_twin)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    y_twin.backward(upstream)
    u, _, vh = site.factors
    assert_near(x.grad, x_twin.grad)
    assert_near(site.parameter.grad, u.mT @ site.to_matrix(twin.weight.grad) @ vh.mT)
    if layer.bias is not None:
        assert_near(layer.bias.grad, twin.bias.grad)
    assert u.grad is None
    assert vh.grad is None


@pytest.mark.parametrize(("make", "x_shape"), [case for case in CASES if case not in NOT_EMPTY])
def test_an_empty_batch_passes_both_ways(make, x_shape, order):
    layer = make()
    twin = converted(layer, 2)
    y = twin(torch.randn(x_shape, requires_grad=True))
    assert y.shape == layer(torch.randn(x_shape)).shape
    y.sum().backward()
    assert only_site(twin).parameter.grad.count_nonzero() == 0


def random_factors(m: int, n: int, k: int) -> Factors:
    u, vh = torch.linalg.qr(torch.randn(m, k).double())[0], torch.linalg.qr(torch.randn(n, k).double())[0].mT
    return Factors(u, torch.randn(k, k).double().requires_grad_(), vh.contiguous())


@pytest.mark.parametrize("rows", [2, 9], ids=["folded late", "folded into U"])
def test_linear_has_right_first_and_second_derivatives(rows, order):
    u, sigma, vh = random_factors(5, 6, 3)
    x, bias = torch.randn(rows, 6).double().requires_grad_(), torch.randn(5).double().requires_grad_()

    def function(x, sigma, bias):
        return linear(x, Factors(u, sigma, vh), bias)

    assert torch.autograd.gradcheck(function, (x, sigma, bias))
    assert torch.autograd.gradgradcheck(function, (x, sigma, bias))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("spatial", [1, 2])
def test_convolution_has_right_first_and_second_derivatives(groups, spatial, order):
    kernel, size = (3, 2)[:spatial], (6, 3)[:spatial]
    u, sigma, vh = random_factors(4, 4 // groups * torch.Size(kernel).numel(), 2)
    x, bias = torch.randn(1, 4, *size).double().requires_grad_(), torch.randn(4).double().requires_grad_()
    geometry = ConvGeometry(kernel, (2, 1)[:spatial], (1, 0)[:spatial], (1, 1)[:spatial], groups)

    def function(x, sigma, bias):
        return convolution(x, Factors(u, sigma, vh), bias, geometry)

    assert torch.autograd.gradcheck(function, (x, sigma, bias))
    assert torch.autograd.gradgradcheck(function, (x, sigma, bias))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradients_of_single_samples_by_vmap(kind, order):
    layer, x = (nn.Linear(6, 5), torch.randn(7, 6)) if kind == "linear" else (nn.Conv1d(4, 5, 3), torch.randn(7, 4, 9))
    layer = converted(layer.double(), 3)
    x = x.double()
    parameters = dict(layer.named_parameters())

    def loss(sigma, sample):
        output = torch.func.functional_call(layer, parameters | {"sigma": sigma}, (sample.unsqueeze(0),))
        return output.square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters["sigma"], x)
    for gradient, sample in zip(found, x, strict=True):
        (expected,) = torch.autograd.grad(layer(sample.unsqueeze(0)).square().sum(), parameters["sigma"])
        assert_near(gradient, expected)


SMALL = {"linear": (nn.Linear, (6, 5), (7, 6)), "conv": (nn.Conv1d, (4, 6, 3), (7, 4, 9))}


@pytest.mark.parametrize("kind", SMALL)
def test_forward_mode_and_hessians_are_those_of_the_dense_layer(kind, order):
    make, sizes, shape = SMALL[kind]
    layer, x, along = converted(make(*sizes).double(), 2), torch.randn(shape).double(), torch.randn(shape).double()
    dense = dense_twin(layer)
    assert_near(*(torch.func.jvp(f, (x,), (along,))[1] for f in (layer, dense)))
    with forward_ad.dual_level():
        assert_near(*(forward_ad.unpack_dual(f(forward_ad.make_dual(x, along))).tangent for f in (layer, dense)))
    assert_near(*(torch.func.hessian(lambda x, f=f: f(x).square().sum())(x[:1]) for f in (layer, dense)))


@pytest.mark.parametrize("kind", SMALL)
def test_torch_func_differentiates_with_regard_to_whatever_it_is_told_to(kind, order):
    """Frozen factors included: there `requires_grad` means nothing."""
    make, sizes, shape = SMALL[kind]
    layer, x = converted(make(*sizes).double(), 2), torch.randn(shape).double()
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(parameters)
    layer(x).square().sum().backward()
    assert_near(found["sigma"], layer.sigma.grad)
    along = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    _, slope = torch.func.jvp(loss, (parameters,), (along,))
    assert_near(slope, sum((found[name] * along[name]).sum() for name in along))
    assert all(gradient.count_nonzero() for gradient in found.values())


@pytest.mark.parametrize("kind", SMALL)
def test_gradients_of_many_outputs_at_once(kind, order):
    make, sizes, shape = SMALL[kind]
    layer, x = converted(make(*sizes).double(), 2), torch.randn(shape).double().requires_grad_()
    y = layer(x)
    several, wanted = torch.randn(3, *y.shape).double(), (x, layer.sigma, layer.bias)
    found = torch.autograd.grad(y, wanted, several, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(several):
        for batched, expected in zip(found, torch.autograd.grad(y, wanted, one, retain_graph=True), strict=True):
            assert_near(batched[i], expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_forward_pass_asks_for_nothing_that_is_kept_for_the_backward_pass(groups):
    """Where what is kept is computed again, as by checkpointing, or lies elsewhere, that would be done in vain."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), converted(nn.Conv2d(4, 6, 3, groups=groups), 2))
    asked = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: (asked.append(1), tensor)[1]):
        y = model(torch.randn(5, 4, 20, 20))
    assert not asked
    y.sum().backward()
    assert asked


@pytest.mark.parametrize("compiled", [False, True])
def test_channels_stay_last_in_memory(compiled, order):
    """Else the backward pass would compute in the other layout, and take twice as long."""
    layer, x, layout = converted(nn.Conv2d(4, 6, 3), 2), torch.randn(2, 4, 9, 8), torch.channels_last
    forward = torch.compile(layer, backend="aot_eager") if compiled else layer
    wanted = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x)[0]
    x = x.detach().to(memory_format=layout).requires_grad_()
    y = forward(x)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    assert y.is_contiguous(memory_format=layout)
    assert found.is_contiguous(memory_format=layout)
    assert_near(found, wanted)


def test_wrong_input_gets_torchs_own_error(order):
    layer = converted(nn.Conv2d(4, 6, 3), 2)
    with pytest.raises(RuntimeError, match="to have 4 channels, but got 3"):
        layer(torch.randn(2, 3, 8, 8))


class Scaled(nn.Linear):
    """Computes something of its own from the weight."""

    def forward(self, x):
        return F.linear(x, self.weight * 2, self.bias)


class Standardised(nn.Conv2d):
    """Weight standardisation, as in big-transfer ResNets."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Renamed(nn.Linear):
    """A subclass without a forward pass of its own gets the quick one."""


@pytest.mark.parametrize(
    ("layer", "x_shape"), [(Scaled(8, 6), (4, 8)), (Standardised(4, 6, 3), (2, 4, 8, 8)), (Renamed(8, 6), (4, 8))]
)
def test_subclasses_keep_their_own_forward_pass(layer, x_shape):
    x = torch.randn(x_shape)
    twin = converted(layer)
    assert isinstance(twin, type(layer))
    assert_near(twin(x), layer(x))
    twin(x).square().sum().backward()
    assert twin.sigma.grad.abs().sum() > 0
    assert type(dense_twin(twin)) is type(layer)


def test_transposed_weight_of_hugging_face():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = conv1d(9, 12).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    for rank in (None, 3):
        low = converted(layer, rank)
        twin = dense_twin(low)
        assert type(twin) is conv1d
        assert twin.weight.shape == (12, 9)
        assert_near(low(x), twin(x))
        twin(x).square().sum().backward()
        low(x).square().sum().backward()
        assert_near(low.sigma.grad, low.u.mT @ twin.weight.grad.mT @ low.vh.mT)
    assert_near(converted(layer)(x), layer(x))


def test_a_second_factorize_only_cuts():
    layer = converted(nn.Linear(12, 9).double(), 6)
    best = torch.linalg.svdvals(layer.weight.detach())
    before = layer.weight.detach().clone()
    factorize(layer, 8)
    assert layer.sigma.shape == (6, 6)
    factorize(layer, 4)
    assert layer.sigma.shape == (4, 4)
    error = torch.linalg.norm(layer.weight - before)  # Eckart-Young: the best of rank 4
    torch.testing.assert_close(error.detach(), best[4:].square().sum().sqrt())


def test_rounding_of_bfloat16_does_not_grow_with_depth_of_cuts():
    layer = nn.Linear(48, 48).bfloat16()
    low = converted(layer)
    for rank in range(47, 24, -1):
        factorize(low, rank)
    u, s, vh = torch.linalg.svd(layer.weight.float())
    best = (u[:, :25] * s[:25]) @ vh[:25]
    assert distance(low.weight, best) < TOLERANCE[torch.bfloat16]


SIZES = [(m, n, k) for m, n in ((48, 48), (96, 24), (24, 96)) for k in (2, 8, 24)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rows", [1, 30, 2000])
def test_the_order_chosen_takes_fewer_operations(rows, training, monkeypatch):
    for m, n, k in SIZES:
        x, factors = torch.randn(rows, n, requires_grad=training), random_factors(m, n, k)
        factors = Factors(*(factor.detach().float() for factor in factors))
        factors.sigma.requires_grad_(training)
        counted = {through: operations(x, factors, through, monkeypatch) for through in (True, False)}
        chosen = through_factors(rows, m, n, k, training=training)
        assert counted[chosen] <= 1.1 * counted[not chosen], (m, n, k)


def operations(x, factors, through, monkeypatch):
    with monkeypatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr(product, "through_factors", lambda *sizes, **options: through)
        y = linear(x, factors, None)
        if y.requires_grad:
            y.sum().backward()
    return counter.get_total_flops()


def test_the_comparison_used_throughout_can_fail():
    make, x_shape = LINEAR["square"]
    layer = make()
    other = copy.deepcopy(layer)
    other.weight.data.mul_(1.001)
    x = torch.randn(x_shape)
    assert distance(other(x), layer(x)) > TOLERANCE[torch.float32]
