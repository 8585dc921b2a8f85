"""All singular values of large matrices, and what noise alone would give."""

import math

import pytest
import torch

from hpclr.lowrank import spectra
from hpclr.lowrank.factors import FactorizationError
from hpclr.lowrank.noise import noise_edge, noise_spectrum
from hpclr.lowrank.ranks import label_of, rank_rule


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_they_are_those_of_the_matrix_as_it_is_stored(shape, dtype, monkeypatch):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = torch.linalg.svdvals(matrix.double())
    whole = spectra.singular_values(matrix)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-7 * float(expected[0]))
    monkeypatch.setattr(spectra, "_BLOCK", 8 * min(shape) * 7)  # seven rows at a time
    torch.testing.assert_close(spectra.singular_values(matrix), expected, rtol=0, atol=1e-7 * float(expected[0]))


def test_a_matrix_that_is_not_finite_has_none():
    matrix = torch.ones(5, 3)
    matrix[4, 1] = torch.nan
    with pytest.raises(FactorizationError, match="not finite"):
        spectra.singular_values(matrix)


def test_factors_that_are_not_orthonormal_have_those_of_their_product():
    torch.manual_seed(0)
    u, s, vh = torch.randn(20, 4), torch.rand(4), torch.randn(4, 9)
    found = spectra.singular_values(spectra.core_of(u, s, vh))
    torch.testing.assert_close(found, torch.linalg.svdvals((u * s).double() @ vh.double())[:4], rtol=1e-6, atol=0)


def test_the_effective_rank_counts_equal_values_and_ignores_zeros():
    assert spectra.effective_rank(torch.tensor([3.0] * 5 + [0.0])) == pytest.approx(5)
    assert spectra.effective_rank(torch.zeros(3)) == 0
    p = torch.tensor([0.75, 0.25], dtype=torch.float64)
    assert spectra.effective_rank(p) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


@pytest.mark.parametrize("shape", [(400, 400), (400, 100), (150, 600)])
def test_noise_has_the_spectrum_that_is_foretold(shape):
    values = torch.linalg.svdvals(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    expected = torch.tensor(noise_spectrum(shape, min(shape)))
    assert float((values - expected).abs().max() / values[0]) < 0.02
    assert float(values[0]) < noise_edge(shape) * 1.02
    assert float(values[0]) > noise_edge(shape) * 0.95


def test_rules_have_short_names():
    labels = [label_of(rank_rule(spec)) for spec in (0.1, {"rule": "energy", "share": 0.99}, {"rule": "gavish_donoho"})]
    assert labels == ["relative 0.1", "energy 0.99", "gavish_donoho"]
