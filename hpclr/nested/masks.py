"""Which of the leading pairs see which: the masks that put singular functions into order.

NestedLoRA (Ryu et al., ICML 2024, arXiv 2402.03655) fits L pairs at once. Without nesting the best L pairs span the
right space in no order. Nested, the first ℓ pairs are made the best ℓ, for many ℓ at once, and that is the order. What
the pairs know of each other stands in a vector v and a matrix M, that weight the gradients (`operators.py`).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Nesting(NamedTuple):
    """The masks of L pairs."""

    vector: Tensor  # v (L): the weight of the operator's part of pair l
    matrix: Tensor  # M (L×L): with what weight pair l (column) keeps away from pair i (row)

    def to(self, like: Tensor) -> "Nesting":
        """The same in the type of a tensor and on its device."""
        return Nesting(self.vector.to(like), self.matrix.to(like))


def unnested(count: int) -> Nesting:
    """No order: v = 1, M = 1.

    Args:
        count: L.
    """
    return Nesting(torch.ones(count), torch.ones(count, count))


def joint(weights: Tensor) -> Nesting:
    """One loss, Σ_k w_k loss(first k pairs): v_l = Σ_{k ≥ l} w_k, M_il = v_max(i, l).

    For a network that all functions share. With w_k the probability of a length k, it is the expectation of the loss
    with all but the first k pairs left out, k drawn at random: ordered dropout of the pairs.

    Args:
        weights: w (L), none below 0 and the last above; w_k belongs to the length k + 1. Lengths of weight 0 are not
            nested.

    Raises:
        ValueError: if a pair would take no part, or with a negative weight.
    """
    if weights.ndim != 1 or not bool((weights >= 0).all()) or not bool(weights[-1:].sum() > 0):
        raise ValueError(
            "the weights of joint nesting are one number for each length from 1 to L, none of them negative and the "
            f"last positive, as torch.full((L,), 1 / L); found {weights!r}"
        )
    vector = weights.flip(0).cumsum(0).flip(0)
    return Nesting(vector, torch.minimum(vector[:, None], vector))


def sequential(count: int, step: int = 1) -> Nesting:
    """Pair l sees those before it, not those after: v = 1, M_il = 1 for i ≤ l, else 0.

    For functions without common parameters: not the gradient of any one loss, but each pair does what it would if those
    before it were done.

    Args:
        count: L.
        step: this many pairs in a row make a block, within which there is no order.

    Raises:
        ValueError: for a step below 1.
    """
    if step < 1:
        raise ValueError(f"step counts the pairs of a block, at least 1; found {step}")
    block = torch.arange(count) // step
    return Nesting(torch.ones(count), (block[:, None] <= block).float())
