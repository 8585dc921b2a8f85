"""The processes of a job: who each is, how they meet, share out work, and notice when one is gone.

The names below are loaded when first used: who a process is must be known before torch is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpclr.parallel.replica import Replica
    from hpclr.parallel.sharded import Sharded

__all__ = ["Replica", "Sharded"]

_MODULES = {"Replica": "replica", "Sharded": "sharded"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
