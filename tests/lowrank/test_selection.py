"""What is left alone, and why."""

from itertools import pairwise

import pytest
import torch
from lowrank_helpers import assert_near
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm

from hpclr.lowrank import factorize, select

COMPUTED = "its weight is computed from other parameters"


def tied():
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 8), "body": nn.Linear(8, 8), "head": nn.Linear(8, 10)})
    model["head"].weight = model["embedding"].weight
    return model


def tied_transposed():
    """A decoder whose weight is a view of the encoder's memory."""
    model = nn.ModuleDict({"encoder": nn.Linear(8, 6), "decoder": nn.Linear(6, 8)})
    model["decoder"].weight = nn.Parameter(model["encoder"].weight.detach().mT)
    return model


def pruned():
    layer = nn.Linear(8, 6)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def with_sigma():
    layer = nn.Linear(8, 6)
    layer.register_parameter("sigma", nn.Parameter(torch.ones(6)))
    return layer


def frozen():
    layer = nn.Linear(8, 6)
    layer.weight.requires_grad_(False)
    return layer


def broken():
    layer = nn.Linear(8, 6)
    layer.weight.data[0, 0] = float("nan")
    return layer


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: parametrizations.weight_norm(nn.Linear(8, 6)), COMPUTED),
        (lambda: parametrizations.spectral_norm(nn.Conv2d(3, 6, 3, bias=False)), COMPUTED),
        (lambda: parametrizations.orthogonal(nn.Linear(8, 6)), COMPUTED),
        (lambda: nn.utils.weight_norm(nn.Linear(8, 6)), COMPUTED),
        (lambda: old_spectral_norm(nn.Linear(8, 6)), COMPUTED),
        (pruned, COMPUTED),
        (lambda: nn.LazyLinear(6), "lazy: its shape is not known yet"),
        (lambda: nn.Embedding(8, 6), "Embedding has no low-rank form"),
        (lambda: nn.LayerNorm(6), "LayerNorm has no low-rank form"),
        (lambda: nn.BatchNorm2d(6), "BatchNorm2d has no low-rank form"),
        (lambda: nn.ConvTranspose2d(3, 6, 3), "ConvTranspose2d has no low-rank form"),
        (lambda: nn.LSTM(8, 6), "LSTM has no low-rank form"),
        (frozen, "frozen: its weight does not require gradients"),
        (lambda: nn.Linear(8, 6, dtype=torch.complex64), "complex64, not real floating point"),
        (lambda: nn.Linear(8, 6, device="meta"), "on the meta device"),
        (lambda: nn.Linear(8, 0), "empty: its weight is 0×8"),
        (with_sigma, "attribute 'sigma' of its own"),
        (broken, "a 6×8 matrix has entries that are not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_left_alone_with_the_reason(make, reason):
    layer = make()
    cls, names = type(layer), list(layer._parameters)
    report = factorize(layer)[0]
    assert reason in report.reason
    assert report[1:4] == (None, None, False)
    assert type(layer) is cls
    assert list(layer._parameters) == names


@pytest.mark.parametrize(("make", "names"), [(tied, {"head"}), (tied_transposed, {"encoder", "decoder"})])
def test_tied_weights_stay_tied(make, names):
    model = make()
    reports = {report.name: report for report in factorize(model)}
    for name in names:
        assert reports[name].reason == "tied: its weight is shared with another layer"
        assert isinstance(model[name].weight, nn.Parameter)
    assert reports.keys() == set(model)
    assert reports.get("body", (..., ..., ..., True))[3]


def test_every_layer_is_listed_in_order():
    model = nn.Sequential(
        nn.Embedding(9, 8), nn.LayerNorm(8), nn.MultiheadAttention(8, 2, vdim=4), nn.ReLU(), nn.Linear(8, 6)
    )
    reports = factorize(model, 2)
    assert [report.name for report in reports] == ["0", "1", "2.q_proj", "2.k_proj", "2.v_proj", "2.out_proj", "4"]
    assert [report.converted for report in reports] == [False, False, True, True, True, True, True]
    assert reports[4] == ("2.v_proj", (8, 4), 2, True, "")
    assert all(report.reason for report in reports if not report.converted)


def test_a_lone_layer_is_called_by_its_class():
    layer = nn.Linear(8, 6)
    assert [report.name for report in factorize(layer)] == ["Linear"]
    assert [report.name for report in factorize(layer)] == ["Linear"]


def stack(*widths):
    return nn.Sequential(*(nn.Linear(n, m) for n, m in pairwise(widths)))


def names(selection):
    return [site.name for site in selection.eligible]


def test_the_limit_of_the_aspect_ratio_is_exclusive():
    selection = select(stack(80, 8, 8, 81, 8), max_aspect=10.0)
    assert names(selection) == ["1"]
    assert "of aspect ratio 10 ≥ 10 (max_aspect)" in selection.left_alone["0"]
    assert "its weight is 81×8" in selection.left_alone["2"]


def test_first_and_last_are_those_of_an_eligible_type_whatever_their_shape():
    model = nn.Sequential(nn.LayerNorm(80), stack(80, 8, 8, 81), nn.LayerNorm(81))
    assert names(select(model, keep_last=True)) == ["1.0", "1.1"]
    assert names(select(model, keep_first=True, max_aspect=10)) == ["1.1"]
    selection = select(model, keep_first=True, keep_last=True)
    assert names(selection) == ["1.1"]
    assert "keep_first" in selection.left_alone["1.0"]
    assert names(select(stack(8, 8), keep_first=True, keep_last=True)) == []
    assert names(select(nn.LayerNorm(3), keep_first=True)) == []


def test_patterns_of_names():
    model = nn.ModuleDict({"encoder": stack(8, 8, 8), "head": nn.Linear(8, 4), "norm": nn.LayerNorm(8)})
    assert names(select(model, include=["encoder.*"])) == ["encoder.0", "encoder.1"]
    assert names(select(model, include=["encoder.?", "head"], exclude=["*.1"])) == ["encoder.0", "head"]
    assert names(select(model, exclude=["norm"])) == ["encoder.0", "encoder.1", "head"]
    assert select(model, include=["head"]).left_alone["encoder.0"] == "not among the names to include"
    assert select(model, exclude=["head"]).left_alone["head"] == "excluded by name"


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(option):
    model = stack(8, 8, 8)
    with pytest.raises(ValueError, match=r"pattern 'encoder\.\*' .* matches no layer .* its layers are 0, 1"):
        factorize(model, **{option: ["encoder.*"]})
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (3, [3, 3]),
        (100, [8, 4]),
        (0.5, [4, 2]),
        (1.0, [8, 4]),
        (0.3, [3, 2]),
        ({"0": 5}, [5, None]),
        (lambda s, mn: 1, [1, 1]),
    ],
)
def test_every_way_to_say_a_rank(rank, expected):
    model = stack(8, 8, 4)
    reports = factorize(model, rank)
    assert [report.rank for report in reports] == expected
    assert [report.converted for report in reports] == [k is not None for k in expected]
    assert [hasattr(layer, "sigma") for layer in model] == [k is not None for k in expected]


def test_a_share_is_taken_as_written():
    (report,) = factorize(stack(100, 100), 0.55)  # in binary 0.55·100 is more than 55
    assert report.rank == 55


@pytest.mark.parametrize("rank", [0, -1, 1.5, 0.0, float("nan"), True, "half"])
def test_a_rank_out_of_range_is_refused(rank):
    with pytest.raises(ValueError, match="rank must be a whole number ≥ 1, a share"):
        factorize(stack(8, 8), rank)


def test_a_rank_for_a_layer_that_cannot_have_one_is_refused():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="layer '7', which cannot be converted: the model has no such layer"):
        factorize(model, {"7": 2})
    with pytest.raises(ValueError, match="layer '0', which cannot be converted: LayerNorm has no low-rank form"):
        factorize(model, {"0": 2})


def test_what_is_converted_already_is_reported_so():
    model = stack(8, 8, 8)
    factorize(model, 3)
    left, cut = factorize(model, 2, exclude=["0"])
    assert left == ("0", (8, 8), 3, True, "excluded by name")
    assert cut == ("1", (8, 8), 2, True, "")


def test_a_layer_with_frozen_bias_is_converted():
    layer = nn.Linear(8, 6)
    layer.bias.requires_grad_(False)
    x = torch.randn(3, 8)
    before = layer(x)
    assert factorize(layer)[0].converted
    assert_near(layer(x), before)
