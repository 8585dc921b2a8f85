"""SARA: the rank of each layer, what is trained, and how many parameters that is."""

import pytest
import torch
from adapter_runs import finetune, pretrained, trainable
from small_runs import batch, stack, with_spectrum

from hpclr import SARA


@pytest.mark.parametrize(
    ("proportion", "expected"),
    [(1e-9, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.89, 4), (0.91, 5), (1, 5)],
)
def test_the_rank_is_the_least_whose_sum_reaches_the_share(proportion, expected):
    """By hand: 4 + 3 + 1 + 1 + 1 = 10."""
    model = stack(with_spectrum([4, 3, 1, 1, 1], 7, 5))
    assert SARA(model, proportion=proportion, keep_last=False).ranks == {"0": expected}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ranks_of_many_layers_against_a_plain_count(seed):
    matrices = [torch.randn(n, m, generator=torch.Generator().manual_seed(seed)) for m, n in ((9, 14), (14, 6), (6, 6))]
    matrices[1][:, 3:] *= 0.01
    expected = {}
    for name, matrix in enumerate(matrices):
        values, total, k = torch.linalg.svdvals(matrix.double()).tolist(), 0.0, 0
        while total < 0.6 * sum(values):
            total, k = total + values[k], k + 1
        expected[str(name)] = k
    method = SARA(stack(*matrices), proportion=0.6, keep_last=False)
    assert method.ranks == expected
    assert len(set(expected.values())) > 1


def test_a_weight_of_zeros_has_rank_one_and_trains():
    model = stack(torch.zeros(6, 10), torch.eye(6), torch.randn(8, 6))
    method = SARA(model, proportion=0.5)
    assert method.ranks == {"0": 1, "1": 3}
    optimizer = torch.optim.SGD(trainable(model), 0.1)
    finetune(model, optimizer, method, 3)
    assert model[0].sara_b.abs().max() > 0


def test_parameters():
    model = pretrained()
    method = SARA(model, proportion=0.3)
    k = method.ranks
    adapters = k["0"] * (10 + 16 + 1) + k["2"] * (16 + 12 + 1) + k["4"] * (12 + 16 + 1)
    assert sum(p.numel() for p in trainable(model)) == adapters + 8 * 16 + 8  # and the head
    assert {model[int(name)].sara_lambda.min().item() for name in k} == {1.0}


def test_the_first_step_of_sgd_is_that_of_the_chain_rule():
    """∂B = diag(Λ) Aᵀ G, and nothing for A and Λ while B = 0."""
    model = pretrained(torch.float64)
    x, y = batch(0, 10, 8, torch.float64)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    gradient = model[2].weight.grad.clone()
    method = SARA(model, proportion=0.3)
    a = model[2].sara_a.detach().clone()
    finetune(model, torch.optim.SGD(trainable(model), 0.5), method, 1)
    assert torch.allclose(model[2].sara_b, -0.5 * a.mT @ gradient, atol=1e-15)
    assert torch.equal(model[2].sara_a, a)


@pytest.mark.parametrize("proportion", [0, 1.1, -1, float("nan"), "half", True])
def test_proportions_that_are_none(proportion):
    with pytest.raises((ValueError, TypeError), match="SumProportion: share must be a number above 0 and at most 1"):
        SARA(pretrained(), proportion=proportion)
