"""The state of LoRA: what must be the same when it is loaded."""

import pytest
import torch
from torch import nn

from hpclr.config.schema import Lora
from hpclr.training.lora import LoRA

SETTINGS = {"rank": 3, "alpha": 6.0, "dropout": 0.1, "train": ("0.bias",)}


def method(**changed):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3))
    return LoRA(model, torch.optim.SGD(model.named_parameters(), 0.1), Lora(**(SETTINGS | changed)), 0)


def test_its_own_state_loads():
    method().load_state_dict(method().state_dict())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rank": 2}, "another model or other settings: layers 0, 1 differ"),
        ({"rank": 4}, "another model or other settings: layers 0, 1 differ"),
        ({"alpha": 3.0}, "it was saved with settings .*'alpha': 3.0.*, not .*'alpha': 6.0"),
        ({"dropout": 0.0}, "it was saved with settings"),
        ({"train": ()}, "it was saved with trained"),
        ({"exclude": ("1",)}, "layers 1 differ"),
    ],
)
def test_other_settings_are_refused(changed, said):
    with pytest.raises(ValueError, match=said):
        method().load_state_dict(method(**changed).state_dict())


def test_names_in_the_groups_follow():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1)
    LoRA(model, optimizer, Lora(rank=2), 0)
    (group,) = optimizer.param_groups
    named = dict(model.named_parameters())
    assert [id(named[name]) for name in group["param_names"]] == [id(p) for p in group["params"]]


def _used_twice():
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding="same", dilation=2), nn.Conv2d(4, 3, 1)),
            r"dilation.*\(2, 2\)",
        ),
        (
            lambda: nn.Sequential(nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), nn.Conv1d(4, 3, 1)),
            "'circular'",
        ),
        (_used_twice, "in 2 places"),
    ],
)
def test_layers_of_which_peft_would_not_compute_the_merged_weight_are_refused(make, said):
    model = make()
    before = list(model.named_parameters())
    with pytest.raises(ValueError, match=f"layer '0' cannot be given LoRA: .*{said}.*exclude"):
        LoRA(model, torch.optim.SGD(model.parameters(), 0.1), Lora(rank=2), 0)
    after = dict(model.named_parameters())
    assert [(name, id(p)) for name, p in before] == [(name, id(p)) for name, p in after.items()]


def test_a_model_that_is_a_single_layer_is_refused():
    model = nn.Linear(6, 6)
    with pytest.raises(ValueError, match="here it is the whole model"):
        LoRA(model, torch.optim.SGD(model.parameters(), 0.1), Lora(rank=2, keep_last=False), 0)
