"""What the tests of SARA, Mo-SARA and EDoRA share."""

import torch
import torch.nn.functional as F
from small_runs import batch, mlp
from torch import nn

from hpclr import SARA, EDoRA, MoSARA

METHODS = {
    "sara": lambda model, optimizer=None, **s: SARA(model, optimizer, **({"proportion": 0.3} | s)),
    "mo_sara": lambda model, optimizer=None, **s: MoSARA(model, optimizer, **({"proportion": 0.5} | s)),
    "edora": lambda model, optimizer=None, **s: EDoRA(model, optimizer, **({"rank": 4} | s)),
}


def pretrained(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Four linear layers, 0, 2, 4 and the head 6, for 10 features and 8 classes."""
    return mlp([10, 16, 12, 16, 8], dtype)


def roberta_shapes(layers: int = 12, hidden: int = 768, inner: int = 3072) -> nn.Module:
    """Layers of RoBERTa's names and shapes (hidden=768: those of roberta-base), and no more of it."""

    def one() -> nn.ModuleDict:
        def linear(n: int, m: int) -> nn.ModuleDict:
            return nn.ModuleDict({"dense": nn.Linear(n, m)})

        heads = nn.ModuleDict({name: nn.Linear(hidden, hidden) for name in ("query", "key", "value")})
        attention = nn.ModuleDict({"self": heads, "output": linear(hidden, hidden)})
        parts = {"attention": attention, "intermediate": linear(hidden, inner), "output": linear(inner, hidden)}
        return nn.ModuleDict(parts)

    return nn.ModuleDict({"layer": nn.ModuleList(one() for _ in range(layers)), "classifier": nn.Linear(hidden, 2)})


PUBLISHED = ["*.query", "*.value", "*.output.dense"]


def finetune(model, optimizer, method, steps, first=0):
    """Steps of ordinary training."""
    for step in range(first, first + steps):
        x, y = batch(step, 10, 8, next(model.parameters()).dtype)
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + method.penalty()).backward()
        optimizer.step()
        method.step()


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]
