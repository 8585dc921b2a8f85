"""Dense weights made of a factored state dict and its description alone, without the model."""

import copy
from dataclasses import replace

import pytest
import torch
from lowrank_helpers import LAYERS, converted, dense_twin, small_net
from torch import nn

from hpclr.lowrank import densify, factorize
from hpclr.lowrank.interchange import (
    FactoredWeight,
    cast_state_dict,
    check_factors,
    dense_state_dict,
    factored_weights,
    looks_factored,
    tied_names,
)

ATTENTION = {
    "packed": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    "separate": lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=5),
    "with bias_k": lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False),
}
MODELS = {name: make for name, (make, _) in LAYERS.items()} | ATTENTION | {"net": small_net}


def conv1d(n_out, n_in):
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(n_out, n_in)


class Tied(nn.Module):
    """An embedding that is the head too, a layer that has two names, and a buffer that counts."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.one = self.other = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.head(self.norm(self.other(self.one(self.embedding(x)))))


@pytest.mark.parametrize("make", [*MODELS.values(), lambda: conv1d(6, 10), Tied], ids=[*MODELS, "Conv1D", "tied"])
def test_the_dense_model_loads_what_is_made_of_factors(make):
    model = make()
    low = converted(model)
    dense = dense_state_dict(low.state_dict(), factored_weights(low))
    assert list(dense) == list(model.state_dict())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(dense[name], value, rtol=1e-5, atol=1e-6)
        assert dense[name].is_contiguous()
    make().load_state_dict(dense, strict=True)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_lower_rank_gives_the_weight_that_the_layer_has(make):
    low = converted(make(), 2)
    dense = dense_state_dict(low.state_dict(), factored_weights(low))
    for name, value in dense_twin(low).state_dict().items():
        assert (dense[name] - value).abs().max() < 1e-6


def test_what_a_description_says():
    model = nn.Sequential(nn.Conv2d(4, 6, (3, 2), groups=2), nn.MultiheadAttention(8, 2), conv1d(6, 10))
    factorize(model, exclude=["1.out_proj"])
    assert factored_weights(model) == {
        "0": FactoredWeight("0.weight", ("0.u", "0.sigma", "0.vh"), (6, 2, 3, 2)),
        "1.in_proj": FactoredWeight("1.in_proj_weight", ("1.in_proj_u", "1.in_proj_sigma", "1.in_proj_vh"), (24, 8)),
        "2": FactoredWeight("2.weight", ("2.u", "2.sigma", "2.vh"), (10, 6), transposed=True),
    }
    densify(model)
    assert factored_weights(model) == {}


def test_a_model_that_is_a_layer_itself():
    low = converted(nn.Linear(4, 3))
    (layer,) = factored_weights(low).values()
    assert layer == FactoredWeight("weight", ("u", "sigma", "vh"), (3, 4))


def test_names_of_one_parameter():
    model = Tied()
    assert tied_names(model) == {
        "head.weight": "embedding.weight",
        "other.weight": "one.weight",
        "other.bias": "one.bias",
    }
    factorize(model)
    assert set(factored_weights(model)) == {"one", "other"}
    assert tied_names(model)["other.sigma"] == "one.sigma"


def test_the_product_is_rounded_once():
    u, vh = torch.full((1, 2), 1.0), torch.tensor([[1.0], [1.0]])
    sigma = torch.diag(torch.tensor([1.0, 2.0**-24]))  # in float32 their sum would lose the second
    layers = {"L": FactoredWeight("L.weight", ("L.u", "L.sigma", "L.vh"), (1, 1))}
    state = {"L.u": u, "L.sigma": sigma, "L.vh": vh}
    assert dense_state_dict(state, layers, torch.float64)["L.weight"].item() == 1 + 2.0**-24
    assert dense_state_dict(state, layers)["L.weight"].dtype == torch.float32


def test_only_floating_tensors_are_cast():
    state = {"w": torch.ones(2), "count": torch.tensor(3), "mask": torch.tensor([True]), "z": torch.ones(1) * 1j}
    cast = cast_state_dict(state, torch.bfloat16)
    assert [value.dtype for value in cast.values()] == [torch.bfloat16, torch.int64, torch.bool, torch.complex64]
    assert cast_state_dict(state, None) == state


def test_numbers_too_large_are_refused_by_name():
    state = {"small": torch.ones(2), "large": torch.tensor([-float("inf"), 1.0, -70000.0])}
    with pytest.raises(ValueError, match=r"'large' holds numbers up to 7e\+04, too large for float16, .* 6.55e\+04"):
        cast_state_dict(state, torch.float16)
    infinite = cast_state_dict({"mask": torch.tensor([-float("inf"), 0.0])}, torch.float16)  # was so before
    assert infinite["mask"].isinf().any()
    low = converted(nn.Linear(4, 3))
    low.sigma.data *= 1e6
    with pytest.raises(ValueError, match="'weight' holds numbers"):
        dense_state_dict(low.state_dict(), factored_weights(low), torch.float16)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"factors": ("u", "sigma", "v")}, "found shapes"),
        ({"factors": ("u", "sigma", "bias")}, "found shapes"),
        ({"factors": ("u", "vh", "vh")}, "found shapes"),
        ({"shape": (4, 3)}, r"shape \(4, 3\), found shapes \[\(3, 2\), \(2, 2\), \(2, 4\)\]"),
        ({"shape": ()}, "found shapes"),
        ({"transposed": True}, "transposed, found"),
        ({"weight": "bias"}, "is there twice"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(changes, text):
    low = converted(nn.Linear(4, 3), 2)
    (layer,) = factored_weights(low).values()
    check_factors(low.state_dict(), {"L": layer})
    with pytest.raises(ValueError, match=text):
        dense_state_dict(low.state_dict(), {"L": replace(layer, **changes)})


def test_a_factor_of_two_layers_is_refused():
    low = converted(nn.Linear(4, 3))
    (layer,) = factored_weights(low).values()
    with pytest.raises(ValueError, match="twice"):
        check_factors(low.state_dict(), {"L": layer, "M": copy.copy(layer)})


def test_factors_without_a_description_are_seen():
    assert looks_factored(converted(nn.MultiheadAttention(8, 2)).state_dict()) == "in_proj_sigma"
    assert looks_factored(small_net().state_dict()) is None
    assert looks_factored(["u", "sigma", "a.vh"]) is None
