"""Layers whose three factors are all trained: exact, countable, and at home wherever those with frozen bases are."""

import copy
import io
import pickle

import pytest
import torch
from lowrank_helpers import LAYERS, assert_near, case, dense_twin, distance, only_site, small_net
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hpclr.lowrank import count_flops, densify, factorize, load_state_dict, select, summarize, svd_layers
from hpclr.lowrank.interchange import check_factors, dense_state_dict, factored_weights, looks_factored
from hpclr.lowrank.svd_layers import CHANNEL, SPATIAL

FORMS = {"channel": CHANNEL, "spatial": SPATIAL}
MORE = {
    "Conv 2d all at once": case(
        nn.Conv2d, 6, 9, (2, 5), stride=(3, 2), padding=(3, 4), dilation=(2, 3), groups=3, x=(2, 6, 11, 17)
    ),
    "Conv 2d tall kernel": case(nn.Conv2d, 3, 9, (3, 1), stride=2, x=(2, 3, 9, 8)),  # the forms have the same shapes
    "Conv 2d as many": case(nn.Conv2d, 3, 9, 3, stride=(1, 2), padding=1, x=(2, 3, 9, 8)),
    "Conv 2d 1×1": case(nn.Conv2d, 4, 6, 1, stride=2, x=(2, 4, 9, 8)),
}
EVERY_LAYER = LAYERS | MORE
every_layer = pytest.mark.parametrize(("make", "shape"), EVERY_LAYER.values(), ids=EVERY_LAYER)
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture(params=["through", "rebuilt"])
def order(request, monkeypatch):
    """Both orders of multiplication, whatever the sizes would choose."""
    monkeypatch.setattr(svd_layers, "cheaper", lambda **operations: request.param == "through")
    return request.param


def with_trained_factors(model, form=CHANNEL, rank=None):
    twin = copy.deepcopy(model)
    sites = select(twin, kinds=form).eligible
    assert sites
    for site in sites:
        site.factorize(None if rank is None else min(rank, *site.shape))
    return twin


# --- the same function -----------------------------------------------------------------------------------------------


@every_form
@every_layer
def test_at_full_rank_it_is_the_dense_layer(make, shape, form, order):
    layer = make().double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = layer(x)
    twin = with_trained_factors(layer, form)
    found = twin(x)
    assert found.shape == expected.shape
    assert found.numel() == 0 or (found - expected).abs().max() <= 1e-12
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view(expected.shape)
    of_dense, of_factors = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (expected, found))
    assert torch.allclose(of_factors, of_dense, rtol=0, atol=1e-12)


@every_form
@every_layer
def test_at_any_rank_it_is_the_layer_of_its_product(make, shape, form, order):
    layer = with_trained_factors(make().double(), form, rank=2)
    layer.s.data *= torch.tensor([1.0, -0.5])[: len(layer.s)]  # signs are sound
    x = torch.randn(shape, dtype=torch.float64)
    twin = dense_twin(layer)
    assert type(twin) is type(make())
    assert (layer(x) - twin(x)).abs().sum() <= 1e-11
    assert torch.equal(layer.weight, twin.weight)


ATTENTION = {
    "packed": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    "separate": lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True),
    "no bias": lambda: nn.MultiheadAttention(8, 2, bias=False, batch_first=True),
}


@pytest.mark.parametrize(
    ("name", "same"), [("packed", True), ("packed", False), ("separate", False), ("no bias", True), ("no bias", False)]
)
def test_attention(name, same, order):
    layer = ATTENTION[name]().double()
    q = torch.randn(3, 5, 8, dtype=torch.float64)
    k, v = (q, q) if same else (torch.randn(3, 7, layer.kdim).double(), torch.randn(3, 7, layer.vdim).double())
    twin = with_trained_factors(layer)
    assert sum(site.is_lowrank for site in select(twin).eligible) == (4 if layer.kdim == 6 else 2)
    for found, expected in zip(twin(q, k, v), layer(q, k, v), strict=True):
        assert (found - expected).abs().max() <= 1e-12


def test_conv1d_of_transformers(order):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = conv1d(6, 10).double()
    twin = with_trained_factors(layer)
    x = torch.randn(4, 10, dtype=torch.float64)
    assert (twin(x) - layer(x)).abs().max() <= 1e-12
    assert_near(dense_twin(twin).weight, layer.weight)


def test_a_layer_with_a_forward_pass_of_its_own_reads_the_weight():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return nn.functional.conv2d(x, self.weight / self.weight.norm(), self.bias)

    layer = Scaled(3, 4, 2).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    for form in FORMS.values():
        assert (with_trained_factors(layer, form)(x) - layer(x)).abs().max() <= 1e-12


GRADIENTS = ["Linear wide", "Linear one vector", "Conv 1d stride, dilation", "Conv 2d groups", "Conv 2d all at once"]


@every_form
@pytest.mark.parametrize("name", [*GRADIENTS, "Conv 2d same"])
def test_gradients_by_finite_differences(name, form, order):
    make, shape = EVERY_LAYER[name]
    layer = with_trained_factors(make().double(), form, rank=2)
    layer.s.data[-1] = 0.0  # nothing happens at a singular value of zero
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def output(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    names = [name for name, _ in layer.named_parameters()]
    assert torch.autograd.gradcheck(output, (x, *layer.parameters()), fast_mode=True)


# --- what it is made of ----------------------------------------------------------------------------------------------


def test_s_is_the_parameter_that_was_the_weight():
    layer = nn.Conv2d(4, 6, (3, 2))
    weight, bias = layer.weight, layer.bias
    for form, u, vh in ((SPATIAL, (12, 5), (5, 12)), (CHANNEL, (6, 5), (5, 24))):
        site = select(layer, kinds=form).eligible[0]
        site.factorize(5)
        assert layer.s is weight
        assert site.parameter is weight
        assert [name for name, _ in layer.named_parameters()] == ["u", "s", "vh", "bias"]
        assert [tuple(p.shape) for p in layer.parameters()] == [u, (5,), vh, (6,)]
        assert all(p.requires_grad for p in layer.parameters())
        assert isinstance(layer, nn.Conv2d)
        assert repr(layer).startswith("SVDConv2d(4, 6")
        assert densify(layer) is layer
        assert (layer.weight, layer.bias) == (weight, bias)
        assert type(layer) is nn.Conv2d


def test_the_matrix_of_each_form_is_the_one_that_is_said():
    weight = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    layer = nn.Conv2d(3, 2, (4, 5))
    layer.weight.data = weight
    channel, spatial = (select(layer, kinds=form).eligible[0].to_matrix(weight) for form in (CHANNEL, SPATIAL))
    assert torch.equal(channel, weight.flatten(1))
    for n in range(2):
        for c in range(3):
            for h in range(4):
                for w in range(5):
                    assert spatial[n * 5 + w, c * 4 + h] == weight[n, c, h, w]


def test_the_forms_do_not_mix():
    model = small_net()
    select(model, kinds=CHANNEL).eligible[0].factorize(3)
    reasons = {report.name: report.reason for report in factorize(model, 2)}
    assert "factors with trained bases" in reasons["0"]
    assert isinstance(model[0].s, nn.Parameter)
    assert "factors with frozen bases" in select(model, kinds=CHANNEL).left_alone["2"]
    assert [site.name for site in select(model).eligible] == ["0", "2", "4"]


def test_a_cut_in_place():
    layer = with_trained_factors(nn.Linear(8, 6))
    parameters = list(layer.parameters())
    site = only_site(layer)
    site.convert(layer.u.data[:, :2], layer.s.data[:2], layer.vh.data[:2])
    assert site.rank == 2
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    layer(torch.randn(3, 8)).sum().backward()
    assert [p.grad.shape for p in parameters] == [p.shape for p in parameters]


def test_thawing_the_model_is_no_matter_here():
    layer = with_trained_factors(nn.Linear(8, 6), rank=2)
    layer.requires_grad_(False)
    assert not layer(torch.randn(2, 8)).requires_grad
    layer.requires_grad_(True)
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.u.grad is not None


def test_autocast_computes_in_its_type(order):
    layer = with_trained_factors(nn.Conv2d(4, 6, 3), SPATIAL, rank=3)
    x = torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    assert distance(found, layer(x)) < 2e-2
    found.float().sum().backward()
    assert layer.s.grad.dtype == torch.float32


def test_a_compiled_model_is_one_graph_and_follows_its_ranks():
    torch.compiler.reset()
    model = with_trained_factors(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(128, 6)), SPATIAL, 3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 6, 6)
    for rank in (3, 2):
        for site in select(model).eligible:
            u, s, vh = (factor.data for factor in site.factors)
            site.convert(u[:, :rank], s[:rank], vh[:rank])
        assert_near(compiled(x), model(x))
        compiled(x).sum().backward()
        assert model[0].u.grad.shape == (24, rank)
    torch.compiler.reset()


# --- sizes -----------------------------------------------------------------------------------------------------------


@every_form
@every_layer
@pytest.mark.parametrize("rank", [1, 3, None])
def test_operations_are_those_that_torch_counts(make, shape, form, rank):
    layer = with_trained_factors(make(), form, rank)
    x = torch.randn(shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    twin = dense_twin(layer)
    with FlopCounterMode(display=False) as dense, torch.no_grad():
        twin(x)
    summary = summarize(layer, example=x)
    assert summary.flops == counter.get_total_flops() == count_flops(layer, x)
    assert summary.dense_flops == dense.get_total_flops()
    # never more than dense, but for building the weight, which is 2 m n r
    (m, n), r = only_site(layer).shape, only_site(layer).rank
    assert summary.flops <= summary.dense_flops + 2 * m * n * r


def test_operations_of_both_decompositions():
    x = torch.randn(4, 8, 10, 12)
    channel, spatial = (
        with_trained_factors(nn.Conv2d(8, 16, (3, 5), stride=(2, 3)), form, 2) for form in (CHANNEL, SPATIAL)
    )
    positions, between = 4 * 4 * 3, 4 * 4 * 12
    assert count_flops(channel, x) == 2 * positions * 2 * (8 * 15 + 16)
    assert count_flops(spatial, x) == 2 * 2 * (between * 8 * 3 + positions * 16 * 5)


def test_everything_stored_is_trained():
    model = with_trained_factors(small_net(), rank=2)
    optimizer = torch.optim.Adam(model.parameters())
    summary = summarize(model, optimizer, torch.randn(5, 12))
    stored = 2 * (12 + 1 + 16) + 2 * (16 + 1 + 16) + 2 * (16 + 1 + 3) + 16 + 16 + 3
    assert summary.trainable == summary.stored == stored
    assert summary.dense == 12 * 16 + 16 * 16 + 16 * 3 + 16 + 16 + 3
    assert summary.gradient_bytes == 4 * stored
    assert summary.dense_gradient_bytes == 4 * summary.dense
    assert [layer.rank for layer in summary.layers] == [2, 2, 2]
    assert all(layer.converted for layer in summary.layers)


# --- copies, state dicts, other programs -----------------------------------------------------------------------------


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_form
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_a_file])
def test_copies(duplicate, form):
    model = with_trained_factors(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)), form, 3)
    twin = duplicate(model)
    x = torch.randn(2, 3, 8, 8)
    assert repr(twin) == repr(model)
    assert torch.equal(twin(x), model(x))
    assert all(p.requires_grad for p in twin.parameters())
    twin[0].s.data.zero_()
    assert model[0].s.abs().sum() > 0


@every_form
@every_layer
def test_a_fresh_model_takes_the_form_and_the_ranks_of_a_state_dict(make, shape, form):
    model = with_trained_factors(make(), form, 2)
    x = torch.randn(shape)
    for other in (make(), with_trained_factors(make(), form), with_trained_factors(make(), CHANNEL, 1)):
        load_state_dict(other, model.state_dict())
        assert only_site(other).rank == only_site(model).rank
        assert torch.equal(other(x), model(x))
        assert all(p.requires_grad for p in other.parameters())


def test_state_dicts_between_the_two_forms():
    frozen, trained = small_net(), with_trained_factors(small_net(), rank=3)
    factorize(frozen, 2)
    x = torch.randn(4, 12)
    for source, target in ((frozen, copy.deepcopy(trained)), (trained, copy.deepcopy(frozen))):
        load_state_dict(target, source.state_dict())
        assert torch.equal(target(x), source(x))
        assert repr(target) == repr(source)


def test_state_dicts_between_the_two_forms_of_attention():
    frozen, trained = (
        nn.MultiheadAttention(8, 2, kdim=6),
        with_trained_factors(nn.MultiheadAttention(8, 2, kdim=6), rank=3),
    )
    factorize(frozen, 2)
    load_state_dict(frozen, trained.state_dict())
    assert repr(frozen) == repr(trained)
    assert torch.equal(frozen.k_proj_s, trained.k_proj_s)


@every_form
def test_dense_weights_load_without_loss(form):
    dense = nn.Conv2d(4, 6, 3)
    low = with_trained_factors(nn.Conv2d(4, 6, 3), form, 2)
    low.load_state_dict(dense.state_dict())
    assert_near(low.weight, dense.weight)
    state = low.state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        low.load_state_dict(state | {"u": state["u"][1:]})


MODELS = {name: make for name, (make, _) in EVERY_LAYER.items()} | ATTENTION | {"net": small_net}


@every_form
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_dense_weights_are_made_of_the_state_dict_alone(make, form):
    low = with_trained_factors(make(), form, 2)
    layers = factored_weights(low)
    dense = dense_state_dict(low.state_dict(), layers)
    twin = dense_twin(low)
    assert list(dense) == list(twin.state_dict())
    for name, value in twin.state_dict().items():
        assert (dense[name] - value).abs().max() < 1e-6
        assert dense[name].is_contiguous()
    assert looks_factored(low.state_dict())
    assert any(layer.spatial for layer in layers.values()) == (form is SPATIAL and isinstance(low, nn.Conv2d))


def test_descriptions_that_do_not_fit_are_refused():
    low = with_trained_factors(nn.Conv2d(4, 6, (3, 2)), SPATIAL, 2)
    (layer,) = factored_weights(low).values()
    state = low.state_dict()
    check_factors(state, {"L": layer})
    for wrong in ({"s": state["s"][:1]}, {"s": state["s"][:, None]}, {"u": state["u"][1:]}, {"vh": state["vh"][0]}):
        with pytest.raises(ValueError, match="found shapes"):
            check_factors(state | wrong, {"L": layer})
