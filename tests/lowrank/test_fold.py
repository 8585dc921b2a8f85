"""Factored models made ready for serving."""

import copy
import pickle

import pytest
import torch
from lowrank_helpers import LAYERS, assert_near, converted, dense_twin, gradients_of, small_net, some_loss
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hpclr.lowrank import count_flops, densify, factorize, fold, load_state_dict, select
from hpclr.lowrank.layers import lowrank_modules
from hpclr.lowrank.svd_layers import CHANNEL, SPATIAL

NOT_EMPTY = {name: case for name, case in LAYERS.items() if "no rows" not in name and "no images" not in name}


def folded(model):
    return fold(copy.deepcopy(model)).eval()


def is_factored(model):
    return any(module.is_lowrank(slot) for _, module in lowrank_modules(model) for slot in module.slots)


@pytest.mark.parametrize("rank", [1, 2, None])
@pytest.mark.parametrize(("make", "shape"), NOT_EMPTY.values(), ids=NOT_EMPTY)
def test_folded_layers_compute_the_same(make, shape, rank):
    layer, x = converted(make(), rank).eval(), torch.randn(shape)
    assert_near(folded(layer)(x), layer(x))
    assert_near(folded(layer).weight, layer.weight)


@pytest.mark.parametrize("form", [CHANNEL, SPATIAL], ids=["channel", "spatial"])
@pytest.mark.parametrize("rank", [1, None])
def test_other_forms_become_dense_where_that_is_cheaper(form, rank):
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 9, 8)
    (site,) = select(layer, kinds=form).eligible
    site.factorize(rank)
    assert is_factored(folded(layer)) == (rank == 1)
    assert_near(folded(layer)(x), layer(x))


def test_two_products_where_they_save_and_one_where_not():
    x = torch.randn(50, 20)
    for rank, products in ((2, 2 * 50 * 2 * 60), (13, 2 * 50 * 13 * 60), (14, 2 * 50 * 20 * 40)):
        layer = folded(converted(nn.Linear(20, 40), rank))
        assert count_flops(layer, x) == products
        assert is_factored(layer) == (rank < 14)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("rows", [1, 300])
def test_sigma_costs_nothing_any_more(rows):
    model, x = converted(nn.Linear(30, 30), 5), torch.randn(rows, 30)
    quick = folded(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        quick(x)
    assert counter.get_total_flops() == 2 * rows * 5 * 60 < count_flops(model, x)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["Linear", "Conv"])
def test_one_exported_program_takes_any_number_of_samples(kind, strict):
    layer, shape = (nn.Linear(20, 16), (20,)) if kind == "Linear" else (nn.Conv2d(4, 8, 3), (4, 9, 9))
    quick = folded(converted(layer, 2))
    sizes = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(quick, (torch.randn(30, *shape),), dynamic_shapes=(sizes,), strict=strict)
    for samples in (2, 15, 300):
        x = torch.randn(samples, *shape)
        assert_near(program.module()(x), quick(x))


class Doubled(nn.Linear):
    """Reads its weight."""

    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias)


def test_a_layer_that_reads_its_weight_has_it_at_hand():
    layer, x = converted(Doubled(12, 16), 2), torch.randn(3, 12)
    quick = folded(layer)
    assert type(quick) is Doubled
    assert_near(quick(x), layer(x))


def test_nothing_folded_is_trained_and_the_original_goes_on():
    model = converted(small_net(), 2)
    quick = folded(model)
    assert [name for name, p in quick.named_parameters() if p.requires_grad and "bias" not in name] == []
    x = torch.randn(7, 12)
    some_loss(model(x)).backward()
    assert gradients_of(model).count_nonzero() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_models_are_copied_pickled_saved_and_loaded(dtype):
    model = converted(small_net().to(dtype), 2)
    quick, x = folded(model), torch.randn(7, 12).to(dtype)
    expected = quick(x)
    assert_near(expected, model(x))
    for other in (copy.deepcopy(quick), pickle.loads(pickle.dumps(quick))):
        assert torch.equal(other(x), expected)
    for other in (small_net().to(dtype), folded(converted(small_net().to(dtype), 2))):
        load_state_dict(other, quick.state_dict())
        assert_near(other(x), expected)
    assert torch.equal(densify(quick)(x), dense_twin(quick)(x))


def attention(**options):
    return nn.MultiheadAttention(16, 4, batch_first=True, **options)


@pytest.mark.parametrize("options", [{}, {"kdim": 10, "vdim": 6}], ids=["packed", "separate"])
@pytest.mark.parametrize("rank", [2, 9, 12])
def test_attention(options, rank):
    layer = converted(attention(**options), rank)
    x = [torch.randn(3, 5, size) for size in (16, options.get("kdim", 16), options.get("vdim", 16))]
    assert_near(folded(layer)(*x)[0], layer(*x)[0])
    if not options:
        assert_near(folded(layer)(x[0], x[0], x[0])[0], layer(x[0], x[0], x[0])[0])


def encoder(nested):
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [True, False])
def test_encoders_multiply_by_the_factors_and_rebuild_nothing(nested, monkeypatch):
    model, x = encoder(nested), torch.randn(3, 5, 16)
    factorize(model, 2)
    padding = torch.arange(5) >= torch.tensor([[5], [4], [3]])
    quick = folded(model)
    with torch.no_grad():
        expected = model.eval()(x, src_key_padding_mask=padding)
        monkeypatch.setattr(type(quick.layers[0].linear1), "dense_weight", None)
        found = quick(x, src_key_padding_mask=padding)
    assert_near(found[~padding], expected[~padding])
    dense = encoder(nested)
    assert fold(dense).layers[0].activation_relu_or_gelu == 1
    assert dense.use_nested_tensor == nested
