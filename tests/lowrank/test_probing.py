"""Gradients with regard to whole weights while their factors train, against those of the dense model."""

import copy

import pytest
import torch
from torch import nn

from hpclr.lowrank import densify, factorize, select
from hpclr.lowrank.probing import dense_gradients, outside


class Attending(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Across(Attending):
    """Attends to itself, then with the same weights to something else, for which they are taken in three parts."""

    def forward(self, x):
        own = self.attention(x, x, x)[0]
        return self.attention(own, 2 * x + 1, x.flip(1))[0]


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 7)), (5, 12)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2)),
        (2, 4, 9, 9),
    ),
    "one dimension": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 11)),
    "attention": (Attending, (3, 5, 8)),
    "attention to something else": (Across, (3, 5, 8)),
    "separate attention": (lambda: Attending(kdim=8, vdim=8), (3, 5, 8)),
}


@pytest.fixture(params=MODELS)
def pair(request):
    """A model with factors of half rank, the same dense, and a batch; in double precision."""
    make, shape = MODELS[request.param]
    torch.manual_seed(0)
    model = make().double()
    factorize(model, rank=0.5)
    return model, densify(copy.deepcopy(model)), torch.randn(shape, dtype=torch.float64)


def sites_of(model):
    return {site.name: site for site in select(model).eligible}


def backward(model, x):
    loss = model(x).square().sum()
    loss.backward()
    return float(loss.detach())


def test_gradients_are_those_of_the_dense_model(pair):
    model, dense, x = pair
    with dense_gradients(sites_of(model)) as found:
        losses = [backward(model, x) for _ in range(2)]  # two passes add up
    plain = backward(model, x)
    backward(dense, x)
    sites = sites_of(dense)
    assert found.keys() == sites.keys()
    for name, site in sites.items():
        torch.testing.assert_close(found[name], 2 * site.to_matrix(site.parameter.grad))
    assert losses[0] == pytest.approx(plain)


def test_what_is_inside_is_what_sigma_gets(pair):
    model, _, x = pair
    with dense_gradients(sites_of(model)) as found:
        backward(model, x)
    for name, site in sites_of(model).items():
        u, sigma, vh = site.factors
        rest = outside(found[name], site.factors)
        torch.testing.assert_close(u.mT @ found[name] @ vh.mT, sigma.grad)
        assert float((u.mT @ rest @ vh.mT).norm()) < 1e-10 * float(found[name].norm())
        assert float(rest.norm()) > 0.01 * float(found[name].norm())


def test_a_copy_made_meanwhile_computes_and_adds_nothing(pair):
    model, _, x = pair
    with dense_gradients(sites_of(model)) as found:
        other = copy.deepcopy(model)
        backward(other, x)
    assert not found
    assert all("arithmetic" not in site.module.__dict__ for site in sites_of(model).values())


def test_blocks_may_be_nested_and_go_on_with_what_is_there(pair):
    model, _, x = pair
    with dense_gradients(sites_of(model)) as whole:
        with dense_gradients(sites_of(model)) as part:
            backward(model, x)
        backward(model, x)
    assert whole.keys() == part.keys() == sites_of(model).keys()
    with dense_gradients(sites_of(model), part):
        backward(model, x)
    for name, gradient in whole.items():
        torch.testing.assert_close(part[name], 2 * gradient)


def test_nothing_is_left_behind_by_an_error(pair):
    model, _, _ = pair
    with pytest.raises(RuntimeError), dense_gradients(sites_of(model)):
        raise RuntimeError
    assert all("arithmetic" not in site.module.__dict__ for site in sites_of(model).values())
