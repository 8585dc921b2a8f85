"""The models of `step.py` and `memory.py`, with batches of random data: sizes that are known; nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpclr.models import VGG16, ResNet, VisionTransformer

CLASSES = 1000


@dataclass(frozen=True)
class Case:
    """A model and the batch with which it is measured.

    Attributes:
        make: the model, with so many blocks.
        depth: its usual number of blocks.
        batch: samples in a step, few enough for a laptop.
        example: so many samples and what is wanted of them.
        what: a line for the table.
    """

    make: Callable[[int], nn.Module]
    depth: int
    batch: int
    example: Callable[[int], tuple[Tensor, Tensor]]
    what: str


class Block(nn.Module):
    """A pre-norm block of GPT-2 (Radford et al., 2019): x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to the same shape; a token sees those before it."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2: learned positions, and a head that shares the table of tokens."""

    def __init__(self, vocabulary: int, context: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, dim), nn.Embedding(context, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (batch, tokens) to logits (batch·tokens, vocabulary)."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.blocks(self.tokens(ids) + self.positions(places))
        logits: Tensor = self.head(self.norm(x)).flatten(0, 1)
        return logits


def _images(side: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda batch: (torch.randn(batch, 3, side, side), torch.randint(0, 10, (batch,)))


def _text(vocabulary: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda batch: (torch.randint(0, vocabulary, (batch, 256)), torch.randint(0, vocabulary, (batch * 256,)))


def _vit(dim: int, heads: int) -> Callable[[int], nn.Module]:
    return lambda depth: VisionTransformer(
        (3, 224, 224), CLASSES, patch=16, dim=dim, depth=depth, heads=heads, pool="cls"
    )


def _gpt(vocabulary: int) -> Callable[[int], nn.Module]:
    return lambda depth: GPT(vocabulary, 256, 768, depth, 12)


CASES = {
    "vit-tiny": Case(_vit(192, 3), 12, 8, _images(224), "ViT-Tiny/16, 192 wide, 224 px"),
    "vit-b": Case(_vit(768, 12), 12, 2, _images(224), "ViT-B/16, 768 wide, 224 px"),
    "resnet20": Case(lambda depth: ResNet(depth, (3, 32, 32), 10), 20, 128, _images(32), "ResNet-20, 32 px"),
    "vgg16": Case(lambda depth: VGG16((3, 32, 32), 10), 13, 32, _images(32), "VGG16 with batch norm, 32 px"),
    "gpt2": Case(_gpt(50257), 12, 2, _text(50257), "GPT-2 small, 768 wide, 50257 tokens known, 256 in a sample"),
    "gpt2-bytes": Case(_gpt(256), 12, 2, _text(256), "the same of bytes: 256 tokens known"),
}
