"""torch.compile before and after conversion, and through changes of rank."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from lowrank_helpers import LAYERS, assert_near, converted, gradients_of, small_net, some_loss
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from hpclr import OIALR
from hpclr.lowrank import densify, expect_rank_changes, factorize, fold, select
from hpclr.lowrank.product import through_factors
from hpclr.lowrank.svd_layers import CHANNEL, SPATIAL


@pytest.fixture(autouse=True)
def as_if_nothing_had_been_compiled():
    """Whatever other tests of this process have told torch: `expect_rank_changes` is for the whole process."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(force_parameter_static_shapes=True, recompile_limit=8):
        yield
    torch.compiler.reset()


@pytest.fixture
def ranks_may_change(as_if_nothing_had_been_compiled):
    expect_rank_changes()


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


class Block(nn.Module):
    """Of a transformer."""

    def __init__(self, dim=32):
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        y = self.before_attention(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.before_mlp(x))


NAMES = ["Linear sequences", "Conv 1d stride, dilation", "Conv 2d unbatched", "Conv 2d groups", "Conv 2d same, reflect"]
KINDS_OF_LAYER = {name: LAYERS[name] for name in NAMES} | {"Conv 3d": LAYERS["Conv 3d"], "Block": (Block, (3, 7, 32))}


def in_form(model, form, rank):
    for site in select(model, kinds=form).eligible:
        site.factorize(min(rank, *site.shape))
    return model


@pytest.mark.parametrize("name", KINDS_OF_LAYER)
def test_every_kind_of_layer_is_one_graph_in_training_and_evaluation(name):
    make, shape = KINDS_OF_LAYER[name]
    x = torch.randn(shape)
    for rank in (1, 100):
        layer = converted(make(), {1: 1}.get(rank))
        for training in (True, False):
            layer.train(training)
            compiled = torch.compile(layer, backend="eager", fullgraph=True)
            with torch.set_grad_enabled(training):
                assert_near(compiled(x), layer(x))
        folded = fold(layer).eval()
        assert_near(torch.compile(folded, backend="eager", fullgraph=True)(x), folded(x))


@pytest.mark.parametrize("form", [CHANNEL, SPATIAL], ids=["channel", "spatial"])
def test_trained_factors_are_one_graph(form):
    model, x = in_form(conv_net(), form, 2), torch.randn(4, 3, 12, 12)
    assert_same_results(torch.compile(model, backend="aot_eager", fullgraph=True), model, x)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_compiled_convolution_computes_each_gradient_once_and_keeps_no_input(groups):
    kept, operations = [], []

    def forward_graph(graph, inputs):
        results = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        kept.extend(node.meta["val"].shape for node in results[1:])
        return make_boxed_func(graph.forward)

    def backward_graph(graph, inputs):
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    layer, x = converted(nn.Conv2d(8, 6, 3, groups=groups), 2), torch.randn(4, 8, 9, 9, requires_grad=True)
    backend = aot_autograd(fw_compiler=forward_graph, bw_compiler=backward_graph)
    torch.compile(layer, backend=backend, fullgraph=True)(x).sum().backward()
    assert operations.count("aten.convolution_backward.default") == 1
    assert (4, 2 * groups, 7, 7) in kept
    assert x.shape not in kept


class Compilations:
    """A backend that counts."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def test_after_its_first_change_a_rank_is_a_variable(ranks_may_change):
    model, x = converted(Block(), 14), torch.randn(6, 10, 32)
    counter = Compilations()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    counts = []
    for rank in (14, 12, 11, 9, 3):
        factorize(model, {site.name: rank - (i % 2) for i, site in enumerate(select(model).eligible)})
        assert_near(compiled(x), model(x))
        counts.append(counter.count)
    assert counts == [1, 2, 2, 2, 2]


def test_without_being_told_torch_compiles_for_each_rank():
    model, x = converted(nn.Linear(32, 32), 14), torch.randn(6, 10, 32)
    counter = Compilations()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for rank in (14, 12, 11, 9):
        factorize(model, rank)
        compiled(x)
    assert counter.count == 4


def test_going_from_rebuilding_to_factors_is_one_more_compilation(ranks_may_change):
    model, x = converted(nn.Linear(32, 32)), torch.randn(40, 32, requires_grad=True)
    counter = Compilations()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for rank in (32, 31, 30, 28, 14, 13, 12, 5):
        factorize(model, rank)
        assert_same_results(compiled, model, x)
    assert counter.count == 3


@pytest.mark.slow
@pytest.mark.parametrize("convert", ["at_delay", "when_it_pays"])
def test_compilations_of_a_transformer_under_oialr(convert, ranks_may_change):
    model = nn.Sequential(nn.Linear(8, 32), Block(), Block(), nn.Linear(32, 5))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    oialr = OIALR(model, optimizer, delay=2, every=1, cutoff=0.4, layer_fraction=0.5, convert=convert)
    counter = Compilations()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x, y = torch.randn(16, 10, 8), torch.randint(5, (160,))
    expected, forms, varied, before = 0, set(), set(), {}
    for _ in range(28):
        sites = [site for site in select(model).eligible if site.is_lowrank]
        ranks = {site.name: site.rank for site in sites}
        form = tuple((site.name, through(site, 160)) for site in sites)
        changed = {name for name in ranks.keys() & before.keys() if ranks[name] != before[name]}
        expected += form not in forms or not changed <= varied
        forms.add(form)
        varied |= changed
        before = ranks
        F.cross_entropy(compiled(x).flatten(0, 1), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        oialr.step()
    assert counter.count <= expected < oialr.checks / 2


def through(site, rows):
    return through_factors(rows, *site.shape, site.rank, training=True, input_gradient=site.name != "0")


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
