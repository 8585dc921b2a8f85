"""Models cut to lower ranks: the order of directions, by size and by output, what is left, running statistics."""

import copy

import pytest
import torch
from torch import nn

from hpclr import densify, factorize
from hpclr.lowrank.activations import input_moments
from hpclr.lowrank.elastic import cut, elastic_sites, order_directions, renew_statistics
from hpclr.lowrank.sites import select
from hpclr.lowrank.svd_layers import CHANNEL, SPATIAL


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, groups=2),
        nn.Flatten(),
        nn.Linear(64, 24),
        nn.ReLU(),
        nn.Linear(24, 30),
        nn.Linear(30, 10),
    ).to(dtype)


def inputs(count=40):
    """Pictures whose pixels are neither alike in size nor independent."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, 4, 4, generator=g, dtype=torch.float64)
    return x * torch.tensor([4.0, 1.0, 0.3, 0.1], dtype=torch.float64).reshape(1, 4, 1, 1) + x.mean(1, keepdim=True)


def frozen(model):
    factorize(model, 0.8, exclude=["8"])


def trained(model):
    for site in select(model, kinds=CHANNEL, exclude=["8"]).eligible:
        site.factorize(max(1, site.rank // 2))


def spatial(model):
    for site in select(model, kinds=SPATIAL, exclude=["8"]).eligible:
        site.factorize()


def reordered(model):
    """Directions in no order, scaled at random between the factors."""
    trained(model)
    for site in elastic_sites(model):
        u, s, vh = (factor.detach() for factor in site.factors)
        order = torch.randperm(len(s), generator=torch.Generator().manual_seed(2))
        scale = torch.rand(len(s), generator=torch.Generator().manual_seed(3), dtype=s.dtype) + 0.5
        site.convert(u[:, order] * scale, s[order], vh[order] / scale[:, None])


@pytest.mark.parametrize("form", [None, frozen, trained, spatial, reordered])
@pytest.mark.parametrize("by_output", [False, True])
def test_the_order_keeps_the_function_and_cuts_are_the_best_of_their_rank(form, by_output):
    model = network().eval()
    if form is not None:
        form(model)
    x, sites = inputs(), elastic_sites(model)
    assert [site.name for site in sites] == ["0", "3", "5", "7"]
    before, ranks, weights = (
        model(x),
        {s.name: s.rank for s in sites},
        {s.name: s.module.weight.detach() for s in sites},
    )
    moments = input_moments(model, sites, [x]) if by_output else None
    without = order_directions(sites, moments)
    assert without == (["0", "3"] if by_output and form is spatial else [])
    assert {site.name: site.rank for site in sites} == ranks
    assert torch.allclose(model(x), before, atol=1e-9)
    for site in sites:
        weight = site.to_matrix(weights[site.name])
        root = torch.eye(weight.shape[1]).double()
        if moments is not None and site.name in moments:
            values, q = torch.linalg.eigh(moments[site.name])
            root = q * values.clamp_min(0).sqrt()
        best = torch.linalg.svdvals(weight @ root).square()
        u, core, vh = (factor.detach() for factor in site.factors)
        core = core if core.ndim == 2 else core.diag()
        for k in range(1, site.rank):
            error = (weight - u[:, :k] @ core[:k, :k] @ vh[:k]) @ root
            assert float(error.square().sum()) == pytest.approx(float(best[k:].sum()), rel=1e-5, abs=1e-12), k


def test_by_output_beats_by_size_where_inputs_are_not_alike():
    x, errors = inputs(200), []
    for by_output in (False, True):
        model = network().eval()
        before, sites = model(x), elastic_sites(model)
        order_directions(sites, input_moments(model, sites, [x]) if by_output else None)
        cut(model, 0.25)
        errors.append((model(x) - before).square().mean().item())
    assert errors[1] < 0.7 * errors[0]


def test_inputs_that_no_sample_shows_leave_the_whole_weight_exact():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 20), nn.Linear(20, 6)).double()
    sites = elastic_sites(model)
    weight, seen = model[0].weight.detach().clone(), torch.randn(3, 8).double()  # 3 of 8 directions
    order_directions(sites, input_moments(model, sites, [seen]))
    assert torch.allclose(model[0].weight, weight, atol=1e-9)


def test_what_is_left_of_a_cut():
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 30), nn.Linear(30, 10))
    order_directions(elastic_sites(model))
    for fraction, ranks, dense in (
        (1, {"0": 100, "1": 30}, {"0", "1", "2"}),  # factors as large as the weight: dense again
        (0.55, {"0": 55, "1": 17}, {"0", "2"}),  # exactly 55, not 56
        (0.07, {"0": 7, "1": 3}, {"2"}),
    ):
        twin = copy.deepcopy(model)
        assert cut(twin, fraction) == ranks
        assert {name for name, layer in twin.named_children() if type(layer) is nn.Linear} == dense
    assert cut(model, 0.1) == {"0": 10, "1": 3}
    assert cut(model, 0.5) == {"0": 10, "1": 3}  # what is gone does not come back
    assert sum(p.numel() for p in model[0].parameters()) == 100 * 10 + 10 + 10 * 100 + 100
    with pytest.raises(ValueError, match="above 0 and at most 1, found 2"):
        cut(model, 2)
    with pytest.raises(ValueError, match="no layer that could be cut"):
        elastic_sites(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)))


def test_running_statistics_are_taken_anew_and_nothing_else_changes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.BatchNorm2d(6)).double()
    model[1].momentum, batches = 0.3, [inputs(10), inputs(10) + 1]
    model[3].eval()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    renew_statistics(model, batches, torch.no_grad()(model))
    outputs = [model[0](x).detach() for x in batches]
    mean = torch.stack([out.mean((0, 2, 3)) for out in outputs]).mean(0)
    assert torch.allclose(model[1].running_mean, mean, atol=1e-12)
    assert (model[1].momentum, model[1].training, model[2].training, model[3].training) == (0.3, True, True, False)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    plain = nn.Linear(2, 2)
    renew_statistics(plain, [None], None)  # without batch norms no batch is looked at


def test_a_cut_model_is_made_dense_like_any_other():
    model = network().eval()
    order_directions(elastic_sites(model))
    cut(model, 0.25)
    outputs = model(inputs())
    assert torch.allclose(densify(model)(inputs()), outputs, atol=1e-9)
