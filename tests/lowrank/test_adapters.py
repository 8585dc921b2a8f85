"""Adapted layers of every kind and form: what they compute, against the equations; merged, compiled, in 16 bits."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from adapter_helpers import ALPHA, EXPERTS, KINDS, as_if_trained, net, trained_parameters, with_adapters
from lowrank_helpers import assert_near, distance, small_net, some_loss
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hpclr.lowrank import LowRankWarning, count_flops, select, summarize
from hpclr.lowrank.adapters import FORMS, adapt, adapted_modules, edora, merge_adapters, remove_adapters, sara
from hpclr.lowrank.factors import svd

forms = pytest.mark.parametrize("form", FORMS)
can_merge = pytest.mark.parametrize("form", ["sara", "edora"])
kinds = pytest.mark.parametrize(("make", "shape"), KINDS.values(), ids=KINDS)


# --- what the layers compute ----------------------------------------------------------------------------------------


@forms
@kinds
def test_nothing_changes_at_the_start(make, shape, form):
    layer, x = make(), torch.randn(shape)
    before, weight = layer(x).detach(), layer.weight
    assert with_adapters(layer, form) is layer
    assert layer.weight is weight
    assert not weight.requires_grad
    assert distance(layer(x), before) <= 1e-6


@functools.cache
def reference(form):
    """W' as a differentiable function of what is trained, written from the equations; for float64."""

    def of_sara(layer, weight, p, x):
        return weight + p["sara_a"] @ torch.diag(p["sara_lambda"]) @ p["sara_b"]

    def of_edora(layer, weight, p, x):
        u, s, vh = svd(weight)
        r = len(p["edora_core"])
        moved = weight + ALPHA / r * u[:, :r] @ p["edora_core"] @ torch.diag(s[:r]) @ vh[:r]
        return p["edora_magnitude"][:, None] * moved / moved.detach().norm(dim=1, keepdim=True)

    def of_mo_sara(layer, weight, p, x):
        """For one input: the sum over the experts of whole matrices."""
        u, _, vh = svd(weight)
        lambdas = p["mo_sara_lambdas"]
        u, vh = u[:, : lambdas.shape[1]], vh[: lambdas.shape[1]]
        gates = torch.softmax((vh @ x) @ p["mo_sara_router_in"] * p["mo_sara_router_out"], 0)
        change = sum(g * u @ torch.diag(row) @ vh for g, row in zip(gates, lambdas, strict=True))
        return (1 + p["mo_sara_scale"])[:, None] * (weight + change)

    return {"sara": of_sara, "edora": of_edora, "mo_sara": of_mo_sara}[form]


def literal(form, layer, x, p):
    """The output of an adapted nn.Linear for x (rows, n), each row through its own W'."""
    weight = layer.weight.detach()
    return torch.stack([reference(form)(layer, weight, p, row) @ row + layer.bias for row in x])


@forms
def test_outputs_and_gradients_are_those_of_the_equations(form):
    layer = with_adapters(nn.Linear(9, 7).double(), form, 3, seed=1)
    layer.bias.requires_grad_(True)
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    twins = {name: p.detach().clone().requires_grad_() for name, p in trained_parameters(layer).items()}
    results = []
    for y, inputs in ((layer(x), trained_parameters(layer)), (literal(form, layer, x, twins), twins)):
        wanted = [x, *(p for name, p in inputs.items() if name != "bias")]
        results.append([y, *torch.autograd.grad(some_of(y), wanted)])
    assert len(results[0]) == 2 + len(layer.trained)
    for found, expected in zip(*results, strict=True):
        assert_near(found, expected, 1e-10)
    assert layer(x).shape == (5, 7)


def some_of(y):
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum()


@pytest.mark.parametrize("form", ["sara", "edora"])
@kinds
def test_every_kind_computes_what_its_weight_would(make, shape, form):
    """The class itself with W' in place of the weight."""
    layer, x = make().double(), torch.randn(shape).double()
    dense = copy.deepcopy(layer)
    with_adapters(layer, form, 2, seed=1)
    matrix = reference(form)(layer, layer.to_matrix(dense.weight.detach()), trained_parameters(layer), x)
    with torch.no_grad():
        dense.weight.copy_(layer.from_matrix(matrix))
    assert_near(layer(x), dense(x), 1e-10)


@pytest.mark.parametrize("name", ["Conv 2d circular", "Conv 1d stride, dilation", "Conv 2d unbatched", "Conv 2d same"])
def test_mo_sara_on_convolutions_routes_every_position(name):
    make, shape = KINDS[name]
    layer, x = make().double(), torch.randn(shape).double()
    by_position = copy.deepcopy(layer)  # a convolution with the n unit filters lays out what every position reads
    n = layer.weight[0].numel()
    by_position.weight = nn.Parameter(torch.eye(n).double().reshape(n, *layer.weight.shape[1:]))
    by_position.bias = None
    with_adapters(layer, "mo_sara", 2, seed=1)
    patches = by_position(x).movedim(-len(layer.kernel_size) - 1, -1)
    matrix = nn.Linear(n, len(layer.weight)).double()
    matrix.weight.data = layer.weight.detach().flatten(1)
    matrix.bias = layer.bias
    rows = literal("mo_sara", matrix, patches.flatten(0, -2), trained_parameters(layer))
    expected = rows.reshape(*patches.shape[:-1], -1).movedim(-1, -len(layer.kernel_size) - 1)
    assert_near(layer(x), expected, 1e-10)


# --- EDoRA's norms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_norms_are_those_of_the_whole_matrix(dtype):
    layer = with_adapters(nn.Linear(40, 30).to(dtype), "edora", 8, seed=2)
    for _ in range(3):
        weight, u, core, a = (layer.parameter(name).double() for name in ("weight", "edora_u", "edora_core", "edora_a"))
        expected = (weight + u @ core @ a).norm(dim=1)
        assert ((layer.row_norms().double() - expected) / expected).abs().max() < (
            1e-6 if dtype == torch.float32 else 1e-14
        )
        layer.edora_core.data *= 3


def test_row_norms_are_those_of_the_weight_that_the_layer_holds():
    """Also when it is not the one whose singular vectors the bases are."""
    layer = with_adapters(nn.Linear(9, 7).double(), "edora", 3, seed=2)
    layer.weight.data.normal_()
    expected = (layer.weight + layer.edora_u @ layer.edora_core @ layer.edora_a).norm(dim=1)
    assert_near(layer.row_norms(), expected.detach(), 1e-12)


def test_row_norms_are_exact_under_autocast_too():
    layer = with_adapters(nn.Linear(40, 30), "edora", 8, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        norms = layer.row_norms()
    assert torch.equal(norms, layer.row_norms())


@pytest.mark.parametrize("zeros", [1, 5, 7])
def test_rows_of_zeros_stay_finite_and_are_trained(zeros):
    layer = nn.Linear(9, 7)
    layer.weight.data[:zeros] = 0
    x, before = torch.randn(4, 9), None
    before = layer(x)
    with_adapters(layer, "edora", 4)
    assert_near(layer(x), before, 1e-6)
    optimizer = torch.optim.SGD(trained_parameters(layer).values(), 0.1)
    for _ in range(3):
        some_loss(layer(x)).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in layer.parameters())
    assert layer(x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_edora_begins_to_the_bit_where_the_weight_was(dtype):
    layer = with_adapters(nn.Linear(40, 30, bias=False).to(dtype), "edora", 8)
    x = torch.randn(16, 40).to(dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight))


def test_edora_begins_where_a_large_weight_in_float16_was():
    """Of products with singular values, which float16 could not hold."""
    module = nn.Linear(40, 30, bias=False)
    with torch.no_grad():
        module.weight.mul_(500)
    layer = with_adapters(module.half(), "edora", 8)
    x = (torch.randn(16, 40) / 50).half()
    assert torch.equal(layer(x), F.linear(x, layer.weight))


def test_a_core_at_zero_has_a_gradient_and_a_start_with_noise_is_near():
    layer = with_adapters(nn.Linear(9, 7), "edora", 3)
    some_loss(layer(torch.randn(4, 9))).backward()
    assert layer.edora_core.grad.abs().min() > 0
    weight = torch.randn(7, 9)
    start = edora.start(weight, svd(weight).leading(3), 16.0, 1e-5, torch.Generator().manual_seed(0))
    assert 0 < start["edora_core"].abs().max() < 1e-4
    assert_near(start["edora_u"], 16 / 3 * svd(weight).u[:, :3])


# --- what a forward and a backward pass take ------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 5, 50])
def test_one_product_with_the_weight_whatever_the_number_of_experts(experts, monkeypatch):
    monkeypatch.setattr("adapter_helpers.EXPERTS", experts)
    rows, m, n, k = 64, 40, 30, 4
    layer = with_adapters(nn.Linear(n, m), "mo_sara", k)
    assert layer.mo_sara_lambdas.shape == (experts, k)
    expected = 2 * rows * (m * n + k * n + m * k + k + experts + experts * k)
    assert count_flops(layer, torch.zeros(rows, n)) == expected


def test_edora_takes_one_product_with_the_weight_and_r_rows_for_the_norms():
    rows, m, n, r = 64, 40, 30, 4
    layer = with_adapters(nn.Linear(n, m), "edora", r)
    norms = 2 * (m * r * r + r * m * n + r * r * n + m * r * r)
    assert count_flops(layer, torch.zeros(rows, n)) == 2 * rows * (m * n + r * n + r * r + m * r) + norms
    with FlopCounterMode(display=False) as counter:
        with_adapters(nn.Linear(n, m), "sara", r)(torch.zeros(rows, n))
    assert counter.get_total_flops() == 2 * rows * (m * n + r * n + m * r)


MEMORY = {
    "linear": (lambda: nn.Linear(64, 8), (200, 64), 200),
    "sequences": (lambda: nn.Linear(64, 8), (10, 20, 64), 200),
    "conv": (lambda: nn.Conv2d(64, 8, 3, padding=1), (4, 64, 10, 10), 400),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("form", ["mo_sara", "edora"])
@pytest.mark.parametrize(("make", "shape", "rows"), MEMORY.values(), ids=MEMORY)
def test_frozen_bases_do_not_keep_the_input(make, shape, rows, form, autocast):
    layer, x = with_adapters(make(), form, 3), torch.randn(shape, requires_grad=True)
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, autocast):
        layer(x)
    weights = 2 * sum(parameter.numel() for parameter in layer.parameters())  # autocast's copies of them
    in_all = sum(size for pointer, size in kept.items() if pointer not in own)
    assert x.numel() > rows * (8 + 8 * 3)
    assert in_all <= rows * (8 + 8 * 3) + autocast * weights


@forms
@pytest.mark.parametrize(
    "name", ["Linear sequences", "Conv 2d circular", "Conv 2d unbatched", "Conv1D of Hugging Face"]
)
def test_compiled_without_a_break(form, name):
    make, shape = KINDS[name]
    torch.compiler.reset()
    layer, x = with_adapters(make(), form, 2, seed=1), torch.randn(shape)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for forward in (compiled, layer):
        layer.zero_grad()
        y = forward(x)
        some_loss(y).backward()
        results.append([y, *(p.grad for p in trained_parameters(layer).values() if p.grad is not None)])
    assert len(results[0]) > 2
    for found, expected in zip(*results, strict=True):
        assert_near(found, expected)
    torch.compiler.reset()


CASES_16 = {
    "linear": (lambda: nn.Linear(32, 24), (64, 32)),
    "conv": (lambda: nn.Conv2d(8, 12, 3, padding=1), (4, 8, 6, 6)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@forms
@pytest.mark.parametrize(("make", "shape"), CASES_16.values(), ids=CASES_16)
def test_autocast_as_for_the_layer_itself(make, shape, form, dtype):
    dense, x = make(), torch.randn(shape, requires_grad=True)
    layer = with_adapters(copy.deepcopy(dense), form, 4, seed=1)
    wanted = [x, *trained(layer)]
    expected = layer(x)
    gradients = torch.autograd.grad(some_loss(expected), wanted)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        assert y.dtype == dense(x).dtype
    assert_near(y.float(), expected, 3e-2)
    for found, gradient in zip(torch.autograd.grad(some_loss(y), wanted), gradients, strict=True):
        assert found.dtype == torch.float32
        assert distance(found, gradient) < 0.1


def trained(layer):
    return [p for name, p in trained_parameters(layer).items() if name != "bias"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@forms
@pytest.mark.parametrize(("make", "shape"), CASES_16.values(), ids=CASES_16)
def test_models_in_16_bits(make, shape, form, dtype):
    dense, x = make().to(dtype), torch.randn(shape).to(dtype)
    layer = with_adapters(copy.deepcopy(dense), form, 4)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert_near(layer(x), dense(x))
    some_loss(layer(x)).backward()
    assert all(p.grad.isfinite().all() for p in trained(layer))


@forms
def test_functional_transforms_see_the_frozen_weights_too(form):
    layer = with_adapters(nn.Conv2d(3, 4, 3).double(), form, 2, seed=1)
    x = torch.randn(2, 3, 6, 6).double()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(values):
        return torch.func.functional_call(layer, values, (x,)).square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients = torch.func.grad(loss)(parameters)
    y = layer(x)
    expected = torch.autograd.grad(y.square().sum(), trained(layer))
    for name, wanted in zip(layer.trained, expected, strict=True):
        assert_near(gradients[name], wanted, 1e-10)
    assert gradients["weight"].abs().sum() > 0


# --- merging --------------------------------------------------------------------------------------------------------


@can_merge
@kinds
def test_merged_computes_the_same_and_unmerged_is_as_it_was_to_the_bit(make, shape, form):
    layer, x = with_adapters(make(), form, 2, seed=1).eval(), torch.randn(shape)
    before, weight = layer(x), layer.weight.detach().clone()
    layer.merge()
    assert layer.is_merged
    assert not torch.equal(layer.weight, weight)
    assert distance(layer(x), before) <= 1e-5
    merged = layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.weight, merged)
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), before)


@can_merge
def test_a_merged_layer_is_its_own_class_at_work_and_refuses_to_be_trained(form):
    layer, x = with_adapters(nn.Linear(30, 40), form, 2, seed=1), torch.randn(5, 30)
    layer.merge()
    with pytest.raises(ValueError, match=r"Linear is merged: .*; unmerge before training"):
        layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert count_flops(layer, x) == 2 * 5 * 30 * 40
    assert "rank=2, merged" in repr(layer)
    layer.eval()
    assert layer(x.requires_grad_()).requires_grad  # to explain what it does, say


def test_mo_sara_cannot_be_merged_and_nothing_is():
    model = nn.Sequential(with_adapters(nn.Linear(8, 8), "sara"), with_adapters(nn.Linear(8, 8), "mo_sara"))
    with pytest.raises(ValueError, match=r"MoSARALinear cannot be merged: its router mixes .* for every input"):
        merge_adapters(model)
    assert not model[0].is_merged
    with pytest.raises(ValueError, match="cannot be merged"):
        remove_adapters(model, merge=True)
    assert [type(layer).__name__ for layer in model] == ["SARALinear", "MoSARALinear"]


@can_merge
def test_a_merged_model_in_16_bits_is_given_back_to_the_bit(form):
    layer = with_adapters(nn.Linear(30, 40).bfloat16(), form, 2, seed=1)
    weight = layer.weight.detach().clone()
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer.weight, weight)


# --- identity -------------------------------------------------------------------------------------------------------


@forms
def test_objects_names_hooks_and_classes_stay(form):
    layer = nn.Linear(8, 6)
    weight, bias, calls = layer.weight, layer.bias, []
    layer.register_forward_hook(lambda *_: calls.append(1))
    with_adapters(layer, form)
    assert isinstance(layer, nn.Linear)
    assert (layer.weight, layer.bias) == (weight, bias)
    layer(torch.randn(2, 8))
    assert calls == [1]
    assert list(layer._parameters)[:2] == ["weight", "bias"]
    assert set(trained_parameters(layer)) == {*layer.trained, "bias"}
    assert layer.rank == 2
    assert "rank=2" in repr(layer)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@forms
def test_copies_are_equal_and_independent(form, duplicate, merged):
    model, x = net(form, seed=1).eval(), torch.randn(4, 12)
    weights = [layer.weight.detach().clone() for _, layer in adapted_modules(model)]
    if merged and form != "mo_sara":
        merge_adapters(model)
    twin = duplicate(model)
    assert repr(twin) == repr(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(twin(x), model(x))
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    for _, layer in adapted_modules(model):
        layer.unmerge()
        layer.weight.data.zero_()
    for (_, layer), weight in zip(adapted_modules(remove_adapters(twin)), weights, strict=False):
        assert torch.equal(layer.weight, weight)


@forms
def test_thawing_the_whole_model_does_not_thaw_the_base(form):
    model = net(form)
    model.requires_grad_(True)
    with pytest.warns(LowRankWarning, match=r"weight .*of a \w+Linear had been set to require gradients; frozen again"):
        model(torch.randn(2, 12)).sum().backward()
    for _, layer in adapted_modules(model):
        assert [name for name, p in layer.named_parameters() if not p.requires_grad] == ["weight", *layer.frozen]


def test_what_cannot_be_adapted_says_so():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    attention = nn.MultiheadAttention(8, 2)
    for layer, reason in (
        (nn.LayerNorm(8), "LayerNorm has no adapted form"),
        (Own(8, 8), "a forward pass of its own"),
        (attention, "attention reads its weights itself"),
        (nn.Conv2d(4, 4, 3, groups=2), "a grouped convolution"),
        (net("sara")[0], "it has an adapter already"),
    ):
        with pytest.raises(ValueError, match=reason):
            adapt(layer, FORMS["sara"], {})


def test_sizes_tell_the_base_model_from_its_adapters():
    model, x = small_net(), torch.randn(5, 12)
    dense = summarize(model, example=x)
    with_adapters(model, "sara")
    adapted = summarize(model, example=x)
    added = sum(layer.parameter(name).numel() for _, layer in adapted_modules(model) for name in layer.trained)
    assert (adapted.stored, adapted.dense) == (dense.stored + added, dense.dense)
    assert adapted.dense_flops == dense.flops < adapted.flops
    assert adapted.dense_gradient_bytes == dense.gradient_bytes
    assert adapted.trainable == added + 16 + 16 + 3  # and the biases
    assert select(remove_adapters(model)).eligible


def test_a_start_does_not_depend_on_type():
    for dtype in (torch.bfloat16, torch.float64):
        weight = torch.randn(6, 5).to(dtype)
        a = sara.start(weight, 3, torch.Generator().manual_seed(1))["sara_a"]
        assert torch.equal(a, sara.start(weight.float(), 3, torch.Generator().manual_seed(1))["sara_a"])
        assert a.abs().max() <= 3**-0.5


def test_experts_are_as_many_as_asked_for():
    layer = with_adapters(nn.Linear(9, 7), "mo_sara", 3)
    as_if_trained(layer)
    assert sum(layer.parameter(name).numel() for name in layer.trained) == EXPERTS * 3 + 3 + EXPERTS + 7
