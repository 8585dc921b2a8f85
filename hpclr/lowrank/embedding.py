"""nn.Embedding with the factors of the head that shares its weight.

A table of tokens W = U Σ Vᵀ (vocabulary × width) of rank k gives each token a row of U, k numbers, and all of them the
same k directions Σ Vᵀ (Lan et al., ALBERT, arXiv 1909.11942, section 3.1). An embedding becomes so only together with
the nn.Linear whose weight is the same Parameter, and holds the very Parameters that the Linear holds.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils import parametrize

from hpclr.lowrank.layers import LowRankModule, Slot


class EmbeddingWeight(LowRankModule):
    """The weight of nn.Embedding, (tokens, width), is its own matrix, and the head's."""

    slots: tuple[Slot, ...] = (Slot("weight"),)


class LowRankEmbedding(EmbeddingWeight):
    """nn.Embedding that looks up rows of U."""

    padding_idx: int | None

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (...) to (..., width), in the weight's type."""
        return self.arithmetic.embedding(ids, self.factors_in_use(self.slots[0]), self.padding_idx)


def why_not_with_head(embeddings: Sequence[nn.Module], names: Sequence[str]) -> str | None:
    """Why the weight that these share with a head cannot be held as factors; None if it can.

    Args:
        embeddings: dense ones.
        names: of the parameters that they would get.
    """
    for embedding in embeddings:
        for setting in ("max_norm", "sparse", "scale_grad_by_freq"):
            if getattr(embedding, setting):
                return f"tied: the embedding that shares its weight has {setting}, which takes whole rows of the weight"
        if parametrize.is_parametrized(embedding) or any(hasattr(embedding, name) for name in names):
            return "tied: the embedding that shares its weight is parametrised, or has an attribute named as a factor"
    return None
