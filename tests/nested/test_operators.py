"""Operators whose spectrum is known: matrices, an integral, the harmonic oscillator in two dimensions."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import jvp
from torch.optim.lr_scheduler import CosineAnnealingLR

from hpclr.nested import Matrix, eigenfunctions, joint, operator_svd, sequential, unnested

L = 8
TOP = 4.5  # above the levels of the oscillator that are looked for


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def falling(parameters, lr, steps):
    """Adam with a rate that falls to zero."""
    optimizer = torch.optim.Adam(parameters, lr)
    return {"optimizer": optimizer, "scheduler": CosineAnnealingLR(optimizer, steps), "steps": steps}


def learnt(matrix, nesting, lr, steps, batch=None):
    """The pairs of a matrix, and how well each of them agrees with its singular vectors, from 0 to 1."""
    operator, (m, n) = Matrix(matrix), matrix.shape
    f, g = (nn.Embedding(size, L, dtype=torch.float64) for size in (m, n))
    how = falling([*f.parameters(), *g.parameters()], lr, steps)

    def sample():
        rows = operator.rows if batch is None else torch.randint(m, (batch,))
        return rows, operator.columns if batch is None else torch.randint(n, (batch,))

    found = operator_svd(operator, f, g, sample, nesting, **how, evaluations=1 if batch is None else 200)
    u, _, vh = torch.linalg.svd(matrix)
    left, right = found.left(operator.rows) / m**0.5, found.right(operator.columns) / n**0.5
    return found, (u[:, :L] * left).sum(0).abs(), (vh[:L].mT * right).sum(0).abs()


def test_sequential_nesting_finds_singular_values_and_vectors_in_their_order():
    matrix = torch.randn(30, 20, dtype=torch.float64)
    expected = torch.linalg.svdvals(matrix)[:L]
    found, left, right = learnt(matrix, sequential(L), lr=0.1, steps=1200)
    assert torch.allclose(found.values, expected, rtol=1e-3)
    assert torch.allclose(found.norms, expected, rtol=1e-3)
    assert left.min() > 0.999
    assert right.min() > 0.999


def test_without_nesting_the_space_is_right_and_the_order_is_not():
    matrix = torch.randn(30, 20, dtype=torch.float64)
    found, left, _ = learnt(matrix, unnested(L), lr=0.1, steps=800)
    u, s, _ = torch.linalg.svd(matrix)
    space = torch.linalg.qr(found.left(torch.arange(30))).Q
    assert torch.linalg.svdvals(u[:, :L].mT @ space).min() > 0.999
    assert left.mean() < 0.8
    assert (found.norms - s[:L]).abs().max() > 0.3


@pytest.mark.slow
def test_joint_nesting_finds_them_too_if_slower():
    matrix = torch.randn(30, 20, dtype=torch.float64)
    found, left, right = learnt(matrix, joint(torch.full((L,), 1 / L)), lr=0.1, steps=10000)
    assert torch.allclose(found.values, torch.linalg.svdvals(matrix)[:L], rtol=1e-3)
    assert min(left.min(), right.min()) > 0.999


def test_minibatches_of_rows_and_columns_are_enough():
    """Of a matrix with well separated singular values; the first three."""
    u, v = (torch.linalg.qr(torch.randn(size, 12, dtype=torch.float64)).Q for size in (30, 20))
    expected = 10 * 0.7 ** torch.arange(12, dtype=torch.float64)
    found, left, right = learnt(u * expected @ v.mT, sequential(L), lr=0.1, steps=1000, batch=16)
    assert torch.allclose(found.values[:3], expected[:3], rtol=0.06)
    assert left[:3].min() > 0.95
    assert right[:3].min() > 0.95


@pytest.mark.slow
def test_an_integral_operator_is_learnt_as_two_networks():
    """Integration over [0, y], as on [0, 1]: σ_l = 1/((l − ½)π), √2 sin and √2 cos."""

    def integral(g, x):
        y = torch.rand(256, 1)
        return (y.mT < x).to(x) @ g(y) / 256

    torch.manual_seed(1)
    f, g = (nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)) for _ in "fg")
    how = falling([*f.parameters(), *g.parameters()], 0.01, 800)
    found = operator_svd(
        integral, f, g, lambda: (torch.rand(256, 1), torch.rand(256, 1)), sequential(2), **how, evaluations=50
    )
    assert found.values.tolist() == pytest.approx([2 / math.pi, 2 / (3 * math.pi)], rel=0.08)
    x = torch.linspace(0.05, 0.95, 19)[:, None]
    expected = torch.cat([(math.pi / 2 * x).sin(), (3 * math.pi / 2 * x).sin()], 1) * 2**0.5
    overlaps = torch.cosine_similarity(found.left(x), expected, dim=0)
    assert overlaps.abs().min() > 0.98


def oscillator(f, x):
    """TOP − H, H = −½Δ + ½|x|² in two dimensions, of functions f such that f exp(−|x|²/4) is the wave function.

    That factor is the root of the density of normally distributed samples, but for a constant: means over such samples
    are the inner products of the wave functions.
    """
    laplacian, slope = 0.0, 0.0
    for axis in torch.eye(2):
        direction = axis.expand_as(x)
        first, second = jvp(lambda z, along=direction: jvp(f, (z,), (along,))[1], (x,), (direction,))
        laplacian, slope = laplacian + second, slope + (x @ axis)[:, None] * first
    values = f(x)
    energy = -laplacian / 2 + slope / 2 + (0.5 + 0.375 * x.square().sum(1, keepdim=True)) * values
    return TOP * values - energy


def levels(nesting, width, batch, steps, lr):
    count = len(nesting.vector)
    f = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, count))
    how = falling(f.parameters(), lr, steps)
    return eigenfunctions(oscillator, f, partial(torch.randn, batch, 2), nesting, **how, evaluations=50)


def test_the_lowest_levels_of_the_oscillator():
    found = levels(sequential(3), width=16, batch=128, steps=250, lr=0.03)
    assert (TOP - found.values).tolist() == pytest.approx([1, 2, 2], abs=0.15)
    x = torch.randn(500, 2)
    ground = found(x)[:, 0] * (2 * math.pi) ** -0.5 * (-x.square().sum(1) / 4).exp()
    assert (ground.abs() - math.pi**-0.5 * (-x.square().sum(1) / 2).exp()).abs().max() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("nesting", [joint(torch.full((6,), 1 / 6)), sequential(6)], ids=["joint", "sequential"])
def test_levels_of_the_oscillator_in_their_order(nesting):
    """E = n_x + n_y + 1, each n + 1 times."""
    found = levels(nesting, width=64, batch=512, steps=1000, lr=0.01)
    assert (TOP - found.values).tolist() == pytest.approx([1, 2, 2, 3, 3, 3], abs=0.03)
    assert (TOP - found.norms).tolist() == pytest.approx([1, 2, 2, 3, 3, 3], abs=0.1)


def test_the_same_seed_gives_the_same_bits():
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(levels(sequential(2), width=8, batch=16, steps=5, lr=0.01))
    assert torch.equal(runs[0].values, runs[1].values)
