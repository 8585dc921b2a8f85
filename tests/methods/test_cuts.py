"""Which directions a check cuts away: the rule, its limits, and weights that no rule was made for."""

from math import inf, nan

import pytest
import torch
from small_runs import batch, idle, matrices, matrix, mlp, orthonormal, sites, stack, train_step, with_spectrum

from hpclr import OIALR
from hpclr.lowrank import Energy


def ranks_over_checks(model, checks, **settings):
    """The ranks after conversion and after each of the next checks; the weights do not move otherwise."""
    optimizer = idle(model)
    settings = {"layer_fraction": 1, "keep_last": False, "delay": 1, "every": 1} | settings
    oialr = OIALR(model, optimizer, **settings)
    ranks = []
    for _ in range(1 + checks):
        optimizer.step()
        oialr.step()
        ranks.append(oialr.ranks)
    return oialr, ranks


@pytest.mark.parametrize(
    ("spectrum", "cutoff", "expected"),
    [
        ([8, 7, 6, 5, 4.01, 3, 2, 1], 0.5, [8, 5, 5]),
        ([8, 7, 6, 5, 3.99, 3, 2, 1], 0.5, [8, 4, 4]),
        ([8, 7, 1, 1, 1, 1, 1, 1], 0.5, [8, 4, 2, 2]),  # no more than half at once
        ([8, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3], 0.5, [8, 4, 2, 1, 1]),
        ([1, 1, 1, 1, 1, 1, 1, 1], 0.99, [8, 8, 8]),
        ([8, 7, 6, 5, 4, 3, 2, 1], 0.01, [8, 8]),
    ],
)
@pytest.mark.parametrize(("m", "n"), [(8, 8), (8, 13), (13, 8)])
def test_directions_below_the_cutoff_go(spectrum, cutoff, expected, m, n):
    model = stack(with_spectrum(spectrum, m, n))
    before = matrix(sites(model)["0"])
    _, ranks = ranks_over_checks(model, len(expected) - 1, cutoff=cutoff)
    assert [r["0"] for r in ranks] == expected
    left_out = [s * s for s in sorted(spectrum, reverse=True)[expected[-1] :]]
    error = torch.linalg.vector_norm(matrix(sites(model)["0"]) - before)
    assert float(error) == pytest.approx(sum(left_out) ** 0.5, abs=1e-9), "what is cut away is the smallest"


@pytest.mark.parametrize(
    ("size", "max_cut", "least"),
    [(10, 0.7, 3), (10, 0.9, 1), (10, 0.1, 9), (9, 0.5, 5), (10, 0.0, 10), (10, 1.0, 1)],
)
def test_one_cut_is_limited_in_exact_arithmetic(size, max_cut, least):
    """(1 − 0.7)·10 is 3, not the 3.0000000000000004 of floats, whose ceiling is 4."""
    model = stack(with_spectrum([1.0] + [1e-3] * (size - 1), size, size))
    _, ranks = ranks_over_checks(model, 1, cutoff=0.5, max_cut=max_cut, min_rank=0.0)
    assert ranks[-1] == {"0": least}


@pytest.mark.parametrize(
    ("size", "min_rank", "floor"), [(25, 0.28, 7), (25, 0.0, 1), (25, 0.29, 8), (10, 1.0, 10), (30, 0.01, 1)]
)
def test_no_rank_falls_below_the_floor_in_exact_arithmetic(size, min_rank, floor):
    """0.28·25 is 7, not the 7.000000000000001 of floats, whose ceiling is 8."""
    model = stack(with_spectrum([1.0] + [1e-3] * (size - 1), size, size))
    _, ranks = ranks_over_checks(model, 8, cutoff=0.5, min_rank=min_rank)
    assert ranks[-1] == {"0": floor}


def test_the_floor_counts_from_the_whole_matrix_not_from_the_rank_left():
    model = stack(with_spectrum([1.0] + [1e-3] * 19, 20, 40))
    _, ranks = ranks_over_checks(model, 8, cutoff=0.5, min_rank=0.2)
    assert [r["0"] for r in ranks] == [20, 10, 5, 4, 4, 4, 4, 4, 4]


def test_a_rank_rule_can_take_the_place_of_the_cutoff():
    model = stack(with_spectrum([3.0, 4.0, 0.1, 0.1, 0.1, 0.1], 6, 6))
    _, ranks = ranks_over_checks(model, 2, cutoff=Energy(0.9))
    assert ranks[-1] == {"0": 2}
    model = stack(with_spectrum([3.0, 4.0, 0.1, 0.1, 0.1, 0.1], 6, 6))
    _, ranks = ranks_over_checks(model, 2, cutoff={"rule": "energy", "share": 0.6})
    assert ranks[-1] == {"0": 2}, "max_cut lets 6 → 3 → 2 happen in two checks"


def test_ranks_never_grow():
    model = mlp([12, 24, 16, 8])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-2)
    oialr = OIALR(model, optimizer, delay=2, every=1, cutoff=0.3, layer_fraction=1, keep_last=False)
    last = None
    for step in range(20):
        train_step(model, optimizer, *batch(step, 12, 8))
        oialr.step()
        if all(oialr.frozen.values()):
            assert all(last is None or rank <= last[name] for name, rank in oialr.ranks.items())
            last = oialr.ranks
    assert last is not None
    assert last["2"] < 16


def test_a_cut_leaves_orthonormal_factors_and_a_diagonal_sigma():
    model = mlp([12, 24, 16, 8])
    ranks_over_checks(model, 3, cutoff=0.5)
    for site in sites(model).values():
        u, sigma, vh = (factor.detach() for factor in site.factors)
        k = site.rank
        assert torch.allclose(u.mT @ u, torch.eye(k), atol=1e-6)
        assert torch.allclose(vh @ vh.mT, torch.eye(k), atol=1e-6)
        assert torch.equal(sigma, sigma.diagonal().diag())
        assert bool((sigma.diagonal().diff() <= 0).all())


# --- weights that no rule was made for -------------------------------------------------------------------------------


def test_a_zero_matrix_falls_to_the_floor_and_trains_on():
    model = stack(torch.zeros(8, 6), torch.eye(6, 8))
    oialr, ranks = ranks_over_checks(model, 4, cutoff=0.1)
    assert [r["0"] for r in ranks] == [6, 3, 2, 1, 1]
    assert oialr.failures == 0
    assert torch.equal(matrices(model)["0"], torch.zeros(8, 6, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_step(model, optimizer, *batch(0, 6, 6))
    assert bool(matrices(model)["0"].isfinite().all())


def test_repeated_singular_values_are_kept_together():
    model = stack(orthonormal(8, 8, 0))
    before = matrix(sites(model)["0"])
    _, ranks = ranks_over_checks(model, 3, cutoff=0.9)
    assert ranks[-1] == {"0": 8}
    assert torch.allclose(matrix(sites(model)["0"]), before, atol=1e-12)


def test_a_weight_of_rank_one_ends_at_rank_one_unchanged():
    model = stack(with_spectrum([2.0], 9, 7))
    before = matrix(sites(model)["0"])
    _, ranks = ranks_over_checks(model, 4, cutoff=0.1)
    assert [r["0"] for r in ranks] == [7, 4, 2, 1, 1]
    assert torch.allclose(matrix(sites(model)["0"]), before, atol=1e-12)


@pytest.mark.parametrize("poison", [nan, inf])
def test_a_layer_that_cannot_be_decomposed_keeps_its_basis_and_the_others_go_on(poison):
    model = stack(*(with_spectrum([1.0] + [1e-3] * 7, 8, 8, seed) for seed in range(3)))
    optimizer = idle(model)
    oialr = OIALR(model, optimizer, delay=2, every=2, layer_fraction=1, keep_last=False, cutoff=0.5)

    def two_steps():
        for _ in range(2):
            optimizer.step()
            oialr.step()

    with torch.no_grad():
        model[1].weight[3, 3] = poison
    two_steps()
    assert oialr.frozen == {"0": True, "1": False, "2": True}
    assert oialr.failures == 1
    with torch.no_grad():
        model[1].weight.copy_(with_spectrum([1.0] + [1e-3] * 7, 8, 8, 1))
    two_steps()
    assert oialr.frozen["1"], "converted as soon as it can be"
    assert oialr.ranks == {"0": 4, "1": 8, "2": 4}
    basis = [factor.clone() for factor in (model[2].u, model[2].vh)]
    with torch.no_grad():
        model[2].sigma[0, 0] = poison
    two_steps()
    assert oialr.ranks == {"0": 2, "1": 4, "2": 4}
    assert oialr.failures == 2
    assert torch.equal(basis[0], model[2].u)
    assert torch.equal(basis[1], model[2].vh)


# --- when it pays ----------------------------------------------------------------------------------------------------


def stored(model):
    return sum(p.numel() for p in model.parameters())


def test_a_layer_stays_dense_until_its_rank_pays():
    """For a square weight factors of rank k are no larger than it while k(m + n) + k² ≤ mn: k ≤ 0.414·n."""
    model = stack(torch.eye(20, dtype=torch.float64))
    optimizer = idle(model)
    settings = {"layer_fraction": 1, "keep_last": False, "cutoff": 0.3, "convert": "when_it_pays"}
    oialr = OIALR(model, optimizer, delay=1, every=1, **settings)
    seen = []
    for power in (0.0, 0.5, 0.6, 1.0):  # (1 + i)^−p ≥ 0.3 holds for 20, 11, 7 and 3 of the 20
        with torch.no_grad():
            spectrum = [(1.0 + i) ** -power for i in range(20)]
            if not oialr.frozen["0"]:
                model[0].weight.copy_(with_spectrum(spectrum, 20, 20))
        optimizer.step()
        oialr.step()
        seen.append((oialr.ranks["0"], oialr.frozen["0"]))
    assert seen == [(20, False), (11, False), (7, True), (7, True)]


def test_the_cut_at_conversion_is_not_limited_by_max_cut():
    model = stack(with_spectrum([1.0] + [1e-3] * 19, 20, 20))
    _, ranks = ranks_over_checks(model, 2, cutoff=0.5, convert="when_it_pays", max_cut=0.1)
    assert ranks == [{"0": 1}] * 3, "listed at once, converted at check 1"
    assert sites(model)["0"].is_lowrank


def test_only_layers_that_a_check_covers_are_converted():
    model = stack(*(with_spectrum([1.0] + [1e-3] * 7, 8, 8, seed) for seed in range(4)))
    optimizer = idle(model)
    oialr = OIALR(
        model, optimizer, delay=1, every=1, layer_fraction=0.5, keep_last=False, cutoff=0.5, convert="when_it_pays"
    )
    frozen = []
    for _ in range(3):
        optimizer.step()
        oialr.step()
        frozen.append([name for name, yes in oialr.frozen.items() if yes])
    assert frozen == [[], ["2", "3"], ["0", "1", "2", "3"]]


@pytest.mark.parametrize("freeze", ["schedule", "stable"])
def test_the_model_is_never_larger_than_dense_where_conversion_must_pay(freeze):
    model = mlp([20, 40, 30, 20, 10])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    settings = {"cutoff": 0.45, "layer_fraction": 0.5, "keep_last": False, "freeze": freeze, "stability_threshold": 0.9}
    oialr = OIALR(model, optimizer, delay=12, every=4, convert="when_it_pays", **settings)
    dense, sizes = stored(model), []
    for step in range(60):
        train_step(model, optimizer, *batch(step, 20, 10))
        oialr.step()
        sizes.append(stored(model))
    assert max(sizes) <= dense
    assert min(sizes) < dense
    assert set(oialr.ranks) == {"0", "2", "4", "6"}
