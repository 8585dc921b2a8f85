"""What torch.compile needs to know of models whose ranks change."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def expect_rank_changes(compilations: int = 64) -> None:
    """Has torch.compile keep the compiled code when ranks change; for the whole process.

    torch takes the shapes of parameters for fixed, compiles anew for each new rank, and gives up after eight times.
    After this call the rank of a layer becomes a variable of the compiled code once it has changed for the first time.

    Args:
        compilations: how many a piece of code is allowed before torch gives up on it: one for each check at which
            layers are converted, change their rank for the first time or begin to multiply through their factors.
    """
    from torch._dynamo import config  # takes a second, which only those who compile should wait

    config.force_parameter_static_shapes = False
    config.recompile_limit = max(config.recompile_limit, compilations)


def not_compiled() -> AbstractContextManager[Any]:
    """In the block what is compiled runs as it is written; what has been compiled is kept."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes a second
        return nullcontext()
    eagerly: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eagerly
