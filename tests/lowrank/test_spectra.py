"""Polar factors, ranks and decompositions through Gram matrices, held to the bounds that `spectra` states."""

import math

import pytest
import torch

from hpclr.lowrank import (
    Energy,
    FactorizationError,
    GavishDonoho,
    MarchenkoPastur,
    RelativeCutoff,
    StableRank,
    SumProportion,
    spectra,
)
from hpclr.lowrank.factors import alignment, negligible, polar, svd
from hpclr.lowrank.ranks import noise_estimated_by

WAYS = ["eigenvectors", "products"]
SHAPES = [(60, 60), (150, 50), (50, 150), (33, 32)]
TAILS = [0.5, 1e-3, 1e-4, 1e-6, 0.0]
norm = torch.linalg.matrix_norm


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Both ways to the inverse root, whichever this machine would take."""
    monkeypatch.setattr(spectra, "_PRODUCTS_ON", ("cpu",) if request.param == "products" else ())
    return request.param


def orthonormal(m, n, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(m, n, generator=g, dtype=torch.float64)).Q


def planted(shape, tail, dtype=torch.float32, seed=0, left_out=0):
    """Half of the singular values between 1 and 0.1, the other half at `tail`; the last ones missing altogether."""
    n = min(shape) - left_out
    s = torch.logspace(0, -1, n, dtype=torch.float64)
    s[n // 2 :] = tail
    return (orthonormal(shape[0], n, seed) * s @ orthonormal(shape[1], n, seed + 1).mT).to(dtype)


def exact(matrix):
    """The decomposition of the matrix as it is stored, and how many directions are more than float32's rounding."""
    basis = svd(matrix.double())
    return basis, int((basis.s > negligible(matrix.shape, torch.float32) * basis.s[0]).sum())


def error_on_leading(found, basis, k):
    """‖(P − U Vᵀ) V_k‖₂."""
    v = basis.vh[:k].mT
    return float(norm(found.double() @ v - basis.u[:, :k], 2)) if k else 0.0


# --- polar factors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.half])
def test_polar_factors_are_those_of_the_exact_decomposition(way, shape, tail, dtype):
    matrix = planted(shape, tail, dtype)
    found = spectra.measure(matrix, None)
    basis, k = exact(matrix)
    assert found.polar.dtype == torch.float32
    assert (found.rank, found.noise) == (None, None)
    assert error_on_leading(found.polar, basis, k) <= 1e-6
    assert float(norm(found.polar.double(), 2)) <= 1 + 1e-6, "what is rounding does not grow"


@pytest.mark.parametrize("shape", [(2, 2), (4, 4), (10, 10), (64, 64), (200, 200), (400, 20)])
def test_polar_factors_are_within_their_bound_down_to_its_floor(way, shape):
    for seed in range(5):
        floor = max(shape) * 2**-23
        tail = floor * (1.05 + 2 * torch.rand(1, generator=torch.Generator().manual_seed(seed)).item())
        matrix = planted(shape, tail, seed=2 * seed)
        basis, k = exact(matrix)
        found = spectra.measure(matrix, None).polar
        assert error_on_leading(found, basis, k) <= 1e-6 + 0.08 / max(shape) ** 2


def test_what_is_rounding_is_left_out_or_damped(way):
    """Of 60 directions 30 are at 1e-6·σ₁, below the floor at 7e-6·σ₁."""
    found = spectra.measure(planted((60, 60), 1e-6), None).polar.double()
    weight = float(norm(found)) ** 2 - 30
    assert weight == pytest.approx(0, abs=1e-5) if way == "eigenvectors" else 1 < weight < 30 * 0.6**2


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_short_of_full_rank_has_a_polar_factor_of_its_rank(way, shape):
    matrix = planted(shape, 0.3, torch.float32, left_out=7)
    found = spectra.measure(matrix, None).polar
    basis, k = exact(matrix)
    assert k == min(shape) - 7
    assert error_on_leading(found, basis, k) <= 1e-6
    assert float(norm(found)) == pytest.approx(math.sqrt(k), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_size_of_a_matrix_does_not_matter(way, scale):
    matrix = planted((40, 30), 1e-3)
    scaled = spectra.measure(scale * matrix, RelativeCutoff(0.01))
    assert scaled.rank == 15
    assert float(norm(scaled.polar - spectra.measure(matrix, None).polar)) < 1e-4  # scaling rounds
    basis, k = exact(scale * matrix)
    assert error_on_leading(scaled.polar, basis, k) <= 1e-6


def test_a_matrix_without_weight_has_no_basis(way):
    for matrix in (torch.zeros(5, 3), torch.zeros(3, 5), torch.zeros(1, 1)):
        found = spectra.measure(matrix, RelativeCutoff(0.1))
        assert not found.polar.any()
        assert found.rank == 0


def test_the_smallest_matrices(way):
    assert spectra.measure(torch.tensor([[-3.0]]), RelativeCutoff(0.5))[:2] == (torch.tensor([[-1.0]]), 1)
    column = torch.tensor([[3.0], [4.0]])
    torch.testing.assert_close(spectra.measure(column, None).polar, column / 5)
    torch.testing.assert_close(spectra.measure(column.mT, None).polar, column.mT / 5)


def test_float64_is_decomposed_exactly(way):
    matrix = planted((40, 30), 1e-9, torch.float64)
    found = spectra.measure(matrix, RelativeCutoff(1e-8))
    basis = svd(matrix)
    assert torch.equal(found.polar, polar(basis))
    assert found.rank == 15
    assert all(torch.equal(a, b) for a, b in zip(spectra.decompose(matrix), basis, strict=True))


@pytest.mark.parametrize("shape", [(200, 200), (64, 200)])
@pytest.mark.parametrize("tail", [0.5, 1e-3, 1e-6, 0.0])
@pytest.mark.parametrize("drift", [1e-3, 0.1])
def test_the_stability_is_that_of_exact_decompositions(way, shape, tail, drift):
    """Within 10⁻⁶ and what the directions beneath rounding can make up, which the one way leaves out."""
    before = planted(shape, tail)
    after = before + drift * torch.randn(shape, generator=torch.Generator().manual_seed(5)) / max(shape) ** 0.5
    bases = [basis.leading(k) for basis, k in (exact(before), exact(after))]
    expected = alignment(*(basis.u @ basis.vh for basis in bases))
    p, q = (spectra.measure(matrix, None).polar for matrix in (before, after))
    k = min(len(basis.s) for basis in bases)
    damped = 0.0 if way == "eigenvectors" else (min(shape) - k) / min(shape)
    assert alignment(p, q) == pytest.approx(expected, abs=2e-6 + damped)
    if way == "products" and damped:
        assert alignment(p, q) != pytest.approx(expected, abs=2e-6), "else the bound says too little"


@pytest.mark.parametrize("floor", [1e-2, 1e-4, 1e-7])
def test_the_number_of_steps_follows_from_the_floor(floor):
    """All that lies above the floor comes within 10⁻⁶ of 1, and no step more is taken than that needs."""
    x = torch.logspace(math.log10(floor), 0, 500, dtype=torch.float64)
    before = x
    for a in spectra._steps(floor):
        before, x = x, a * x * (3 - a**2 * x**2) / 2
    assert float((1 - x).abs().max()) <= 1e-6 < float((1 - before).abs().max())
    assert len(spectra._steps(floor)) <= math.log(1 / floor, 2.5) + 4


def test_the_bound_on_the_largest_eigenvalue():
    g = torch.Generator().manual_seed(0)
    for matrix in (torch.randn(50, 30, generator=g).double(), torch.eye(30).double(), torch.ones(50, 30).double()):
        gram = matrix.mT @ matrix
        true = float(torch.linalg.eigvalsh(gram)[-1])
        for doublings in (0, 3, 16):
            bound = float(spectra.largest(gram, doublings))
            assert true * (1 - 1e-12) <= bound <= true * 30 ** (0.5 ** (doublings + 1)) * (1 + 1e-12)


# --- ranks -----------------------------------------------------------------------------------------------------------

RULES = [
    RelativeCutoff(0.1),
    RelativeCutoff(0.02),
    Energy(0.9),
    SumProportion(0.8),
    StableRank(2.0),
    MarchenkoPastur(),
    MarchenkoPastur(0.05),
    GavishDonoho(),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("shape", [(60, 60), (50, 120)])
def test_ranks_are_those_of_exact_singular_values(way, rule, shape):
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        matrix = 0.05 * torch.randn(shape, generator=g) + 2 * planted(shape, 0.0, seed=seed)
        found = spectra.measure(matrix, rule)
        s = torch.linalg.svdvals(matrix.double())
        assert found.rank == rule(s, shape)
        noise = noise_estimated_by(rule, s, shape)
        assert found.noise == (noise and pytest.approx(noise, rel=1e-9))


@pytest.mark.parametrize("cutoff", [0.003, 0.1, 0.9])
def test_counting_tells_apart_what_is_two_parts_in_ten_thousand_from_the_cutoff(cutoff):
    for beyond, expected in ((1 + 2e-4, 8), (1 - 2e-4, 3)):
        s = torch.tensor([1.0, 0.99, 0.95, *[beyond * cutoff] * 5, 0.9 * cutoff, 0.0], dtype=torch.float64)
        matrix = orthonormal(20, 10, 0) * s @ orthonormal(10, 10, 1).mT
        assert spectra.count_above(matrix.mT @ matrix, cutoff) == expected


# --- decompositions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("left_out", [0, 7])
def test_decompositions_are_within_their_bounds(shape, tail, dtype, left_out):
    matrix = planted(shape, tail, dtype, left_out=left_out)
    u, s, vh = spectra.decompose(matrix)
    eye = torch.eye(min(shape), dtype=torch.float64)
    assert {part.dtype for part in (u, s, vh)} == {torch.float64}
    assert (u.shape, vh.shape) == ((shape[0], min(shape)), (min(shape), shape[1]))
    assert bool((s >= 0).all())
    assert bool((s.diff() <= 0).all())
    largest = float(s[0])
    assert float((s - torch.linalg.svdvals(matrix.double())).abs().max()) <= 1e-7 * largest
    assert float(norm(u * s @ vh - matrix.double(), 2)) <= 1e-7 * largest
    assert max(float(norm(u.mT @ u - eye, 2)), float(norm(vh @ vh.mT - eye, 2))) <= 1e-8


def test_small_singular_values_have_as_many_digits_as_can_be():
    """|s − s_exact| ≤ 5·2⁻⁵²·σ₁²/s: where the exact float32 decomposition has an error of 2⁻²⁴·σ₁ whatever s."""
    for tail in (1e-2, 1e-3, 1e-4, 1e-5):
        matrix = planted((60, 60), tail)
        exact_s = torch.linalg.svdvals(matrix.double())
        assert float((spectra.decompose(matrix).s - exact_s).abs().max()) <= 5 * 2**-52 / tail


def test_a_zero_matrix_has_orthonormal_factors_too():
    u, s, vh = spectra.decompose(torch.zeros(6, 4))
    assert not s.any()
    torch.testing.assert_close(u.mT @ u, torch.eye(4).double())
    torch.testing.assert_close(vh @ vh.mT, torch.eye(4).double())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_not_finite_is_refused(way, value, dtype):
    matrix = torch.ones(4, 3, dtype=dtype)
    matrix[1, 2] = value
    for find in (spectra.decompose, lambda m: spectra.measure(m, None)):
        with pytest.raises(FactorizationError, match="a 4×3 matrix has entries that are not finite"):
            find(matrix)


def test_an_eigensolver_that_fails_leaves_it_to_the_exact_decomposition(way, monkeypatch):
    """No matrix is known on which LAPACK's fails, so the failure is put in by hand."""

    def fails(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    matrix = planted((12, 9), 1e-3)
    rule = Energy(0.9)
    expected, measured = spectra.decompose(matrix), spectra.measure(matrix, rule)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    u, s, vh = spectra.decompose(matrix)
    torch.testing.assert_close(u * s @ vh, matrix.double())
    torch.testing.assert_close(s, expected.s)
    assert spectra.measure(matrix, rule).rank == measured.rank


def test_the_same_matrix_gives_the_same_bits(way):
    matrix = planted((70, 50), 1e-4)
    for find in (lambda m: [spectra.measure(m, None).polar], spectra.decompose):
        assert all(torch.equal(a, b) for a, b in zip(find(matrix), find(matrix.clone()), strict=True))
