"""Decompositions, and the stability of a basis as methods define it."""

import pytest
import torch
import torch.nn.functional as F
from lowrank_helpers import assert_near

from hpclr.lowrank import FactorizationError, stability
from hpclr.lowrank.factors import alignment, numerical_rank, polar, svd


def orthonormal(m, n):
    return torch.linalg.qr(torch.randn(m, n, dtype=torch.float64))[0]


def papers_formula(before, after):
    """Mean cosine similarity of the columns of U Vᵀ, the matrix seen tall (arXiv 2401.08505)."""
    p, q = ((u @ vh) for u, _, vh in (torch.linalg.svd(tall(w), full_matrices=False) for w in (before, after)))
    return float(F.cosine_similarity(p, q, dim=0).mean())


def tall(matrix):
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (16, 16), (5, 1)])
@pytest.mark.parametrize("noise", [0.01, 0.3, 3.0])
def test_equals_the_papers_formula(shape, noise):
    before = torch.randn(shape, dtype=torch.float64)
    after = before + noise * torch.randn(shape, dtype=torch.float64)
    assert stability(before, after) == pytest.approx(papers_formula(before, after), abs=1e-12)


def test_singular_values_do_not_matter():
    u, v, s = orthonormal(40, 15), orthonormal(15, 15), torch.rand(15, dtype=torch.float64) + 0.5
    weight = (u * s) @ v.mT
    assert stability(weight, weight) == pytest.approx(1)
    assert stability(weight, (u * s.flip(0)) @ v.mT) == pytest.approx(1)
    assert stability(weight, 5 * weight) == pytest.approx(1)
    assert stability(weight, -weight) == pytest.approx(-1)


def test_unrelated_matrices_have_nothing_in_common():
    values = [stability(torch.randn(300, 40), torch.randn(300, 40)) for _ in range(4)]
    assert abs(sum(values) / 4) < 0.01


def test_it_is_fragile_to_the_tail():
    """Half the spectrum scaled by 1e-3: noise of 1 % moves the basis though the weight hardly changes."""
    u, v = orthonormal(300, 40), orthonormal(40, 40)
    s = torch.linspace(1.5, 1, 40, dtype=torch.float64)
    s[20:] *= 1e-3
    before = (u * s) @ v.mT
    noise = torch.randn_like(before)
    after = before + 0.01 * before.norm() / noise.norm() * noise
    assert 0.4 < stability(before, after) < 0.7


def test_polar_factors_of_other_ranks_are_compared_by_their_normalised_product():
    full, part = orthonormal(20, 8), orthonormal(20, 8)
    part[:, 4:] = 0
    assert polar(svd(part)).norm() == pytest.approx(2)  # √4: directions without weight have no place in it
    expected = float((polar(svd(full)) * polar(svd(part))).sum() / (8**0.5 * 4**0.5))
    assert stability(full, part) == pytest.approx(expected, abs=1e-12)


def test_a_zero_matrix_is_not_aligned_with_anything():
    assert stability(torch.zeros(4, 3), torch.randn(4, 3)) == 0
    assert alignment(torch.zeros(2, 2), torch.eye(2)) == 0


@pytest.mark.parametrize(("a", "b"), [((4, 3), (3, 4)), ((4, 3, 2), (4, 3, 2)), ((4,), (4,))])
def test_what_cannot_be_compared_is_refused(a, b):
    with pytest.raises(ValueError, match="compares two matrices of one shape, found"):
        stability(torch.ones(a), torch.ones(b))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_has_no_decomposition(value):
    matrix = torch.ones(4, 3)
    matrix[1, 2] = value
    with pytest.raises(FactorizationError, match="a 4×3 matrix has entries that are not finite"):
        svd(matrix)


@pytest.mark.parametrize(
    ("dtype", "working"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.half, torch.float32),
    ],
)
def test_decompositions_are_made_in_float32_at_least(dtype, working):
    matrix = torch.randn(9, 6).to(dtype)
    u, s, vh = svd(matrix)
    assert {part.dtype for part in (u, s, vh)} == {working}
    assert_near((u * s) @ vh, matrix.to(working))
    assert_near(u.mT @ u, torch.eye(6, dtype=working))
    assert (s.diff() <= 0).all()


def test_a_matrix_on_which_the_quick_way_fails(monkeypatch):
    """No matrix is known on which LAPACK fails everywhere, so the failure of float32 is put in by hand."""
    real = torch.linalg.svd

    def fails_in_float32(matrix, full_matrices):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", fails_in_float32)
    matrix = torch.randn(9, 6)
    u, s, vh = svd(matrix)
    assert u.dtype == torch.float32
    assert_near((u * s) @ vh, matrix)
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: fails_in_float32(torch.ones(1), False))
    with pytest.raises(FactorizationError, match="the SVD of a 9×6 matrix did not converge"):
        svd(matrix)


def test_the_numerical_rank():
    weight = torch.randn(30, 4) @ torch.randn(4, 20)
    assert numerical_rank(svd(weight).s, (30, 20)) == 4
    assert numerical_rank(svd(torch.zeros(3, 3)).s, (3, 3)) == 0
    assert numerical_rank(torch.empty(0), (0, 3)) == 0
