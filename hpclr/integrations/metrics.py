"""What the callbacks hand to loggers."""

from torch import nn

from hpclr.lowrank import summarize
from hpclr.methods import Method


class Metrics:
    """Sizes always, ranks when a check has been made since they were last told.

    Args:
        model: what is trained.
        method: how.
    """

    def __init__(self, model: nn.Module, method: Method) -> None:
        self._model, self._method = model, method
        self._told = -1

    def sizes(self) -> dict[str, float]:
        """Parameters, and the mean rank of the factored layers as a share of their full ranks."""
        found = summarize(self._model)
        return {
            "lowrank/trainable_parameters": float(found.trainable),
            "lowrank/stored_parameters": float(found.stored),
            "lowrank/dense_parameters": float(found.dense),
            "lowrank/rank_share": 1.0 if found.rank_share is None else found.rank_share,
        }

    @property
    def has_news(self) -> bool:
        """Whether there has been a check since ranks were last told."""
        return self._method.checks != self._told

    def news(self) -> dict[str, float]:
        """Sizes, and the rank of each layer if that is news."""
        ranks = self._method.ranks if self.has_news else {}
        self._told = self._method.checks
        return self.sizes() | {f"lowrank/rank/{name}": float(rank) for name, rank in ranks.items()}
