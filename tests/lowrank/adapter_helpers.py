"""What the tests of adapters share: layers of every kind with adapters of every form, and what these shall compute."""

import pytest
import torch
from lowrank_helpers import CONV, LINEAR, Case, small_net
from torch import Tensor, nn

from hpclr.lowrank.adapters import FORMS, AdaptedModule, adapt, adaptable, edora, mo_sara, sara
from hpclr.lowrank.factors import svd

ALPHA, EXPERTS = 6.0, 3
STARTS = {
    "sara": lambda weight, rank, generator: sara.start(weight, rank, generator),
    "mo_sara": lambda weight, rank, generator: mo_sara.start(weight, svd(weight).leading(rank), EXPERTS, generator),
    "edora": lambda weight, rank, generator: edora.start(weight, svd(weight).leading(rank), ALPHA, 0.0, generator),
}
KINDS: dict[str, Case] = (
    {f"Linear {name}": made for name, made in LINEAR.items() if name != "no rows"}
    | {f"Conv {name}": made for name, made in CONV.items() if not name.endswith(("groups", "depthwise", "no images"))}
    | {"Conv1D of Hugging Face": (lambda: pytest.importorskip("transformers.pytorch_utils").Conv1D(9, 12), (2, 3, 12))}
)


def with_adapters(model: nn.Module, form: str, rank: int = 2, seed: int | None = None) -> nn.Module:
    """Adapts every layer that can be, in place; with a seed, its adapters have been trained, somehow."""
    for name, site in adaptable(model).sites.items():
        generator = torch.Generator().manual_seed(len(name))
        adapt(site.module, FORMS[form], STARTS[form](site.core(), rank, generator))
    if seed is not None:
        as_if_trained(model, seed)
    return model


def as_if_trained(model: nn.Module, seed: int = 0) -> None:
    """Adds noise to every parameter of an adapter that is trained."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, AdaptedModule):
            for name in module.trained:
                parameter = module.parameter(name)
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data += 0.3 * noise.to(parameter)


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def net(form: str, rank: int = 2, seed: int | None = None) -> nn.Module:
    """Three layers with adapters."""
    torch.manual_seed(3)
    return with_adapters(small_net(), form, rank, seed)
