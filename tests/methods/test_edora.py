"""EDoRA: parameters as published, the start, and training against the dense formula."""

import pytest
import torch
import torch.nn.functional as F
from adapter_runs import PUBLISHED, finetune, pretrained, roberta_shapes, trainable
from small_runs import batch
from torch import nn

from hpclr import EDoRA

PUBLISHED_COUNTS = {4: 37_632, 8: 39_936, 16: 49_152, 32: 86_016}  # of twelve layers: 48 (r² + 768)


@pytest.mark.parametrize(
    ("layers", "rank"), [(1, 4), (1, 16), *(pytest.param(12, r, marks=pytest.mark.slow) for r in PUBLISHED_COUNTS)]
)
def test_parameters_on_the_shapes_of_roberta_base(layers, rank):
    published = PUBLISHED_COUNTS[rank]
    model = roberta_shapes(layers)
    method = EDoRA(model, rank=rank, include=PUBLISHED)
    head = 2 * 768 + 2
    assert len(method.ranks) == 4 * layers
    assert sum(p.numel() for p in trainable(model)) - head == 4 * layers * (rank**2 + 768) == published * layers / 12
    assert method.trained == ("classifier.weight", "classifier.bias")


def test_bases_are_the_leading_singular_vectors():
    model = pretrained(torch.float64)
    u, s, vh = torch.linalg.svd(model[2].weight.detach())
    EDoRA(model, rank=4, alpha=6)
    expected = 6 / 4 * u[:, :4] @ torch.diag(s[:4]) @ vh[:4]
    assert torch.allclose(model[2].edora_u @ model[2].edora_a, expected, atol=1e-12)
    assert torch.equal(model[2].edora_magnitude, torch.linalg.vector_norm(model[2].weight, dim=1))
    assert not any(model[2].parameter(name).requires_grad for name in ("edora_u", "edora_a", "weight"))


def test_training_is_that_of_the_dense_formula_with_detached_norms():
    """Ten steps of SGD with momentum; the reference holds whole matrices W', and autograd does the rest."""
    model = pretrained(torch.float64)
    alpha, r = 6.0, 3
    weights = [layer.weight.detach().clone() for layer in model if isinstance(layer, nn.Linear)]
    biases = [layer.bias.detach().clone() for layer in model if isinstance(layer, nn.Linear)]
    method = EDoRA(model, rank=r, alpha=alpha)
    finetune(model, torch.optim.SGD(trainable(model), 0.3, momentum=0.9), method, 10)

    bases = [torch.linalg.svd(w, full_matrices=False) for w in weights[:3]]
    cores = [torch.zeros(r, r, dtype=torch.float64, requires_grad=True) for _ in bases]
    magnitudes = [w.norm(dim=1).requires_grad_() for w in weights[:3]]
    head = [weights[3].requires_grad_(), biases[3].requires_grad_()]

    def corrected(i):
        u, s, vh = bases[i]
        moved = weights[i] + alpha / r * u[:, :r] @ cores[i] @ torch.diag(s[:r]) @ vh[:r]
        return magnitudes[i][:, None] * moved / moved.norm(dim=1, keepdim=True).detach()

    optimizer = torch.optim.SGD([*cores, *magnitudes, *head], 0.3, momentum=0.9)
    for step in range(10):
        x, y = batch(step, 10, 8, torch.float64)
        for i in range(3):
            x = F.gelu(F.linear(x, corrected(i), biases[i]))
        optimizer.zero_grad()
        F.cross_entropy(F.linear(x, *head), y).backward()
        optimizer.step()
    for i, layer in enumerate((model[0], model[2], model[4])):
        # singular vectors may differ in sign, and the core with them; the product does not
        assert torch.allclose(layer.corrected(), corrected(i).detach(), atol=1e-10)
        assert torch.allclose(layer.edora_magnitude, magnitudes[i], atol=1e-10)
        assert layer.edora_core.abs().max() > 1e-3
    assert torch.allclose(model[6].weight, head[0], atol=1e-10)


def test_the_published_start_is_random_and_follows_the_seed():
    cores = []
    for seed in (0, 0, 1):
        model = pretrained()
        EDoRA(model, rank=4, init_std=1e-5, seed=seed)
        cores.append(model[0].edora_core.detach())
        assert not torch.equal(model[0].edora_core, model[2].edora_core)
    assert torch.equal(cores[0], cores[1])
    assert not torch.equal(cores[0], cores[2])
    assert 1e-6 < cores[0].std() < 1e-4


def test_a_layer_smaller_than_the_rank_has_no_adapter():
    model = pretrained()
    method = EDoRA(model, rank=11)
    assert method.ranks == {"2": 11, "4": 11}
    assert method.report["0"] == "its weight is 16×10, too small for rank 11"
    assert type(model[0]) is nn.Linear


def test_a_rank_too_large_for_all_layers_is_said_before_other_reasons():
    model = nn.Sequential(*(nn.LayerNorm(4) for _ in range(9)), nn.Linear(4, 4), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="too small for rank 5"):
        EDoRA(model, rank=5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"rank": 4, "alpha": 1e300},
            "'edora_u' of its adapter would start with .* torch.float32 cannot hold",
        ),
        ({"rank": 0}, "rank must be a whole number of 1 or more, found 0"),
        ({"rank": 0.5}, "rank must be a whole number of 1 or more, found 0.5"),
        ({"rank": 4, "alpha": 0}, "alpha must be a finite number above 0, found 0"),
        ({"rank": 4, "init_std": -1}, "init_std must be a finite number of 0 or more, found -1"),
        ({"rank": 4, "max_aspect": 1}, "max_aspect must be a number above 1"),
        ({"rank": 17}, r"the model has no layer that EDoRA can convert .*too small for rank 17"),
    ],
)
def test_settings_out_of_range(settings, expected):
    with pytest.raises(ValueError, match=expected):
        EDoRA(pretrained(), **settings)
