"""Whole models with adapters: which layers can have one, state dicts, adapters away again."""

import copy
from dataclasses import replace

import pytest
import torch
from adapter_helpers import EXPERTS, net, with_adapters
from lowrank_helpers import small_net
from torch import nn

from hpclr.lowrank.adapters import (
    FORMS,
    AdaptedWeight,
    adaptable,
    adapted_modules,
    adapted_weights,
    adapter_state_dict,
    check_adapters,
    load_adapter_state_dict,
    merge_adapters,
    merged_state_dict,
    remove_adapters,
    shape_model_like_adapters,
    unmerge_adapters,
)

forms = pytest.mark.parametrize("form", FORMS)
X = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))


def base():
    """The model under `net`."""
    torch.manual_seed(3)
    return small_net()


def of_other_ranks(form):
    return with_adapters(base(), form, 3, seed=5)


# --- which layers ---------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.grouped = nn.Conv1d(8, 8, 3, groups=2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.wide = nn.Linear(8, 80)
        self.inner = nn.Linear(8, 9)
        self.tied = nn.Linear(8, 9, bias=False)
        self.tied.weight = self.embedding.weight


def test_every_layer_has_an_adapter_or_a_reason():
    model = Mixed()
    found = adaptable(model, max_aspect=10, exclude=["inner"])
    assert list(found.sites) == ["frozen"]
    assert {name: reason.split(":")[0] for name, reason in found.left_alone.items()} == {
        "embedding": "Embedding has no adapted form",
        "attention.in_proj": "torch's attention reads its weights itself, past any adapter",
        "attention.out_proj": "torch's attention reads the weight of its output projection itself, past any adapter",
        "grouped": "a grouped convolution has no adapted form",
        "normed": "its weight is computed from other parameters (parametrised, weight or spectral norm, pruning)",
        "normed.parametrizations.weight": "ParametrizationList has no adapted form",
        "wide": "its weight is 80×8, of aspect ratio 10 ≥ 10 (max_aspect)",
        "inner": "excluded by name",
        "tied": "tied",
    }
    assert not model.frozen.weight.requires_grad
    assert model.wide.weight.requires_grad


@pytest.mark.parametrize(("keep_last", "head"), [(True, "4"), (False, None)])
def test_the_head_is_what_keep_last_alone_keeps(keep_last, head):
    found = adaptable(small_net(), keep_last=keep_last, include=["0"], max_aspect=3)
    assert list(found.sites) == ["0"]
    assert (found.head.name if found.head else None) == head


def test_a_tied_layer_at_the_end_is_no_head():
    model = Mixed()
    assert adaptable(model, keep_last=True).head is None
    with pytest.raises(ValueError, match="the pattern 'nothing'"):
        adaptable(model, include=["nothing"])


def test_layers_with_adapters_count_as_eligible():
    model = net("sara")
    assert list(adaptable(model).sites) == ["0", "2", "4"]


# --- state dicts ----------------------------------------------------------------------------------------------------


@forms
def test_adapters_alone_go_from_model_to_model(form):
    model = net(form, seed=1)
    state = {name: value.clone() for name, value in adapter_state_dict(model).items()}
    assert set(state) == {f"{path}.{name}" for path, layer in adapted_modules(model) for name in layer.names}
    assert all(not value.requires_grad for value in state.values())
    for other in (base(), net(form), of_other_ranks(form)):
        load_adapter_state_dict(other, state)
        assert torch.equal(other(X), model(X))
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]


@forms
def test_a_single_layer_is_a_model_too(form):
    layer = with_adapters(nn.Linear(12, 9), form, 2, seed=1)
    other = nn.Linear(12, 9)
    other.load_state_dict({name: layer.state_dict()[name] for name in ("weight", "bias")})
    load_adapter_state_dict(other, adapter_state_dict(layer))
    assert torch.equal(other(X), layer(X))


@forms
def test_a_whole_state_dict_goes_into_a_model_of_any_ranks(form):
    model, other = net(form, seed=1), of_other_ranks(form)
    parameters = [id(p) for p in other.parameters()]
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))
    assert [id(p) for p in other.parameters()] == parameters
    assert [layer.rank for _, layer in adapted_modules(other)] == [2, 2, 2]


@forms
def test_a_fresh_model_takes_the_form_of_a_whole_state_dict(form):
    model, fresh = net(form, seed=1), small_net()
    state = model.state_dict()
    shape_model_like_adapters(fresh, state)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in model.parameters()]
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in model.parameters()]
    fresh.load_state_dict(state)
    assert torch.equal(fresh(X), model(X))


def test_experts_follow_a_state_dict():
    many = with_adapters(base(), "mo_sara", 2)
    for _, layer in adapted_modules(many):
        layer.resize(type(layer.sizes({"mo_sara_lambdas": (1, 1)}))(2, 7))
    model = net("mo_sara", seed=1)
    many.load_state_dict(model.state_dict())
    assert many[0].mo_sara_lambdas.shape == (EXPERTS, 2)
    assert torch.equal(many(X), model(X))


@pytest.mark.parametrize("form", ["sara", "edora"])
def test_what_is_saved_of_a_merged_model_is_that_of_the_unmerged_one(form):
    model = net(form, seed=1).eval()
    expected, output = copy.deepcopy(model.state_dict()), model(X)
    merge_adapters(model)
    assert not torch.equal(model[0].weight, expected["0.weight"])
    saved = model.state_dict()
    assert list(saved) == list(expected)
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    model.load_state_dict(expected)  # which unmerges
    assert not any(layer.is_merged for _, layer in adapted_modules(model))
    assert torch.equal(model(X), output)
    merge_adapters(model)
    load_adapter_state_dict(model, {name: expected[name] for name in adapter_state_dict(model)})
    assert torch.equal(model(X), output)


def test_dense_weights_alone_do_not_load_silently():
    with pytest.raises(RuntimeError, match="Missing key"):
        net("sara").load_state_dict(base().state_dict())


def test_shapes_that_fit_no_weight_are_left_to_torch_to_name():
    state = net("edora").state_dict()
    state["0.edora_a"] = torch.zeros(2, 13)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.edora_a"):
        net("edora").load_state_dict(state)


def test_differences_are_named_and_nothing_is_changed():
    state = adapter_state_dict(net("edora", seed=1))
    state |= {"2.edora_core": torch.zeros(3, 3), "9.edora_core": torch.zeros(2, 2), "0.weight": torch.zeros(1)}
    state |= {"1.sara_b": torch.zeros(2, 2), "4.sara_b": torch.zeros(2, 16)}
    fresh = base()
    with pytest.raises(ValueError) as caught:
        load_adapter_state_dict(fresh, state)
    for part in (
        "the adapters do not fit the model: '0.weight' is no parameter of an adapter",
        "layer '2' has a weight of 16×16, which edora_u 16×2, edora_a 2×16, edora_core 3×3, edora_magnitude 16 do",
        "; and 2 more",
    ):
        assert part in str(caught.value)
    assert type(fresh[0]) is nn.Linear
    with pytest.raises(ValueError, match=r"layer '9' cannot have an adapter: the model has no such layer"):
        shape_model_like_adapters(fresh, {"9.edora_core": torch.zeros(2, 2)})


@pytest.mark.parametrize(
    ("target", "names", "expected"),
    [
        (lambda: net("sara"), ["0", "2", "4"], "layer '0' has an adapter of SARA, and one of EDoRA is stored"),
        (lambda: net("edora"), ["0", "2"], "layer '4' has an adapter, and none is stored"),
        (lambda: nn.Sequential(nn.Linear(12, 15)), ["0"], "layer '0' has a weight of 15×12"),
        (lambda: nn.Sequential(nn.LayerNorm(12)), ["0"], "'0' cannot have an adapter: LayerNorm has no adapted form"),
    ],
)
def test_each_kind_of_difference(target, names, expected):
    state = {name: value for name, value in adapter_state_dict(net("edora")).items() if name.split(".")[0] in names}
    model = target()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=expected):
        load_adapter_state_dict(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.full((2, 12), float("inf")), "24 of the 24 numbers of '0.sara_b' are not finite as float32"),
        (torch.zeros(2, 12, dtype=torch.int64), "'0.sara_b' is int64, in the model float32"),
        (torch.zeros(2, 12, dtype=torch.complex64), "'0.sara_b' is complex64, in the model float32"),
    ],
)
def test_numbers_that_are_none(value, said):
    state, model = adapter_state_dict(net("sara", seed=1)), base()
    with pytest.raises(ValueError, match=said):
        load_adapter_state_dict(model, state | {"0.sara_b": value})
    assert type(model[0]) is nn.Linear


def test_a_part_of_an_adapter_is_no_adapter():
    state = adapter_state_dict(net("sara", seed=1))
    del state["0.sara_b"]
    with pytest.raises(
        ValueError, match="layer '0' has a weight of 16×12, which sara_a 16×2, sara_lambda 2 do not fit"
    ):
        load_adapter_state_dict(base(), state)


# --- away with them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
@forms
def test_without_adapters_a_model_is_what_it_was_to_the_bit(form, merged):
    model, plain = net(form, seed=1), base()
    if merged and form != "mo_sara":
        merge_adapters(model)
    assert remove_adapters(model) is model
    assert [type(layer) for layer in model] == [type(layer) for layer in plain]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model(X), plain(X))
    assert all(p.requires_grad for p in model.parameters())
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(model, plain, strict=True))


@pytest.mark.parametrize("form", ["sara", "edora"])
def test_merged_for_good(form):
    model = net(form, seed=1)
    expected = model(X)
    remove_adapters(model, merge=True)
    assert [type(layer) for layer in model] == [type(layer) for layer in base()]
    assert (model(X) - expected).abs().max() < 1e-5
    unmerge_adapters(model)


def test_frozen_adapters_leave_a_frozen_weight():
    model = net("sara").requires_grad_(False)
    assert not any(p.requires_grad for p in remove_adapters(model).parameters())


# --- descriptions that contradict themselves ------------------------------------------------------------------------


def lora_state():
    """Of one layer, as PEFT names its parameters."""
    parts = {"lora_A": "l.lora_A.default.weight", "lora_B": "l.lora_B.default.weight"}
    state = {"l.base_layer.weight": torch.ones(4, 6), "l.base_layer.bias": torch.ones(4), "h.weight": torch.ones(2, 4)}
    state |= {parts["lora_A"]: torch.ones(2, 6), parts["lora_B"]: torch.ones(4, 2)}
    names = {f"l.base_layer.{name}": f"l.{name}" for name in ("weight", "bias")}
    return state, AdaptedWeight("lora", "l.base_layer.weight", parts, False, 0.5, names)


def test_lora_merges():
    state, entry = lora_state()
    merged = merged_state_dict(state, {"l": entry})
    assert list(merged) == ["l.weight", "l.bias", "h.weight"]
    assert torch.equal(merged["l.weight"], torch.full((4, 6), 2.0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scale": float("nan")}, "layer 'l': expected a finite scale, found nan"),
        ({"renamed": {"none": "x"}}, "expected other names of weights that are there, found one of none"),
        ({"renamed": {"l.lora_A.default.weight": "x"}}, "found one of l.lora_A.default.weight"),
        ({"renamed": {"l.base_layer.bias": "h.weight"}}, "two entries would have the name h.weight"),
        ({"renamed": dict.fromkeys(("l.base_layer.bias", "l.base_layer.weight"), "x")}, "would have the name x"),
        ({"transposed": True}, "does not fit a weight of 6×4"),
    ],
)
def test_a_description_of_lora_that_contradicts_itself(change, said):
    state, entry = lora_state()
    with pytest.raises(ValueError, match=said):
        merged_state_dict(state, {"l": replace(entry, **change)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scale": 2.0}, "layer '0': expected no scale, found 2.0"),
        ({"renamed": {"0.weight": "x"}}, "layer '0': expected no other names of its parameters, found x"),
    ],
)
def test_a_description_of_another_form_that_contradicts_itself(change, said):
    model = net("sara", seed=1)
    adapters = adapted_weights(model)
    with pytest.raises(ValueError, match=said):
        check_adapters(model.state_dict(), adapters | {"0": replace(adapters["0"], **change)})


def test_two_adapters_on_one_weight_and_weights_of_other_kinds():
    model = net("sara", seed=1)
    state, adapters = model.state_dict(), adapted_weights(model)
    again = {"x." + part: state["0." + part].clone() for part in adapters["0"].parts}
    twice = replace(adapters["0"], parts={part: "x." + part for part in adapters["0"].parts})
    with pytest.raises(ValueError, match=r"layer '0': 0\.weight has an adapter, or is part of one, twice"):
        check_adapters(state | again, adapters | {"x": twice})
    with pytest.raises(ValueError, match=r"layer '0': expected real numbers, found 0\.sara_b of torch\.int64"):
        check_adapters(state | {"0.sara_b": state["0.sara_b"].long()}, adapters)
    state |= {"0.weight": state["0.weight"][:, :, None]}
    with pytest.raises(ValueError, match=r"expected a matrix, as it is to be transposed, found 0\.weight of 3"):
        check_adapters(state, adapters | {"0": replace(adapters["0"], transposed=True)})
