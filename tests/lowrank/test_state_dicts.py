"""Copies, pickles and state dicts, between dense and factored models of any ranks."""

import copy
import io
import pickle

import pytest
import torch
from lowrank_helpers import assert_near, converted, dense_twin, small_net
from torch import nn

from hpclr.lowrank import densify, factorize, load_state_dict, select


def conv_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))


def attention():
    return nn.MultiheadAttention(8, 2, kdim=6, batch_first=True)


CASES = {
    "linear": (small_net, (torch.randn(4, 12),)),
    "conv": (conv_net, (torch.randn(2, 3, 8, 8),)),
    "attention": (attention, (torch.randn(2, 5, 8), torch.randn(2, 7, 6), torch.randn(2, 7, 8))),
}
models = pytest.mark.parametrize(("make", "x"), CASES.values(), ids=CASES)


def output(model, x):
    result = model(*x)
    return result[0] if isinstance(result, tuple) else result


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_a_file])
@models
def test_copies_are_equal_and_independent(make, x, duplicate):
    model = converted(make(), 2)
    twin = duplicate(model)
    assert repr(twin) == repr(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(output(twin, x), output(model, x))
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert output(model, x).abs().sum() > 0
    assert type(densify(twin)) is type(make())


def test_a_copy_keeps_hooks():
    model = converted(nn.Linear(8, 6), 2)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    copy.deepcopy(model)(torch.randn(2, 8))
    assert calls == [1]


@models
def test_dense_into_converted_loses_nothing(make, x):
    """Whatever rank the layer has: it takes as many directions as the weight needs."""
    dense, low = make(), converted(make(), 2)
    state = dense.state_dict()
    keys = list(state)
    low.load_state_dict(state)
    assert list(state) == keys  # the caller's dict is left as it was
    assert all(site.is_lowrank and site.rank == min(site.shape) for site in select(low).eligible)
    assert_near(output(low, x), output(dense, x))


def test_a_low_rank_dense_weight_is_loaded_at_its_own_rank():
    dense = dense_twin(converted(nn.Linear(32, 24), 5))
    low = converted(nn.Linear(32, 24))
    low.load_state_dict(dense.state_dict())
    assert low.sigma.shape == (5, 5)
    assert_near(low.weight, dense.weight)


def test_a_zero_weight_is_loaded_at_rank_one():
    low = converted(nn.Linear(8, 6))
    low.load_state_dict({"weight": torch.zeros(6, 8), "bias": torch.zeros(6)})
    assert low.sigma.shape == (1, 1)
    assert not low.weight.any()


def test_a_weight_in_few_bits_is_factored_in_the_precision_of_the_layer():
    dense = nn.Linear(16, 16).bfloat16()
    low = converted(nn.Linear(16, 16), 2)
    low.load_state_dict(dense.state_dict())
    assert_near(low.weight, dense.weight.float())


@models
def test_converted_into_fresh(make, x):
    low, fresh = converted(make(), 2), make()
    load_state_dict(fresh, low.state_dict())
    assert repr(fresh) == repr(low)
    assert torch.equal(output(fresh, x), output(low, x))


@models
def test_dense_into_fresh(make, x):
    dense, fresh = make(), make()
    load_state_dict(fresh, dense.state_dict())
    assert torch.equal(output(fresh, x), output(dense, x))


@models
def test_converted_into_converted_of_other_ranks(make, x):
    low, other = converted(make(), 2), converted(make(), 3)
    trained = {id(p) for p in other.parameters() if p.requires_grad}
    other.load_state_dict(low.state_dict())
    assert torch.equal(output(other, x), output(low, x))
    assert {id(p) for p in other.parameters() if p.requires_grad} == trained


def test_partly_converted_attention():
    parent = attention()
    low = copy.deepcopy(parent)
    factorize(low, 2, exclude=["k_proj", "out_proj"])
    x = CASES["attention"][1]
    for other in (attention(), copy.deepcopy(low), converted(attention(), 4)):
        load_state_dict(other, low.state_dict())
        assert_near(output(other, x), output(low, x))
    low.load_state_dict(parent.state_dict())
    assert_near(output(low, x), output(parent, x))


def test_a_shared_module_is_stored_and_loaded_under_both_names():
    def make():
        shared = nn.Linear(8, 8)
        return nn.Sequential(shared, nn.ReLU(), shared)

    low, fresh = converted(make(), 2), make()
    load_state_dict(fresh, low.state_dict())
    assert fresh[0] is fresh[2]
    x = torch.randn(3, 8)
    assert torch.equal(fresh(x), low(x))
    dense = make()
    low.load_state_dict(dense.state_dict())
    assert_near(low(x), dense(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("0.u"), 'Missing key.*"0.u"'),
        (lambda state: state.pop("2.bias"), 'Missing key.*"2.bias"'),
        (lambda state: state.update({"9.weight": torch.ones(1)}), 'Unexpected key.*"9.weight"'),
        (lambda state: state.update({"0.u": torch.ones(5, 2)}), "size mismatch for 0.u"),
    ],
)
def test_what_does_not_fit_is_reported_by_torch(change, message):
    low = converted(small_net(), 2)
    state = low.state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=message):
        converted(small_net(), 3).load_state_dict(state)


def test_a_dense_weight_of_another_shape_is_reported_by_torch():
    with pytest.raises(RuntimeError, match="size mismatch for u"):
        converted(nn.Linear(8, 6)).load_state_dict(nn.Linear(8, 5).state_dict())


def test_projections_of_another_form_are_reported_by_torch():
    separate, packed = converted(nn.MultiheadAttention(8, 2, kdim=6)), converted(nn.MultiheadAttention(8, 2))
    with pytest.raises(RuntimeError, match=r"Missing key.*in_proj_u"):
        packed.load_state_dict(separate.state_dict())


def test_torchs_own_loading_into_a_dense_model_is_refused_by_torch():
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.weight"'):
        small_net().load_state_dict(converted(small_net(), 2).state_dict())


def test_factors_for_a_layer_that_cannot_have_them_are_refused():
    low, fresh = converted(small_net(), 2), small_net()
    fresh[2].weight.requires_grad_(False)
    before = repr(fresh)
    with pytest.raises(ValueError, match="factors for layer '2', which cannot be converted: frozen"):
        load_state_dict(fresh, low.state_dict())
    assert repr(fresh) == before


def test_not_strict_loads_what_there_is():
    low, fresh = converted(small_net(), 2), small_net()
    state = {name: value for name, value in low.state_dict().items() if name.startswith("0.")}
    load_state_dict(fresh, state, strict=False)
    assert torch.equal(fresh[0].weight, low[0].weight)
    assert type(fresh[2]) is nn.Linear


def test_the_optimiser_goes_on_with_a_loaded_model():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    load_state_dict(model, converted(small_net(), 2).state_dict())
    before = model[0].sigma.detach().clone()
    model(torch.randn(4, 12)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[0].sigma, before)
