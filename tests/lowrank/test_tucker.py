"""Tucker-2 convolutions: the function, the ranks, what is left alone and why, the sizes."""

import copy

import pytest
import torch
from lowrank_helpers import assert_near, distance
from torch import Tensor, nn

from hpclr.lowrank import Energy, GavishDonoho, factorize
from hpclr.lowrank.factors import FactorizationError
from hpclr.lowrank.tucker import Tucker2Conv, tucker2, tucker_decompose

GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": (3, 5), "padding": (1, 2), "dilation": (2, 1), "stride": (1, 2)},
    {"kernel_size": 3, "padding": "same", "bias": False},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": (1, 7), "padding": "valid"},
]


def planted(out: int, into: int, ranks: tuple[int, int], noise: float = 0.02, kernel: int = 3) -> nn.Conv2d:
    """A convolution whose weight has these ranks, equally strong in all directions, and noise."""
    torch.manual_seed(0)
    conv = nn.Conv2d(into, out, kernel, padding=kernel // 2)
    left, right = (torch.linalg.qr(torch.randn(size, rank)).Q for size, rank in zip((out, into), ranks, strict=True))
    core = torch.randn(*ranks, kernel, kernel)
    conv.weight.data = torch.einsum("oa,ib,abhw->oihw", left, right, core) + noise * torch.randn_like(conv.weight)
    return conv


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = planted(32, 3, (6, 3))
        self.body = nn.Sequential(planted(48, 32, (5, 4)), nn.BatchNorm2d(48), nn.ReLU())
        self.noise = nn.Conv2d(48, 48, 3, padding=1)
        self.grouped = nn.Conv2d(48, 48, 3, padding=1, groups=4)
        self.pointwise = nn.Conv2d(48, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pointwise(self.grouped(self.noise(self.body(self.stem(x)))))
        return self.head(h.mean((2, 3)))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("ranks", [1.0, (6, 5), (99, 99)], ids=str)
def test_full_ranks_preserve_the_function(geometry, ranks):
    conv = nn.Conv2d(5, 6, **geometry).double()
    x = torch.randn(2, 5, 11, 12, dtype=torch.float64)
    new = tucker2(conv, ranks)
    assert new.ranks == (6, 5)
    assert_near(new(x), conv(x))
    assert_near(new.dense_weight(), conv.weight)


def test_more_outputs_than_the_kernel_sees():
    conv = nn.Conv2d(2, 50, 3)
    new = tucker2(conv, 1.0)
    assert new.ranks == (18, 2)
    x = torch.randn(1, 2, 6, 6)
    assert_near(new(x), conv(x))
    assert tucker2(conv, (18, 1)).ranks == (9, 1)  # of one channel's kernel there are nine directions, no more


@pytest.mark.parametrize("rule", [None, GavishDonoho(0.02)], ids=str)
def test_the_planted_ranks_are_found_without_data(rule):
    conv = planted(48, 32, (5, 4))
    clean = planted(48, 32, (5, 4), noise=0.0)
    new = tucker2(conv) if rule is None else tucker2(conv, rule)
    assert new.ranks == (5, 4)
    assert distance(new.dense_weight(), clean.weight) < 0.3 * distance(conv.weight, clean.weight)


def test_sweeps_bring_it_nearer():
    conv = nn.Conv2d(16, 24, 3)
    errors = [distance(tucker2(conv, (6, 5), sweeps).dense_weight(), conv.weight) for sweeps in (0, 1, 3)]
    assert errors[0] > errors[1] > errors[2]


def test_a_model_is_decomposed_where_it_pays():
    model = Model().eval()
    before = sum(p.numel() for p in model.parameters())
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    reports = {report.name: report for report in tucker_decompose(model)}
    assert list(reports) == ["stem", "body.0", "body.1", "noise", "grouped", "pointwise", "head"]
    body = reports["body.0"]
    assert (body.shape, body.ranks, body.converted, body.reason) == ((48, 32, 3, 3), (5, 4), True, "")
    assert isinstance(model.body[0], Tucker2Conv)
    assert not model.body[0].training
    assert body.parameters == (48 * 32 * 9 + 48, 32 * 4 + 5 * 4 * 9 + 5 * 48 + 48)
    saved = sum(report.parameters[0] - report.parameters[1] for report in reports.values() if report.parameters)
    assert sum(p.numel() for p in model.parameters()) == before - saved
    assert reports["noise"].reason == "by this rule nothing in its weight is worth keeping"
    assert reports["grouped"].reason == "it has 4 groups"
    assert reports["pointwise"].reason.startswith("1×1")
    assert reports["head"].reason == "a Linear, not a two-dimensional convolution"
    assert distance(model(x), expected) < 0.1
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.body[0].parameters())


def test_what_takes_as_many_operations_is_left_alone():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2))
    [report] = tucker_decompose(model, ranks=(7, 7))
    assert report.reason == "at ranks 7 and 7 three steps would take 1.25 times the operations of one"
    assert type(model[0]) is nn.Conv2d
    [report] = tucker_decompose(model, ranks=(7, 7), only_if_it_pays=False)
    assert report.converted


def test_names_choose():
    model = Model()
    reports = tucker_decompose(model, include=["body*", "noise"], exclude=["noise"], ranks=0.25)
    assert [report.name for report in reports if report.converted] == ["body.0"]
    assert model.body[0].ranks == (12, 8)
    again = {report.name: report.reason for report in tucker_decompose(model, ranks={"noise": (4, 3)})}
    assert model.noise.ranks == (4, 3)
    assert again["body.0.core"] == "a step of a Tucker-2 convolution"
    assert again["stem"] == "no ranks are given for it"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ["nothing*"]}, "matches no layer"),
        ({"ranks": {"nowhere": (1, 1)}}, "'nowhere', which cannot be decomposed: the model has no such layer"),
        ({"ranks": 1.5}, "ranks must be a rank rule, a share"),
        ({"ranks": (0, 4)}, r"whole numbers from 1; found \(0, 4\)"),
        ({"ranks": {"stem": (4, 3), "noise": (4, 0)}}, r"whole numbers from 1; found \(4, 0\)"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options, message):
    model = Model()
    with pytest.raises(ValueError, match=message):
        tucker_decompose(model, only_if_it_pays=False, **options)
    assert not any(isinstance(module, Tucker2Conv) for module in model.modules())


def test_one_convolution_in_two_places_stays_one():
    conv = planted(48, 48, (4, 4))
    model = nn.Sequential(conv, nn.ReLU(), conv)
    tucker_decompose(model)
    assert isinstance(model[0], Tucker2Conv)
    assert model[0] is model[2]


def test_layers_with_hooks_factored_ones_and_the_model_itself_are_left_alone():
    hooked = nn.Sequential(planted(48, 32, (5, 4)))
    hooked[0].register_forward_hook(lambda *_: None)
    assert tucker_decompose(hooked)[0].reason == "it has hooks, which would be lost"
    factored = nn.Sequential(nn.Conv2d(8, 8, 3))
    factorize(factored)
    assert tucker_decompose(factored)[0].reason == "factored already; densify it first"
    assert "it is the model itself" in tucker_decompose(planted(48, 32, (5, 4)))[0].reason


def test_what_is_not_finite_is_left_alone_with_the_reason():
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    model[0].weight.data[0, 0, 0, 0] = torch.nan
    assert "not finite" in tucker_decompose(model)[0].reason
    with pytest.raises(FactorizationError, match="not finite"):
        tucker2(model[0])


def test_single_convolutions_that_cannot_be():
    with pytest.raises(ValueError, match="one group; found 2"):
        tucker2(nn.Conv2d(8, 8, 3, groups=2))
    with pytest.raises(ValueError, match="nothing in its weight is worth keeping"):
        tucker2(nn.Conv2d(32, 32, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_type_and_what_is_trained_are_kept(dtype):
    conv = nn.Conv2d(6, 6, 3).to(dtype)
    conv.bias.requires_grad_(False)
    original = copy.deepcopy(conv.state_dict())
    drawn = torch.get_rng_state()
    new = tucker2(conv, (3, 2))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert {p.dtype for p in new.parameters()} == {dtype}
    assert [name for name, p in new.named_parameters() if not p.requires_grad] == ["expand.bias"]
    assert all(torch.equal(value, original[name]) for name, value in conv.state_dict().items())
    assert list(new.state_dict()) == ["reduce.weight", "core.weight", "expand.weight", "expand.bias"]


def test_an_energy_rule_judges_both_unfoldings():
    new = tucker2(planted(48, 32, (5, 4), noise=0.001), Energy(0.999))
    assert new.ranks == (5, 4)
