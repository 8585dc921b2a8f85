"""The built-in models: published sizes, shapes, gradients, reproducible weights, errors."""

import re

import pytest
import torch
from torch import nn

from hpclr import models
from hpclr.models import Samples

CIFAR = Samples("classification", (3, 32, 32), (10,))

# Small versions of every kind of model and of every choice that changes its forward.
VARIANTS = {
    "mlp": ("mlp", (1, 8, 8), {"hidden": [16, 12], "dropout": 0.1}),
    "mlp-gelu-flat": ("mlp", (7,), {"hidden": (9,), "activation": "gelu"}),
    "mlp-tanh": ("mlp", (5, 3), {"activation": "tanh"}),
    "mlp-linear": ("mlp", (2, 4), {"hidden": []}),
    "vit-mean": ("vit", (1, 8, 8), {"patch": 2, "dim": 16, "depth": 2, "heads": 2, "dropout": 0.1}),
    "vit-cls": ("vit", (3, 12, 12), {"image": 12, "dim": 16, "depth": 1, "pool": "cls", "qkv_bias": False}),
    "vgg16-28": ("vgg16", (1, 28, 28), {"width": 0.125, "dropout": 0.1}),
    "vgg16-32": ("vgg16", (3, 32, 32), {"width": 0.125}),
    "resnet20-28": ("resnet20", (1, 28, 28), {"width": 4}),
    "resnet32-odd": ("resnet32", (3, 15, 9), {"width": 3}),
}


def pictures(shape: tuple[int, ...], classes: int) -> Samples:
    return Samples("classification", shape, (classes,))


def build_variant(variant: str) -> tuple[nn.Module, torch.Tensor]:
    name, shape, options = VARIANTS[variant]
    torch.manual_seed(0)
    return models.build(name, pictures(shape, 5), **options), torch.randn(4, *shape)


def build_empty(name: str, **options) -> nn.Module:
    """A model for CIFAR-10 whose weights have shapes but no numbers."""
    with torch.device("meta"):
        return models.build(name, CIFAR, **options)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients(variant):
    model, x = build_variant(variant)
    logits = model(x)
    assert logits.shape == (4, 5)
    # Random weights on the logits: their plain sum has no gradient through a batch norm or softmax.
    (logits * torch.randn(4, 5)).sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_and_outputs_are_a_function_of_the_seed(variant):
    first, x = build_variant(variant)
    second, _ = build_variant(variant)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert torch.equal(first.eval()(x), second.eval()(x))
    torch.manual_seed(1)
    name, shape, options = VARIANTS[variant]
    other = models.build(name, pictures(shape, 5), **options)
    assert not torch.equal(first.eval()(x), other.eval()(x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_do_not_see_one_another_in_eval_mode(variant):
    model, x = build_variant(variant)
    model.eval()
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["mlp", "mlp-tanh", "vit-mean", "vit-cls", "vgg16-28", "resnet20-28"])
def test_a_few_steps_learn_four_samples_by_heart(variant):
    model, x = build_variant(variant)
    labels = torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("depth", "published", "exact"),
    [(20, 0.27, 269_722), (32, 0.46, 464_154), (44, 0.66, 658_586), (56, 0.85, 853_018), (110, 1.7, 1_727_962)],
)
def test_resnets_have_the_published_size_and_depth(depth, published, exact):
    model = build_empty(f"resnet{depth}")
    assert count(model) == exact
    assert round(exact / 1e6, 2 if depth < 110 else 1) == published
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


def test_resnet_shortcut_is_every_second_pixel_padded_with_zero_channels():
    model = models.build("resnet20", CIFAR)
    block = model.stages[1][0]
    nn.init.zeros_(block.norm2.weight)  # silences the convolutions
    x = torch.rand(2, 16, 7, 7)
    out = block(x)
    assert out.shape == (2, 32, 4, 4)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_vgg16_has_13_convolutions_one_linear_and_the_known_size():
    model = build_empty("vgg16")
    assert count(model) == 14_724_042
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 13
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 1


@pytest.mark.parametrize("side", [8, 28, 32, 33, 64])
def test_vgg16_takes_images_of_any_size(side):
    model = models.build("vgg16", pictures((1, side, side), 3), width=1 / 16)
    assert model(torch.randn(2, 1, side, side)).shape == (2, 3)


def test_the_mini_vit_of_the_paper():
    model = build_empty("vit", patch=8, dim=768, depth=6, heads=6, mlp_ratio=4, qkv_bias=False)
    block = 4 * 768 * 768 + 768 + 8 * 768 * 768 + 5 * 768 + 4 * 768
    assert count(model) == 6 * block + (3 * 64 + 1) * 768 + 16 * 768 + 2 * 768 + 769 * 10
    assert model.blocks[0].attention.qkv.weight.shape == (3 * 768, 768)
    assert model.blocks[0].attention.qkv.bias is None


def test_vit_attention_is_softmax_attention_over_all_tokens():
    model, _ = build_variant("vit-mean")
    attention = model.eval().blocks[0].attention
    x = torch.randn(2, 5, 16)
    q, k, v = attention.qkv(x).split(16, dim=-1)
    heads = []
    for part in (slice(0, 8), slice(8, 16)):
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 8**0.5).softmax(-1)
        heads.append(weights @ v[..., part])
    torch.testing.assert_close(attention(x), attention.out(torch.cat(heads, -1)))


def test_vit_sees_where_a_patch_is():
    model, x = build_variant("vit-mean")
    assert not torch.allclose(model.eval()(x), model(x.flip(-1)), atol=1e-4)


@pytest.mark.parametrize("variant", ["mlp", "vit-mean", "vgg16-28"])
def test_dropout_acts_in_training_and_leaves_the_names_of_the_weights(variant):
    model, x = build_variant(variant)
    assert not torch.equal(model(x), model(x))
    name, shape, options = VARIANTS[variant]
    without = models.build(name, pictures(shape, 5), **{**options, "dropout": 0.0})
    assert list(without.state_dict()) == list(model.state_dict())


def test_names_build_with_their_defaults():
    assert models.names("classification") == ["mlp", "vit", "vgg16", *(f"resnet{d}" for d in (20, 32, 44, 56, 110))]
    with torch.device("meta"):  # shapes without numbers
        for name in models.names("classification"):
            assert models.build(name, CIFAR)(torch.empty(2, 3, 32, 32)).shape == (2, 10)


ERRORS = [
    ("vti", (1, 8, 8), {}, "Unknown model 'vti' (did you mean 'vit'?)"),
    ("resnet18", (3, 32, 32), {}, "resnet20, resnet32, resnet44, resnet56, resnet110"),
    ("mlp", (4,), {"hiden": [3]}, "has no option 'hiden' (did you mean 'hidden'?)"),
    ("resnet20", (3, 8, 8), {"depth": 32}, "its options are width"),
    ("mlp", (), {}, "at least one value"),
    ("mlp", (4,), {"hidden": 12}, "list of widths"),
    ("mlp", (4,), {"hidden": [8, 0]}, "hidden[1] must be a whole number of at least 1, found 0"),
    ("mlp", (4,), {"activation": "swish"}, "relu, gelu, tanh, found 'swish'"),
    ("mlp", (4,), {"dropout": 1}, "at least 0 and below 1, found 1"),
    ("vit", (64,), {}, "found samples of shape (64,)"),
    ("vit", (1, 8, 6), {}, "must be square, found 8x6"),
    ("vit", (1, 28, 28), {"image": 32}, "image is 32, but the data's images have 28x28"),
    ("vit", (1, 28, 28), {"patch": 8}, "patch may be 1, 2, 4, 7, 14, 28"),
    ("vit", (1, 8, 8), {"dim": 30, "heads": 4}, "dim 30 and heads 4"),
    ("vit", (1, 8, 8), {"depth": 0}, "depth must be a whole number"),
    ("vit", (1, 8, 8), {"patch": True}, "patch must be a whole number"),
    ("vit", (1, 8, 8), {"mlp_ratio": 0}, "mlp_ratio must be a number above 0"),
    ("vit", (1, 8, 8), {"pool": "max"}, "mean, cls, found 'max'"),
    ("vgg16", (4,), {}, "must be images"),
    ("vgg16", (3, 32, 32), {"width": -1.0}, "width must be a number above 0, found -1.0"),
    ("resnet56", (3, 32, 32), {"width": 1.5}, "resnet56: width must be a whole number"),
]


@pytest.mark.parametrize(("name", "shape", "options", "message"), ERRORS)
def test_errors_say_what_is_wrong_and_what_would_be_right(name, shape, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        models.build(name, pictures(shape, 10), **options)


@pytest.mark.parametrize("name", ["mlp", "vit", "vgg16", "resnet20"])
def test_a_model_needs_a_class(name):
    with pytest.raises(ValueError, match="classes must be a whole number of at least 1, found 0"):
        models.build(name, pictures((1, 8, 8), 0))


def test_resnet_of_another_depth():
    with pytest.raises(ValueError, match="6n \\+ 2"):
        models.ResNet(18, (3, 32, 32), 10)
