"""PatchTST and GPT-2 from a configuration: shapes, units, what sees what, reproducible weights, errors."""

import re
import subprocess
import sys

import pytest
import torch

from hpclr import models
from hpclr.models import Samples

pytest.importorskip("transformers")

SERIES = Samples("forecasting", (16, 3), (4, 3))
TEXT = Samples("language", (12,), (12, 7))
SMALL = {
    "patchtst": {"patch": 4, "patch_stride": 2, "dim": 16, "depth": 2, "heads": 2, "ffn": 24},
    "gpt2": {"dim": 16, "depth": 2, "heads": 2},
}
SAMPLES = {"patchtst": SERIES, "gpt2": TEXT}
both = pytest.mark.parametrize("name", SAMPLES)


def built(name: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build(name, SAMPLES[name], **SMALL[name] | options)


def drawn(name: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(7, (5, 12), generator=g) if name == "gpt2" else torch.randn(5, 16, 3, generator=g)


@both
def test_outputs_and_gradients(name):
    model, x = built(name), drawn(name)
    outputs = model(x)
    assert outputs.shape == (5, *SAMPLES[name].outputs)
    (outputs * torch.randn_like(outputs)).sum().backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    unused = [key for key, p in trained.items() if p.grad is None]  # which would stop several processes
    assert unused == []
    assert all(p.grad.isfinite().all() for p in trained.values())


@both
def test_weights_are_a_function_of_the_seed_and_the_choices_reach_the_model(name):
    one, two = built(name).state_dict(), built(name).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    blocks = {
        key.split(".layers." if name == "patchtst" else ".h.")[1][0] for key in one if ".0." in key or ".1." in key
    }
    assert blocks == {"0", "1"}
    wider = built(name, dim=32, heads=4)
    assert sum(p.numel() for p in wider.parameters()) > 2 * sum(p.numel() for p in built(name).parameters())


@both
def test_dropout_acts_in_training_only(name):
    model, x = built(name, dropout=0.3), drawn(name)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_a_forecast_is_in_the_units_of_its_window():
    model, x = built("patchtst").eval(), drawn("patchtst")
    scale, offset = torch.tensor([2.0, 10.0, 0.5]), torch.tensor([-3.0, 100.0, 0.0])
    torch.testing.assert_close(model(x * scale + offset), model(x) * scale + offset, rtol=1e-3, atol=1e-3)


def test_columns_do_not_see_one_another():
    model, x = built("patchtst").eval(), drawn("patchtst")
    other = x.clone()
    other[:, :, 1] = 0
    torch.testing.assert_close(model(other)[:, :, [0, 2]], model(x)[:, :, [0, 2]])


@pytest.mark.parametrize(("norm", "alone"), [("batch", False), ("layer", True)])
def test_with_layer_norm_samples_do_not_see_one_another_in_training(norm, alone):
    model, x = built("patchtst", norm=norm, dropout=0.0), drawn("patchtst")
    assert torch.allclose(model(x)[:2], model(x[:2]), atol=1e-5) == alone


def test_no_token_sees_a_later_one():
    model, x = built("gpt2").eval(), drawn("gpt2")
    other = x.clone()
    other[:, 8] = (x[:, 8] + 1) % 7
    assert torch.equal(model(other)[:, :8], model(x)[:, :8])
    assert not torch.allclose(model(other)[:, 8:], model(x)[:, 8:])


def test_images_and_help_do_not_wait_for_transformers():
    code = "import sys, hpclr.models, hpclr.training.run; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("patchtst", {"patch": 16}, "patch must be less than the 16 rows of data.context, found 16"),
        ("patchtst", {"patch": 0}, "patchtst: patch must be a whole number of at least 1"),
        ("patchtst", {"patch": 4, "patch_stride": 5}, "patch_stride must be at most patch, 4, found 5"),
        ("patchtst", {"norm": "group"}, "norm must be one of batch, layer, found 'group'"),
        ("patchtst", {"dropout": 1.0}, "patchtst: dropout must be"),
        ("patchtst", {"dim": 30, "heads": 4}, "dim must be a multiple of heads, found dim 30 and heads 4"),
        ("gpt2", {"dim": 30, "heads": 4}, "gpt2: dim must be a multiple of heads"),
        ("gpt2", {"depth": 0}, "gpt2: depth must be a whole number"),
        ("gpt2", {"widht": 3}, "Model 'gpt2' has no option 'widht'"),
    ],
)
def test_errors_say_what_is_wrong(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        built(name, **options)


@pytest.mark.parametrize(
    ("name", "samples", "message"),
    [
        (
            "gpt2",
            SERIES,
            "gpt2 is a model for language, the data is for forecasting; models for that are mlp, patchtst.",
        ),
        ("vit", TEXT, "vit is a model for classification, the data is for language; models for that are gpt2."),
        ("mlp", TEXT, "mlp is a model for classification and forecasting"),
    ],
)
def test_a_model_for_another_task(name, samples, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        models.build(name, samples)


def test_the_perceptron_forecasts():
    model = models.build("mlp", SERIES, hidden=[8])
    assert model(drawn("patchtst")).shape == (5, 4, 3)
    assert model.head.weight.shape == (12, 8)
