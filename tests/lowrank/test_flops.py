"""Operations that are counted, against torch's counter around real passes, and against closed formulas."""

import random
from math import prod

import numpy as np
import pytest
import torch
from lowrank_helpers import CONV, LAYERS, LINEAR, case, some_loss
from torch import nn
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

from hpclr.lowrank import KINDS, count_flops, count_gradient_flops, count_training_flops, select
from hpclr.lowrank.layers import lowrank_modules
from hpclr.lowrank.svd_layers import CHANNEL, SPATIAL

FORMS = {"frozen": KINDS, "channel": CHANNEL, "spatial": SPATIAL}


def factored(layer: nn.Module, form: str, rank: int | None = None) -> nn.Module:
    """The layer in a form of factors; all its weights must have been converted."""
    if form == "dense":
        return layer
    sites = select(layer, kinds=FORMS[form]).eligible
    assert sites
    for site in sites:
        site.factorize(rank if rank is None else min(rank, *site.shape))
    return layer


def of_a_real_pass(layer: nn.Module, *inputs: torch.Tensor, gradients: bool = False) -> int:
    """What torch counts while it computes; without the kernels that are one operation to it."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counter:
            outputs = layer(*inputs)
            if gradients:
                some_loss(outputs[0] if isinstance(outputs, tuple) else outputs).backward()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops()


def hugging_face_conv1d():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    return conv1d(9, 12)


class SelfAttention(nn.Module):
    """Takes one tensor."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **options)
        self._narrow = options.get("kdim", 16)

    def forward(self, x):
        source = x[..., : self._narrow]
        return self.attention(x, source if self._narrow < 16 else x, source if self._narrow < 16 else x)[0]


CASES = LAYERS | {
    "Hugging Face's Conv1D": (hugging_face_conv1d, (3, 5, 12)),
    "attention, packed": case(SelfAttention, x=(3, 7, 16)),
    "attention, separate": case(SelfAttention, kdim=6, vdim=6, x=(3, 7, 16)),
}


@pytest.mark.parametrize("form", ["dense", *FORMS])
@pytest.mark.parametrize("name", CASES)
def test_a_pass_is_counted_as_torch_counts_a_real_one(name, form):
    make, shape = CASES[name]
    for rank in (1, None) if form != "dense" else (None,):
        layer, x = factored(make(), form, rank), torch.randn(shape)
        assert count_flops(layer, x) == of_a_real_pass(layer.eval(), x)
        assert count_flops(layer, x) > 0 or 0 in shape


@pytest.mark.parametrize("form", ["dense", *FORMS])
@pytest.mark.parametrize("name", [name for name in CASES if "groups" not in name and "depthwise" not in name])
def test_training_is_counted_as_torch_counts_real_passes(name, form):
    make, shape = CASES[name]
    for rank in (1, None) if form != "dense" else (None,):
        layer, x = factored(make(), form, rank), torch.randn(shape)
        counted = count_training_flops(layer, lambda model, x=x: some_meta_loss(model(x.to("meta"))))
        assert counted == of_a_real_pass(layer, x, gradients=True)


def some_meta_loss(outputs):
    return outputs.float().sum() * 2


# Closed formulas


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("form", FORMS)
def test_formulas_of_linear_layers(name, form):
    (make, shape), k = LINEAR[name], 2
    layer = factored(make(), form, k)
    rows, m, n = prod(shape[:-1]), layer.out_features, layer.in_features
    fold = 2 * k * k * min(rows, m) if form == "frozen" else 0
    if rows >= 3:  # else the weight may be rebuilt
        assert count_flops(layer, torch.randn(shape)) == 2 * rows * k * (m + n) + fold
    dense = make()
    assert count_flops(dense, torch.randn(shape)) == 2 * rows * m * n


@pytest.mark.parametrize("name", CONV)
@pytest.mark.parametrize("form", FORMS)
def test_formulas_of_convolutions(name, form):
    (make, shape), k = CONV[name], 1
    dense, layer, x = make(), factored(make(), form, k), torch.randn(shape)
    out, groups, kernel = dense.out_channels, dense.groups, dense.kernel_size
    positions = dense(x).numel() // out
    assert count_flops(dense, x) == 2 * positions * out * (dense.in_channels // groups) * prod(kernel)
    n = dense.in_channels // groups * prod(kernel)
    expected = 2 * positions * k * (groups * n + out) + (2 * out * k * k if form == "frozen" else 0)
    if form == "spatial" and len(kernel) == 2 and kernel[1] > 1:
        between = positions_between(dense, x)
        expected = 2 * k * (between * dense.in_channels * kernel[0] + positions * out * kernel[1])
    through = groups == 1 and positions > 0  # with groups, each with all k filters, W may be rebuilt
    if through:
        assert count_flops(layer, x) == expected


def positions_between(layer: nn.Conv2d, x: torch.Tensor) -> int:
    """Rows of what comes out of the k×1 convolution."""
    x = x if x.ndim == 4 else x[None]
    padding = layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        x = nn.functional.pad(x, layer._reversed_padding_repeated_twice)
        padding = (0, 0)
    filters = torch.zeros(1, layer.in_channels, layer.kernel_size[0], 1)
    return conv2d(x, filters, None, (layer.stride[0], 1), (padding[0], 0), (layer.dilation[0], 1)).numel()


@pytest.mark.parametrize("groups", [2, 4])
def test_filters_are_applied_in_every_group(groups):
    m, n, k, size = 64, 16 // groups * 9, 1, 12
    layer, x = nn.Conv2d(16, m, 3, groups=groups, padding=1), torch.randn(5, 16, size, size)
    rows = 5 * size * size
    assert count_flops(layer, x) == 2 * rows * m * n
    assert count_flops(factored(layer, "channel", k), x) == 2 * rows * k * (groups * n + m)


def test_formula_of_attention():
    n, length, e, k = 3, 7, 16, 2
    layer = factored(SelfAttention(), "channel", k)
    scores = 2 * 2 * n * length * length * e
    projections = 2 * n * length * k * ((e + 3 * e) + (e + e))
    assert count_flops(layer, torch.randn(n, length, e)) == projections + scores
    assert count_flops(SelfAttention(), torch.randn(n, length, e)) == 2 * n * length * 4 * e * e + scores


def two_layers(form: str, rank: int | None = None) -> nn.Sequential:
    """The second one must give a gradient to the first."""
    return nn.Sequential(*(factored(nn.Linear(sizes[0], sizes[1]), form, rank) for sizes in ((20, 40), (40, 30))))


def meta_loss(rows: int):
    return lambda model: model(torch.empty(rows, 20, device="meta")).sum()


@pytest.mark.parametrize("rows", [50, 10**7])
def test_training_formulas(rows):
    k, folded = 2, rows > 50
    first, second = 20 * 40, 40 * 30
    assert count_training_flops(two_layers("dense"), meta_loss(rows)) == rows * (4 * first + 6 * second)
    model = two_layers("frozen", k)
    forward = 2 * rows * k * (20 + 40 + 40 + 30) + 2 * k * k * (40 + 30 if folded else 2 * rows)
    to_sigma = 2 * rows * k * (40 + 30) + 2 * 2 * rows * k * k
    to_input = 2 * rows * k * 40 + 2 * k * k * (40 if folded else rows)
    assert count_training_flops(model, meta_loss(rows)) == forward + to_sigma + to_input
    assert count_training_flops(model, meta_loss(rows), dense=True) == rows * (4 * first + 6 * second)


def test_dense_weights_are_trained_where_any_factor_is():
    model = two_layers("channel", 2)
    for module in (module for _, module in lowrank_modules(model)):
        module.s.requires_grad_(False)
    assert count_training_flops(model, meta_loss(50), dense=True) == 50 * (4 * 20 * 40 + 6 * 40 * 30)
    assert not any(module.s.requires_grad for _, module in lowrank_modules(model))
    model.requires_grad_(False)
    model[1].bias.requires_grad_(True)
    assert count_training_flops(model, meta_loss(50), dense=True) == 50 * 2 * (20 * 40 + 40 * 30)


@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_groups_train_like_as_many_convolutions(cls, groups):
    """torch's own count of a backward pass takes the gradient of the weight `groups` times too high."""

    def training(layer, channels):
        model = nn.Sequential(nn.Conv2d(channels, channels, 1, groups=channels), layer)
        x = torch.empty(2, channels, 9, 9, device="meta")
        return count_training_flops(model, lambda model: model(x).sum()) - 4 * 2 * channels * 81

    whole = training(cls(8, 16, 3, stride=2, groups=groups), 8)
    assert whole == groups * training(cls(8 // groups, 16 // groups, 3, stride=2), 8 // groups)
    if cls is nn.Conv2d:
        assert whole == 3 * 2 * (2 * 4 * 4) * 16 * (8 // groups) * 9


def test_a_penalty_is_counted_without_changing_gradients():
    model = nn.Sequential(factored(nn.Linear(20, 30), "channel", 4))
    model[0].u.grad = torch.ones(30, 4)

    def penalty():
        return model[0].u.mT.matmul(model[0].u).square().sum() + model[0].s.sum()

    assert count_gradient_flops(penalty, model) == 3 * 2 * 4 * 4 * 30
    assert torch.equal(model[0].u.grad, torch.ones(30, 4))
    assert model[0].s.grad is None
    assert count_gradient_flops(lambda: torch.zeros(()), model) == 0


def test_counting_training_leaves_everything_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(64, 5)).train()
    before = [torch.get_rng_state(), torch.tensor(random.getstate()[1]), torch.tensor(np.random.get_state()[1])]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert count_training_flops(model, lambda model: model(torch.empty(2, 3, 6, 6, device="meta")).sum()) > 0
    after = [torch.get_rng_state(), torch.tensor(random.getstate()[1]), torch.tensor(np.random.get_state()[1])]
    assert all(map(torch.equal, before, after))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
