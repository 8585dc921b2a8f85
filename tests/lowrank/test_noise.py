"""The laws of noise, each against a simulation, and shrinkage against cutting."""

import math

import pytest
import torch
from torch import Tensor, nn

from hpclr.lowrank import Energy, GavishDonoho, MarchenkoPastur, densify, factorize
from hpclr.lowrank.noise import bulk, detection_threshold, noise_edge, outlier, shrunk, strength
from hpclr.lowrank.spectra import decompose

SHAPE = (400, 1200)
SHAPES = [SHAPE, SHAPE[::-1], (300, 300)]


def planted(shape: tuple[int, int], strengths: list[float], noise: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A signal with these singular values, and the same with noise; float64."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(size, len(strengths), generator=generator, dtype=torch.float64)).Q for size in shape
    )
    signal = u * torch.tensor(strengths, dtype=torch.float64) @ v.mT
    return signal, signal + noise * torch.randn(shape, generator=generator, dtype=torch.float64)


def leading(matrix: Tensor) -> tuple[Tensor, float, Tensor]:
    u, s, vh = decompose(matrix.float())
    return u[:, 0], float(s[0]), vh[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_fills_the_bulk_and_no_more(shape):
    s = torch.linalg.svdvals(planted(shape, [0.0])[1])
    lower, upper = bulk(shape)
    assert upper == pytest.approx(float(s[0]), rel=0.02)
    assert lower == pytest.approx(float(s[-1]), abs=0.02 * upper)
    assert upper < noise_edge(shape) < 1.03 * upper


@pytest.mark.parametrize(
    ("x", "value", "short", "long"),
    [(1.5, 1.932, 0.814, 0.647), (1.0, 1.633, 0.500, 0.333)],
)
def test_prediction_in_the_units_of_the_literature(x, value, short, long):
    """Singular values divided by √long; β = ⅓, where the formulas in β give these numbers."""
    beta = 1 / 3
    found = outlier(x * math.sqrt(1200), SHAPE)
    assert found.value / math.sqrt(1200) == pytest.approx(value, abs=1e-3)
    assert found.value / math.sqrt(1200) == pytest.approx(math.sqrt((x + 1 / x) * (x + beta / x)))
    assert (found.left, found.right) == pytest.approx((short, long), abs=1e-3)
    assert found.left == pytest.approx((x**4 - beta) / (x**4 + beta * x**2))
    assert found.right == pytest.approx((x**4 - beta) / (x**4 + x**2))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_signal_is_told_from_what_is_seen(shape):
    threshold = detection_threshold(shape)
    strengths = [threshold * factor for factor in (1.01, 1.5, 4.0, 1e4)]
    assert [strength(outlier(x, shape).value, shape) for x in strengths] == pytest.approx(strengths, rel=1e-6)
    assert strength(bulk(shape)[1], shape) == strength(0.5 * bulk(shape)[0], shape) == 0


@pytest.mark.parametrize("x", [1.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prediction_against_a_simulation(shape, x):
    strength = x * math.sqrt(max(shape)) * (1.15 if shape[0] == shape[1] else 1)
    runs = []
    for seed in range(3):
        signal, noisy = planted(shape, [strength], seed=seed)
        (u, _, v), (found_u, y, found_v) = leading(signal), leading(noisy)
        runs.append([y / math.sqrt(max(shape)), float(u @ found_u) ** 2, float(v @ found_v) ** 2])
    value, left, right = torch.tensor(runs).mean(0).tolist()
    expected = outlier(strength, shape)
    assert value == pytest.approx(expected.value / math.sqrt(max(shape)), abs=0.05)
    assert left == pytest.approx(expected.left, abs=0.09)
    assert right == pytest.approx(expected.right, abs=0.09)


def test_below_the_threshold_nothing_is_seen():
    threshold = detection_threshold(SHAPE)
    assert threshold == pytest.approx((1 / 3) ** 0.25 * math.sqrt(1200))
    assert outlier(threshold, SHAPE) == (bulk(SHAPE)[1], 0.0, 0.0)
    assert outlier(threshold * 1.0001, SHAPE).value == pytest.approx(bulk(SHAPE)[1], rel=1e-6)
    signal, noisy = planted(SHAPE, [0.7 * threshold])
    (u, _, _), (found_u, y, _) = leading(signal), leading(noisy)
    assert y < noise_edge(SHAPE)
    assert float(u @ found_u) ** 2 < 0.05


@pytest.mark.parametrize(
    "rule", [MarchenkoPastur(), MarchenkoPastur(0.02), GavishDonoho(), GavishDonoho(0.02)], ids=str
)
def test_planted_directions_are_found_and_hidden_ones_are_not(rule):
    threshold = detection_threshold(SHAPE)
    strong, weak = [(2 + 0.3 * i) * threshold for i in range(12)][::-1], [0.6 * threshold] * 5
    _, noisy = planted(SHAPE, [0.02 * x for x in strong + weak], noise=0.02)
    assert rule(torch.linalg.svdvals(noisy), SHAPE) == 12


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shrinking_undoes_what_noise_does(shape):
    """η(y(x)) = x·√(⟨u, û⟩² ⟨v, v̂⟩²), in any units; nothing within the bulk."""
    for factor in (1.01, 1.5, 4.0):
        strength = factor * detection_threshold(shape)
        value, left, right = outlier(strength, shape)
        found = shrunk(torch.tensor([0.1 * value], dtype=torch.float64), shape, noise=0.1)
        assert float(found) == pytest.approx(0.1 * strength * math.sqrt(left * right), rel=1e-6)
    assert shrunk(torch.tensor([0.999999 * bulk(shape)[1], 1.0, 0.0]), shape, noise=1.0).tolist() == [0.0, 0.0, 0.0]


def test_without_noise_nothing_shrinks():
    s = torch.tensor([3.0, 1e-3, 0.0])
    assert torch.equal(shrunk(s, SHAPE, noise=0.0), s)


@pytest.mark.parametrize(
    ("rule", "ranks", "gain"),
    [(MarchenkoPastur(), (4, 5), 0.07), (MarchenkoPastur(0.02), (4, 5), 0.07), (GavishDonoho(), (3, 4), 0.04)],
    ids=str,
)
@pytest.mark.parametrize("shape", [(200, 300), (300, 200)], ids=str)
def test_a_factored_layer_is_nearer_to_the_signal_with_shrinking(rule, ranks, gain, shape):
    threshold = 0.02 * detection_threshold(shape)
    signal, noisy = planted(shape, [factor * threshold for factor in (5, 3, 2, 1.6, 1.3)], noise=0.02)
    errors = {}
    for shrink in (False, True):
        layer = nn.Linear(shape[1], shape[0], bias=False)
        layer.weight.data = noisy.float()
        [report] = factorize(layer, rule, shrink=shrink)
        assert report.rank in ranks
        errors[shrink] = float((densify(layer).weight.detach() - signal).norm())
    assert errors[True] < (1 - gain) * errors[False]


def test_in_a_layer_of_noise_one_direction_is_left_without_weight():
    torch.manual_seed(0)
    layer = nn.Linear(60, 40)
    factorize(layer, MarchenkoPastur(), shrink=True)
    assert layer.sigma.tolist() == [[0.0]]


def test_what_is_factored_is_not_shrunk_again():
    layer = nn.Linear(60, 40)
    layer.weight.data = planted((40, 60), [5.0, 4.0], noise=0.05)[1].float()
    rule = MarchenkoPastur(0.05)
    factorize(layer, rule, shrink=True)
    once = layer.sigma.clone()
    factorize(layer, rule, shrink=True)
    assert torch.equal(layer.sigma, once)


@pytest.mark.parametrize("rank", [None, 3, 0.5, Energy(0.9), {"Linear": 2}], ids=str)
def test_shrinking_without_a_noise_rule_is_refused(rank):
    layer = nn.Linear(6, 4)
    with pytest.raises(ValueError, match=r"give MarchenkoPastur or GavishDonoho as rank"):
        factorize(layer, rank, shrink=True)
    assert type(layer) is nn.Linear
