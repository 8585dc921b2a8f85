"""nn.MultiheadAttention with low-rank projections, packed or separate.

Sizes: L queries and S keys for each of N sequences, H heads of width D, E = H·D.
"""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from hpclr.lowrank.layers import LowRankModule, Slot
from hpclr.lowrank.product import Factors


class AttentionWeights(LowRankModule):
    """The packed input projection (3E, E) is one matrix; separate ones are three."""

    slots: tuple[Slot, ...] = (
        Slot("in_proj_weight", "in_proj_"),
        Slot("q_proj_weight", "q_proj_"),
        Slot("k_proj_weight", "k_proj_"),
        Slot("v_proj_weight", "v_proj_"),
    )


class LowRankAttention(AttentionWeights):
    """nn.MultiheadAttention with the cheapest order of multiplication for its projections."""

    embed_dim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    bias_k: Tensor | None
    in_proj_bias: Tensor | None
    out_proj: torch.nn.Module
    _qkv_same_embed_dim: bool

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward: same arguments, same result."""
        if self.bias_k is not None or self.add_zero_attn or query.is_nested or (is_causal and attn_mask is None):
            return super().forward(  # type: ignore[no-any-return]
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = query.ndim == 3
        q, k, v = (self._batch_first(x, batched) for x in self._project(query, key, value))
        mask = self._mask(key_padding_mask, attn_mask, q, k)
        context, weights = self._attend(q, k, v, mask, need_weights)
        output = self.out_proj(self._callers_layout(context, batched))
        if weights is None:
            return output, None
        weights = weights.mean(1) if average_attn_weights else weights
        return output, weights if batched else weights.squeeze(0)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        in_proj, *separate = self.slots
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if not self._qkv_same_embed_dim:
            triples = zip((query, key, value), separate, biases, strict=True)
            return tuple(self._one_projection(x, slot, bias) for x, slot, bias in triples)
        if not self.is_lowrank(in_proj):
            return self._dense_projections(query, key, value)
        packed = self.factors_in_use(in_proj)
        project = self.arithmetic.linear
        if query is key and key is value:
            return project(query, packed, self.in_proj_bias).chunk(3, -1)
        parts = (Factors(u, packed.sigma, packed.vh) for u in packed.u.chunk(3))
        return tuple(project(x, part, bias) for x, part, bias in zip((query, key, value), parts, biases, strict=True))

    def _dense_projections(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Of a layer of which only the output projection is low-rank."""
        weight, bias = self.dense_weight(self.slots[0]), self.in_proj_bias
        if query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(
            F.linear(x, part, b) for x, part, b in zip((query, key, value), weight.chunk(3), biases, strict=True)
        )

    def _one_projection(self, x: Tensor, slot: Slot, bias: Tensor | None) -> Tensor:
        if self.is_lowrank(slot):
            return self.arithmetic.linear(x, self.factors_in_use(slot), bias)
        return F.linear(x, self.dense_weight(slot), bias)

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        """Any layout that the class takes to (N, H, length, D)."""
        if not batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        heads: Tensor = x.unflatten(-1, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2)

    def _callers_layout(self, context: Tensor, batched: bool) -> Tensor:
        """(N, H, L, D) back to the caller's layout with E = H·D."""
        x: Tensor = context.transpose(1, 2).flatten(2)
        if not batched:
            return x.squeeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _mask(self, padding: Tensor | None, mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one, added to the scores: broadcastable to (N, H, L, S)."""
        total = None
        if mask is not None:
            total = _additive(mask, q)
            if total.ndim == 3:  # one mask a sequence and head
                total = total.view(-1, self.num_heads, q.shape[2], k.shape[2])
        if padding is not None:
            extra = _additive(padding, q).view(-1, 1, 1, k.shape[2])
            total = extra if total is None else total + extra
        return total

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout), None
        scores = q @ k.mT / sqrt(self.head_dim)
        weights = F.softmax(scores if mask is None else scores + mask, -1)
        weights = F.dropout(weights, dropout) if dropout else weights
        return weights @ v, weights


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A boolean mask (True: not to be attended to) as −∞ where it is true; a float mask as it is."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
