"""Mo-SARA: ranks, frozen bases, experts and the router."""

import pytest
import torch
from adapter_runs import finetune, pretrained, trainable
from small_runs import stack, with_spectrum

from hpclr import SARA, MoSARA
from hpclr.lowrank.adapters import adapted_modules


def test_ranks_are_those_of_sara_and_bases_the_leading_singular_vectors():
    matrix = with_spectrum([4, 3, 1, 1, 1], 7, 5)
    model = stack(matrix)
    assert MoSARA(model, proportion=0.71, keep_last=False).ranks == {"0": 3}
    u, vh = model[0].mo_sara_u, model[0].mo_sara_vh
    assert torch.allclose(
        u[:, :2] @ torch.diag(torch.tensor([4.0, 3]).double()) @ vh[:2], leading(matrix, 2), atol=1e-12
    )
    assert not u.requires_grad
    assert not vh.requires_grad
    model, twin = pretrained(), pretrained()
    assert MoSARA(model, proportion=0.4).ranks == SARA(twin, proportion=0.4).ranks


def leading(weight, k):
    u, s, vh = torch.linalg.svd(weight)
    return u[:, :k] @ torch.diag(s[:k]) @ vh[:k]


@pytest.mark.parametrize("experts", [1, 5, 9])
def test_parameters(experts):
    model = pretrained()
    method = MoSARA(model, proportion=0.5, experts=experts)
    counted = sum(experts * k + k + experts for k in method.ranks.values()) + 16 + 12 + 16
    assert sum(p.numel() for p in trainable(model)) == counted + 8 * 16 + 8


def test_the_router_is_trained_once_the_experts_differ_from_nothing():
    model = pretrained(torch.float64)
    method = MoSARA(model, proportion=0.5)
    optimizer = torch.optim.SGD(trainable(model), 0.5)
    routers = [layer.mo_sara_router_in.detach().clone() for _, layer in adapted_modules(model)]
    finetune(model, optimizer, method, 1)
    for (_, layer), router in zip(adapted_modules(model), routers, strict=True):
        assert torch.equal(layer.mo_sara_router_in, router)
        assert len(layer.mo_sara_lambdas.unique(dim=0)) == 5
    finetune(model, optimizer, method, 1, first=1)
    for (_, layer), router in zip(adapted_modules(model), routers, strict=True):
        assert not torch.equal(layer.mo_sara_router_in, router)


def test_it_cannot_be_merged():
    method = MoSARA(pretrained(), proportion=0.5)
    with pytest.raises(ValueError, match="a MoSARALinear cannot be merged: its router"):
        method.merge()
    method.unmerge()


@pytest.mark.parametrize("experts", [0, -1, 2.0, True, "5"])
def test_experts_that_are_none(experts):
    with pytest.raises(ValueError, match="experts must be a whole number of 1 or more"):
        MoSARA(pretrained(), proportion=0.5, experts=experts)
