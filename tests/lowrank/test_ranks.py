"""Rank rules: each against its definition, on planted ranks, on pure noise, and at the edges."""

import contextlib
import io
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hpclr.lowrank.noise import marchenko_pastur_median, optimal_threshold
from hpclr.lowrank.ranks import (
    Energy,
    GavishDonoho,
    MarchenkoPastur,
    RelativeCutoff,
    StableRank,
    SumProportion,
    noise_level,
    rank_rule,
)

PAGE = Path(__file__).parents[2] / "docs" / "rank-rules.md"

ALL = [
    RelativeCutoff(0.1),
    Energy(0.9),
    SumProportion(0.9),
    StableRank(),
    StableRank(3.0),
    MarchenkoPastur(),
    MarchenkoPastur(0.02),
    GavishDonoho(),
    GavishDonoho(0.02),
]


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def noise_spectrum(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """The singular values of a freshly initialised Linear: uniform entries, variance 1/(3·fan_in)."""
    torch.manual_seed(seed)
    return torch.linalg.svdvals(nn.Linear(shape[1], shape[0]).weight.detach())


def linear_noise(shape: tuple[int, int]) -> float:
    return 1 / math.sqrt(3 * shape[1])


def planted(rank: int, shape: tuple[int, int], noise: float) -> Tensor:
    """Singular values of a rank-`rank` matrix, 2 to 6 times noise·√long in size, plus Gaussian noise."""
    torch.manual_seed(3)
    m, n = shape
    u, v = torch.linalg.qr(torch.randn(m, rank)).Q, torch.linalg.qr(torch.randn(n, rank)).Q
    strengths = torch.linspace(6, 2, rank) * noise * math.sqrt(max(shape))
    return torch.linalg.svdvals((u * strengths) @ v.T + noise * torch.randn(m, n))


# --- each rule against its definition -------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "spectrum", "rank"),
    [
        (RelativeCutoff(0.1), values(10, 5, 1, 0.999), 3),
        (RelativeCutoff(0.5), values(4, 2, 2, 1.9), 3),
        (RelativeCutoff(0.999), values(2, 2, 2), 3),
        (RelativeCutoff(0.1), values(7), 1),
        (Energy(0.9), values(3, 1, 0), 1),  # 9 of 10, on the boundary
        (Energy(0.91), values(3, 1, 0), 2),
        (Energy(0.5), values(1, 1, 1, 1), 2),
        (Energy(1.0), values(1, 1e-9, 1e-12, 0), 3),  # their squares vanish beside 1
        (Energy(1 - 2**-53), values(1, 1e-9, 0), 1),
        (SumProportion(0.75), values(2, 1, 1, 0), 2),
        (SumProportion(0.76), values(2, 1, 1, 0), 3),
        (SumProportion(0.01), values(2, 1, 1), 1),
        (SumProportion(1.0), values(1, 1e-17, 0), 2),
        (StableRank(), values(2, 2, 2, 0), 3),
        (StableRank(), values(2, 1, 1), 2),  # 6/4 = 1.5
        (StableRank(2.0), values(2, 1, 1, 1, 0), 4),  # 2·7/4 = 3.5
        (StableRank(100.0), values(2, 1, 0), 2),
        (MarchenkoPastur(1.0), values(40, 30, 20.3, 20.1, 3), 3),  # √(398.0 + 0.98·11.7) = 20.23
        (GavishDonoho(1.0), values(40, 23.2, 23.0, 3), 2),  # 10·4/√3 = 23.09
    ],
)
def test_rule_against_its_definition(rule, spectrum, rank):
    shape = (100, 100) if isinstance(rule, (MarchenkoPastur, GavishDonoho)) else (9, 7)
    assert rule(spectrum, shape) == rank


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_shares_are_reached_with_the_fewest(share):
    spectrum = noise_spectrum((60, 90)).double()
    for rule, parts in [(Energy(share), spectrum**2), (SumProportion(share), spectrum)]:
        rank, total = rule(spectrum, (60, 90)), math.fsum(parts)
        assert math.fsum(parts[:rank]) >= share * total > math.fsum(parts[: rank - 1])


@pytest.mark.parametrize("rank", range(1, 40))
def test_stable_rank_of_equal_values_in_float32_is_their_number(rank):
    torch.manual_seed(rank)
    basis = torch.linalg.qr(torch.randn(64, rank)).Q
    spectrum = torch.linalg.svdvals(basis @ torch.linalg.qr(torch.randn(48, rank)).Q.T)
    assert StableRank()(spectrum, (64, 48)) == rank


# --- the constants of random-matrix theory --------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 300), (270, 300), (200, 600), (60, 1200)])
def test_median_of_the_law_is_that_of_simulated_noise(shape):
    torch.manual_seed(0)
    eigenvalues = torch.linalg.svdvals(torch.randn(shape, dtype=torch.float64)).square() / max(shape)
    aspect = min(shape) / max(shape)
    assert marchenko_pastur_median(aspect) == pytest.approx(float(eigenvalues.median()), rel=0.02)


def test_median_of_the_law_by_direct_integration():
    for aspect in (0.05, 1 / 3, 0.8, 1.0):
        x = torch.linspace((1 - aspect**0.5) ** 2, marchenko_pastur_median(aspect), 2_000_001, dtype=torch.float64)
        middle = (x[1:] + x[:-1]) / 2
        low, high = (1 - aspect**0.5) ** 2, (1 + aspect**0.5) ** 2
        density = ((high - middle) * (middle - low)).sqrt() / (2 * math.pi * aspect * middle)
        assert float((density * x.diff()).sum()) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("aspect", [0.001, 0.01, 0.1, 0.25, 1 / 3, 0.5, 0.75, 0.9, 1.0])
def test_threshold_agrees_with_the_published_cubic_fit(aspect):
    fit = 0.56 * aspect**3 - 0.95 * aspect**2 + 1.82 * aspect + 1.43
    assert optimal_threshold(aspect) / math.sqrt(marchenko_pastur_median(aspect)) == pytest.approx(fit, rel=0.02)


def test_threshold_of_square_matrices():
    assert optimal_threshold(1.0) == pytest.approx(4 / math.sqrt(3), rel=1e-14)
    assert optimal_threshold(1.0) / math.sqrt(marchenko_pastur_median(1.0)) == pytest.approx(2.858, abs=1e-3)


def test_edge_holds_back_noise_in_about_95_of_100_cases():
    generator = torch.Generator().manual_seed(0)
    shape = (20, 60)
    spectra = torch.linalg.svdvals(torch.randn(1000, *shape, generator=generator, dtype=torch.float64))
    passed = sum(MarchenkoPastur(1.0)(spectrum, shape) > 0 for spectrum in spectra)
    assert 30 <= passed <= 75


# --- planted ranks and pure noise -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "noise"), [((400, 1200), 0.05), ((1200, 400), 1.0), ((400, 400), 1e-3), ((128, 900), 30.0)]
)
def test_noise_rules_find_the_planted_rank(shape, noise):
    spectrum = planted(12, shape, noise)
    for rule in (MarchenkoPastur(), MarchenkoPastur(noise), GavishDonoho(), GavishDonoho(noise)):
        assert rule(spectrum, shape) == 12, rule


@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (768, 3072), (64, 64)])
def test_noise_rules_keep_almost_nothing_of_a_fresh_layer(shape):
    spectrum = noise_spectrum(shape, seed=1)
    assert MarchenkoPastur()(spectrum, shape) <= 1
    assert MarchenkoPastur(linear_noise(shape))(spectrum, shape) <= 1
    assert GavishDonoho()(spectrum, shape) == 0
    assert GavishDonoho(linear_noise(shape))(spectrum, shape) == 0
    assert noise_level(spectrum, shape) == pytest.approx(linear_noise(shape), rel=0.05)


def test_relative_cutoff_prunes_noise_by_the_shape_of_the_layer():
    square, tall = noise_spectrum((768, 768)), noise_spectrum((3072, 768))
    assert RelativeCutoff(0.1)(square, (768, 768)) == pytest.approx(671, abs=4)
    assert RelativeCutoff(0.2)(square, (768, 768)) == pytest.approx(575, abs=6)
    assert RelativeCutoff(0.33)(tall, (3072, 768)) == 768
    assert RelativeCutoff(0.37)(tall, (3072, 768)) < 768


# --- spectra that were cut before -----------------------------------------------------------------


def test_noise_estimate_stands_until_half_of_the_spectrum_is_gone():
    shape = (401, 900)
    spectrum = planted(12, shape, 0.5)
    full = noise_level(spectrum, shape)
    assert noise_level(spectrum[:300], shape) == full
    assert noise_level(spectrum[:201], shape) == full
    assert noise_level(spectrum[:200], shape) == 0.0
    assert MarchenkoPastur()(spectrum[:201], shape) == 12
    assert MarchenkoPastur()(spectrum[:200], shape) == 200
    assert GavishDonoho()(spectrum[:12], shape) == 12
    assert MarchenkoPastur(0.5)(spectrum[:200], shape) == 12


# --- the edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ALL, ids=str)
def test_nothing_is_kept_of_nothing(rule):
    assert rule(torch.zeros(5), (5, 8)) == 0
    assert rule(torch.zeros(0), (5, 8)) == 0


@pytest.mark.parametrize("rule", ALL, ids=str)
@pytest.mark.parametrize(
    ("spectrum", "shape", "message"),
    [
        (values(2, math.nan), (4, 4), "hold 1 NaN or infinite values of 2"),
        (values(math.inf, 1), (4, 4), "hold 1 NaN or infinite values of 2"),
        (values(1, 2), (4, 4), "must descend"),
        (values(1, -1), (4, 4), "not be negative"),
        (values(3, 2, 1), (2, 4), r"at most 2 singular values .* shape \(3,\)"),
        (torch.eye(2), (4, 4), r"found a tensor of shape \(2, 2\)"),
        (values(1), (4, 0), r"each at least 1; found \(4, 0\)"),
    ],
)
def test_what_is_no_spectrum_is_refused(rule, spectrum, shape, message):
    with pytest.raises(ValueError, match=message):
        rule(spectrum, shape)


@pytest.mark.parametrize("rule", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype_counts_as_the_same_numbers_in_float64(rule, dtype):
    spectrum = noise_spectrum((40, 60)).to(dtype).requires_grad_()
    assert rule(spectrum, (40, 60)) == rule(spectrum.detach().double(), (40, 60))


@pytest.mark.parametrize("rule", ALL, ids=str)
def test_rules_are_values(rule):
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert eval(repr(rule)) == rule
    assert hash(rule) == hash(pickle.loads(pickle.dumps(rule)))


spectra = st.lists(st.floats(0, 1e6, width=32), max_size=12).map(
    lambda numbers: torch.tensor(sorted(numbers, reverse=True), dtype=torch.float64)
)
shares = st.floats(1e-3, 1 - 1e-3)
scale_free = st.one_of(
    shares.map(RelativeCutoff),
    shares.map(Energy),
    shares.map(SumProportion),
    shares.map(StableRank),
    st.sampled_from([Energy(1.0), SumProportion(1.0), MarchenkoPastur(), GavishDonoho()]),
)


@given(spectra, scale_free, st.integers(12, 40))
def test_rank_is_a_whole_number_of_nonzero_values(spectrum, rule, long):
    rank = rule(spectrum, (12, long))
    assert type(rank) is int
    assert 0 <= rank <= int(spectrum.count_nonzero())
    assert rule(spectrum, (long, 12)) == rank


@given(spectra, scale_free, st.integers(-600, 600))
def test_scale_does_not_matter(spectrum, rule, exponent):
    """Powers of two scale without rounding, so that the ranks must agree to the last value."""
    assert rule(spectrum * 2.0**exponent, (12, 30)) == rule(spectrum, (12, 30))


@given(spectra, shares, shares)
def test_rank_is_monotone_in_the_option(spectrum, one, other):
    low, high = sorted((one, other))
    assert RelativeCutoff(low)(spectrum, (12, 12)) >= RelativeCutoff(high)(spectrum, (12, 12))
    for kind in (Energy, SumProportion, StableRank):
        assert kind(low)(spectrum, (12, 12)) <= kind(high)(spectrum, (12, 12))
    for kind in (MarchenkoPastur, GavishDonoho):
        assert kind(low)(spectrum, (12, 12)) >= kind(high)(spectrum, (12, 12))


@given(spectra, shares)
def test_what_is_kept_is_above_what_is_not(spectrum, cutoff):
    rank = RelativeCutoff(cutoff)(spectrum, (12, 12))
    assert all(float(s) >= cutoff * float(spectrum[0]) for s in spectrum[:rank])
    assert all(float(s) < cutoff * float(spectrum[0]) or s == 0 for s in spectrum[rank:])


# --- rules from a run file --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        (0.1, RelativeCutoff(0.1)),
        ({"rule": "relative", "cutoff": 0.2}, RelativeCutoff(0.2)),
        ({"rule": "energy", "share": 0.99}, Energy(0.99)),
        ({"rule": "sum_proportion", "share": 1}, SumProportion(1)),
        ({"rule": "stable_rank"}, StableRank(1.0)),
        ({"rule": "stable_rank", "scale": 2.5}, StableRank(2.5)),
        ({"rule": "marchenko_pastur", "noise": None}, MarchenkoPastur()),
        ({"rule": "gavish_donoho", "noise": 0.02}, GavishDonoho(0.02)),
        (Energy(0.5), Energy(0.5)),
    ],
)
def test_rule_from_a_specification(spec, rule):
    assert rank_rule(spec) == rule


def test_any_callable_passes_through():
    def half(singular_values: Tensor, shape: tuple[int, int]) -> int:
        return len(singular_values) // 2

    assert rank_rule(half) is half


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (0.0, ValueError, "cutoff must be a number above 0 and below 1, found 0.0"),
        (1, ValueError, "above 0 and below 1, found 1.0"),
        (math.nan, ValueError, "found nan"),
        ({"rule": "enrgy", "share": 0.9}, ValueError, "'enrgy': 'rule' must be one of relative, energy, sum_"),
        ({"share": 0.9}, ValueError, "Unknown rank rule None"),
        ({"rule": ["energy"]}, ValueError, "must be one of relative"),
        ({"rule": "energy"}, ValueError, r"takes share \(required\); found nothing"),
        ({"rule": "energy", "share": 0.9, "cut": 1}, ValueError, "found share, cut"),
        ({"rule": "energy", "share": 1.01}, ValueError, "above 0 and at most 1, found 1.01"),
        ({"rule": "energy", "share": "0.9"}, TypeError, "share must be a number .* found '0.9'"),
        ({"rule": "sum_proportion", "share": 0}, ValueError, "found 0"),
        ({"rule": "stable_rank", "scale": math.inf}, ValueError, "above 0 and finite, found inf"),
        ({"rule": "stable_rank", "scale": True}, TypeError, "found True"),
        ({"rule": "marchenko_pastur", "noise": 0.0}, ValueError, "or None to estimate it, found 0.0"),
        ({"rule": "gavish_donoho", "noise": -1}, ValueError, "GavishDonoho: noise"),
        ("energy", TypeError, "with one of the rules relative, energy"),
        (True, TypeError, "found True"),
        (MarchenkoPastur, TypeError, "MarchenkoPastur"),
    ],
)
def test_wrong_specifications_name_what_is_right(spec, error, message):
    with pytest.raises(error, match=message):
        rank_rule(spec)


# --- the page ---------------------------------------------------------------------------------------


def test_the_page_shows_what_its_snippet_prints():
    text = PAGE.read_text(encoding="utf-8")
    snippet, table = re.search(r"```python\n(.*?)```\n\n(\|.*)", text, re.DOTALL).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(snippet, {})
    assert printed.getvalue().splitlines() == table.splitlines()
