"""Checks find what exact decompositions would find, and do no more than they must."""

from collections import Counter

import pytest
import torch
from small_runs import batch, idle, matrix, mlp, orthonormal, sites, stack, train_step, with_spectrum

from hpclr import OIALR
from hpclr.lowrank import spectra
from hpclr.lowrank.factors import svd
from hpclr.lowrank.spectra import measured_in
from hpclr.methods.placement import Here

SETTINGS = {"delay": 20, "every": 10, "layer_fraction": 0.5, "cutoff": 0.3, "keep_last": False, "min_rank": 0}


class Exact(Here):
    """Exact decompositions for everything: what is measured is measured on them."""

    def measure(self, matrix, rule, *, dense):
        return measured_in(svd(matrix), rule)

    def decompose(self, matrix, *, dense):
        return svd(matrix if dense else matrix.double())


class Counting(Here):
    """Says what a check has asked for: of dense weights (measured with a rule or without, decomposed) and of Σ."""

    def __init__(self):
        self.asked = Counter()

    def measure(self, matrix, rule, *, dense):
        self.asked["weight" if dense else "sigma", "polar and rank" if rule else "polar"] += 1
        return super().measure(matrix, rule, dense=dense)

    def decompose(self, matrix, *, dense):
        self.asked["weight" if dense else "sigma", "decomposed"] += 1
        return super().decompose(matrix, dense=dense)

    def since(self):
        asked, self.asked = dict(self.asked), Counter()
        return asked


def course(placement, **settings):
    """Ranks, stabilities and weights after every tenth step of a small training."""
    model = mlp([24, 40, 24, 12])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    oialr = OIALR(model, optimizer, placement=placement, **SETTINGS | settings)
    seen = []
    for step in range(1, 61):
        train_step(model, optimizer, *batch(step, 24, 12))
        oialr.step()
        if step % 10 == 0:
            weights = {name: matrix(site) for name, site in sites(model).items()}
            seen.append((oialr.ranks, oialr.frozen, oialr.stability, weights))
    return seen


@pytest.mark.parametrize("way", ["eigenvectors", "products"])
@pytest.mark.parametrize(
    "settings", [{}, {"convert": "when_it_pays"}, {"freeze": "stable", "stability_threshold": 0.9}]
)
def test_a_training_is_the_same_as_with_exact_decompositions(monkeypatch, way, settings):
    monkeypatch.setattr(spectra, "_PRODUCTS_ON", ("cpu",) if way == "products" else ())
    expected = course(Exact(), **settings)
    for (ranks, frozen, stability, weights), theirs in zip(course(None, **settings), expected, strict=True):
        assert (ranks, frozen) == theirs[:2]
        assert stability == pytest.approx(theirs[2], abs=2e-5)
        for name, weight in weights.items():
            assert float((weight - theirs[3][name]).norm() / weight.norm()) < 1e-4
    assert min(expected[-1][0].values()) < 12, "else nothing was cut"


def test_each_check_does_the_least_that_it_can():
    """Three layers; the second check after the delay covers the last two, as ⌈1·0.5·3⌉ = 2."""
    model = mlp([24, 40, 24, 12])
    placement = Counting()
    optimizer = idle(model)
    oialr = OIALR(model, optimizer, placement=placement, **SETTINGS)
    assert placement.since() == {("weight", "polar"): 3}
    seen = {}
    for step in range(1, 41):
        optimizer.step()
        oialr.step()
        if placement.asked:
            seen[step] = placement.since()
    assert seen == {
        10: {("weight", "polar and rank"): 3},
        20: {("weight", "decomposed"): 3},
        30: {("sigma", "polar"): 1, ("sigma", "decomposed"): 2},
        40: {("sigma", "decomposed"): 3},
    }


def test_a_weight_is_decomposed_only_where_that_pays():
    placement = Counting()
    model = stack(with_spectrum([1.0] + [1e-2] * 7, 8, 8).float(), torch.eye(8))
    optimizer = idle(model)
    oialr = OIALR(model, optimizer, placement=placement, **SETTINGS | {"convert": "when_it_pays", "layer_fraction": 1})
    for _ in range(30):
        optimizer.step()
        oialr.step()
    assert oialr.frozen == {"0": True, "1": False}
    assert placement.asked["weight", "decomposed"] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_without_a_delay_nothing_is_measured_for_a_comparison_that_never_comes(value):
    placement = Counting()
    OIALR(model := mlp([6, 6, 6]), idle(model), placement=placement, **SETTINGS | {"delay": 0})
    assert placement.since() == {("weight", "decomposed"): 2}
    model = mlp([6, 6, 6])
    model[2].weight.data[1, 2] = value
    with pytest.raises(ValueError, match=r"layer '2': .*6×6.*not finite"):
        OIALR(model, idle(model), **SETTINGS | {"delay": 0})


@pytest.mark.parametrize("way", ["eigenvectors", "products"])
@pytest.mark.parametrize(
    ("step", "convert"), [(10, "at_delay"), (20, "at_delay"), (20, "when_it_pays"), (30, "at_delay")]
)
def test_a_layer_that_is_not_finite_is_counted_and_keeps_what_is_remembered(monkeypatch, way, step, convert):
    """Before the delay, at it, and covered or not after it; products of NaN must not pass for a basis."""
    monkeypatch.setattr(spectra, "_PRODUCTS_ON", ("cpu",) if way == "products" else ())
    model = stack(*(orthonormal(6, 6, seed, torch.float32) for seed in range(3)))
    optimizer = idle(model)
    oialr = OIALR(model, optimizer, **SETTINGS | {"convert": convert})
    for _ in range(step - 1):
        optimizer.step()
        oialr.step()
    remembered = {name: polar.clone() for name, polar in oialr.state_dict()["stability"]["polar"].items()}
    with torch.no_grad():
        for name in ("0", "2"):
            sites(model)[name].parameter[0, 0] = float("nan")
    optimizer.step()
    oialr.step()
    assert oialr.failures == 2
    assert all(torch.equal(oialr.state_dict()["stability"]["polar"][name], remembered[name]) for name in ("0", "2"))
    assert oialr.stability["1"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("dtype", "kept"), [(torch.float32, torch.half), (torch.bfloat16, torch.half), (torch.float64,) * 2]
)
def test_what_is_remembered_takes_little_memory(dtype, kept):
    model = mlp([12, 8, 8], dtype)
    oialr = OIALR(model, idle(model), **SETTINGS)
    polar = oialr.state_dict()["stability"]["polar"]
    assert {(p.dtype, p.device.type) for p in polar.values()} == {(kept, "cpu")}
    assert all(p.is_contiguous() for p in polar.values()), "or a sum would be another one after a load"


@pytest.mark.parametrize(("way", "least"), [("eigenvectors", 1 - 1e-5), ("products", 1 - 5e-3)])
def test_weights_short_of_full_rank_are_measured_alike_in_float32(monkeypatch, way, least):
    """Rounding in W or Σ is no direction, whether it is decomposed or not; or has little weight, by products."""
    monkeypatch.setattr(spectra, "_PRODUCTS_ON", ("cpu",) if way == "products" else ())
    model = stack(with_spectrum([3.0, 2.0], 7, 5).float(), torch.zeros(6, 7))
    optimizer = idle(model)
    oialr = OIALR(model, optimizer, **SETTINGS | {"delay": 2, "every": 2, "min_rank": 1.0})
    seen = []
    for _ in range(12):
        optimizer.step()
        oialr.step()
        seen.append(oialr.stability)
    assert least < min(s["0"] for s in seen[1:]) <= 1 + 1e-6, "nothing moved"
    assert [s["1"] for s in seen[1:]] == [0.0] * 11, "nothing there to keep"


@pytest.mark.parametrize("shape", [(96, 96), (160, 40), (40, 160)])
def test_a_converted_weight_is_what_it_was_and_its_bases_are_orthonormal(shape):
    """To the rounding of float32, for weights whose smallest singular values are 10⁻⁷ and 0 of the largest."""
    n = min(shape)
    tail = [1e-7] * (n // 4) + [0.0] * (n // 4)
    weight = with_spectrum([*torch.linspace(1, 0.1, n - len(tail)).tolist(), *tail], *shape).float()
    model = stack(weight)
    OIALR(model, idle(model), **SETTINGS | {"delay": 0})
    u, sigma, vh = (factor.detach().double() for factor in sites(model)["0"].factors)
    eye = torch.eye(n, dtype=torch.float64)
    assert float(torch.linalg.matrix_norm(u @ sigma @ vh - weight.double(), 2)) < 3e-7
    assert float(torch.linalg.matrix_norm(u.mT @ u - eye, 2)) < 5e-7
    assert float(torch.linalg.matrix_norm(vh @ vh.mT - eye, 2)) < 5e-7
