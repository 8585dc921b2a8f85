"""Tensors with planted directions: what the unfoldings show, ranks, MLSVD and HOOI, against what is predicted."""

import pytest
import torch
from lowrank_helpers import distance
from torch import Tensor

from hpclr.lowrank.factors import FactorizationError
from hpclr.lowrank.multilinear import (
    Tucker,
    centred_spectrum,
    hooi,
    mlsvd,
    multilinear_rank,
    semicircle_edge,
    signal_to_noise,
    spike,
    unfold,
)
from hpclr.lowrank.noise import outlier

SHAPE = (60, 80, 100)
MODES = range(3)
NOISE = 240**-0.5  # as in the paper: the root of the sum of the dimensions


def planted(ratio: float, rank: int = 1, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> tuple[Tucker, Tensor]:
    """A signal whose `rank` directions have this ratio in every mode, and the same with noise, in float32."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        mode: torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q
        for mode, size in enumerate(shape)
    }
    core = torch.zeros((rank,) * len(shape), dtype=torch.float64)
    count = torch.Size(shape).numel()
    core[(torch.arange(rank),) * len(shape)] = NOISE * (ratio * count**0.5) ** 0.5
    signal = Tucker(core, factors)
    return signal, signal.dense().float() + NOISE * torch.randn(shape, generator=generator)


def alignments(signal: Tucker, found: Tucker) -> Tensor:
    """How much of the true subspace of each mode has been found, between 0 and 1."""
    shares = [
        (signal.factors[mode].mT @ found.factors[mode].double()).square().sum() / found.ranks[mode] for mode in MODES
    ]
    return torch.stack(shares)


def mean_of_runs(ratio: float, rank: int = 4, runs: int = 3) -> tuple[Tensor, Tensor]:
    """Centred eigenvalue and alignment of planted directions, by mode."""
    tops, leans = [], []
    for seed in range(runs):
        signal, noisy = planted(ratio, rank, seed=seed)
        tops.append(torch.stack([centred_spectrum(noisy, mode, NOISE)[:rank].mean() for mode in MODES]))
        leans.append(alignments(signal, mlsvd(noisy, dict.fromkeys(MODES, rank))))
    return torch.stack(tops).mean(0), torch.stack(leans).mean(0)


@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 3), (2, 3, 2, 4)], ids=str)
def test_unfolding(shape):
    tensor = torch.randn(shape)
    for mode, size in enumerate(shape):
        matrix = unfold(tensor, mode)
        assert matrix.shape == (size, tensor.numel() // size)
        assert torch.equal(matrix[1], tensor.select(mode, 1).flatten())


def test_noise_fills_the_semicircle():
    """Its edges, and the mass within ±1, which is 1/3 + √3/(2π)."""
    _, noise = planted(0.0)
    for mode in MODES:
        values = centred_spectrum(noise, mode, NOISE)
        assert len(values) == SHAPE[mode]
        assert float(values[0]) == pytest.approx(semicircle_edge(SHAPE, mode), abs=0.15)
        assert float(values[-1]) == pytest.approx(semicircle_edge(SHAPE, mode) - 4, abs=0.15)
        assert float((values.abs() < 1).double().mean()) == pytest.approx(0.609, abs=0.05)


@pytest.mark.parametrize(("ratio", "eigenvalue", "alignment"), [(2.5, 2.90, 0.840), (4.0, 4.25, 0.938)])
def test_planted_directions_show_as_predicted(ratio, eigenvalue, alignment):
    """The paper's limit is near; the exact law of the unfolding is nearer."""
    long = (3, 10**9)
    assert spike(ratio, long, 0) == pytest.approx((eigenvalue, alignment), abs=6e-4)
    tops, leans = mean_of_runs(ratio)
    assert tops.tolist() == pytest.approx([eigenvalue] * 3, abs=0.25)
    assert leans.tolist() == pytest.approx([alignment] * 3, abs=0.06)
    expected = [spike(ratio, SHAPE, mode) for mode in MODES]
    assert tops.tolist() == pytest.approx([found.eigenvalue for found in expected], abs=0.1)
    assert leans.tolist() == pytest.approx([found.alignment for found in expected], abs=0.03)


@pytest.mark.parametrize("mode", MODES)
def test_prediction_is_that_of_the_unfolding_as_a_matrix(mode):
    size, rest = SHAPE[mode], torch.Size(SHAPE).numel() // SHAPE[mode]
    for strength in (20.0, 30.0, 50.0):
        as_matrix = outlier(strength, (size, rest))
        found = spike(signal_to_noise(strength, SHAPE, 1.0), SHAPE, mode)
        assert found.alignment == pytest.approx(as_matrix.left)
        assert found.eigenvalue == pytest.approx((as_matrix.value**2 - rest) / (size * rest) ** 0.5)


def test_below_a_ratio_of_one_nothing_is_seen():
    signal, noisy = planted(0.5)
    assert multilinear_rank(noisy) == dict.fromkeys(MODES, 0)
    assert spike(1.0, SHAPE, 0) == (semicircle_edge(SHAPE, 0), 0.0)
    assert alignments(signal, mlsvd(noisy, dict.fromkeys(MODES, 1))).max() < 0.2


@pytest.mark.parametrize("ratio", [4.0, 40.0])
def test_the_multilinear_rank_is_found(ratio):
    _, noisy = planted(ratio, rank=4)
    assert multilinear_rank(noisy) == dict.fromkeys(MODES, 4)
    assert multilinear_rank(noisy.double(), modes=[2]) == {2: 4}


def test_rank_one_overlap_is_the_product_of_the_alignments():
    signal, noisy = planted(4.0)
    found = mlsvd(noisy, dict.fromkeys(MODES, 1))
    projected = Tucker(torch.ones(1, 1, 1), found.factors).dense()
    overlap = float((projected * signal.dense()).sum() / signal.core) ** 2
    expected = torch.tensor([spike(4.0, SHAPE, mode).alignment for mode in MODES]).prod()
    assert overlap == pytest.approx(float(expected), abs=0.08)


def test_one_sweep_of_hooi_brings_almost_all():
    before, after, later = [], [], []
    for seed in range(3):
        signal, noisy = planted(2.0, rank=3, seed=seed)
        start = mlsvd(noisy, dict.fromkeys(MODES, 3))
        first = hooi(noisy, start)
        before.append(alignments(signal, start))
        after.append(alignments(signal, first))
        later.append(alignments(signal, hooi(noisy, first, sweeps=3)))
    mlsvd_s, swept, settled = (torch.stack(runs).mean(0) for runs in (before, after, later))
    assert mlsvd_s.tolist() == pytest.approx([spike(2.0, SHAPE, mode).alignment for mode in MODES], abs=0.1)
    assert swept.min() > 0.85
    assert (swept - mlsvd_s).min() > 0.15
    assert (settled - swept).max() < 0.06


def test_a_sweep_never_raises_the_error():
    torch.manual_seed(0)
    tensor = torch.randn(8, 9, 4, 3, dtype=torch.float64)
    found = mlsvd(tensor, {0: 3, 1: 4})
    errors = [distance(found.dense(), tensor)]
    for _ in range(4):
        found = hooi(tensor, found)
        errors.append(distance(found.dense(), tensor))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < errors[0]
    assert distance(found.factors[1].mT @ found.factors[1], torch.eye(4)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_full_ranks_lose_nothing(dtype):
    tensor = torch.randn(6, 5, 2, 2).to(dtype)
    found = hooi(tensor, mlsvd(tensor, {0: 6, 1: 5}))
    assert found.ranks == {0: 6, 1: 5}
    assert distance(found.dense(), tensor) < (1e-12 if dtype == torch.float64 else 1e-5)


def test_a_planted_rank_is_cut_to_without_loss():
    signal, _ = planted(2.0, rank=3)
    found = mlsvd(signal.dense(), {0: 3, 2: 3})
    assert found.core.shape == (3, 80, 3)
    assert distance(found.dense(), signal.dense()) < 1e-7


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({0: 0}, "mode 0 .* ranks from 1 to 6; found 0"),
        ({1: 7}, "mode 1 .* ranks from 1 to 6; found 7"),
        ({2: 1}, "no mode 2"),
        ({-1: 1}, "no mode -1"),
    ],
    ids=str,
)
def test_ranks_that_are_not_there_are_refused(ranks, message):
    with pytest.raises(ValueError, match=message):
        mlsvd(torch.randn(6, 30), ranks)


def test_what_is_not_finite_is_refused():
    with pytest.raises(FactorizationError, match="not finite"):
        multilinear_rank(torch.full((3, 4, 5), torch.nan))
