"""A vision transformer with pre-norm blocks (Dosovitskiy et al., arXiv 2010.11929)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpclr.models.common import check_dropout, check_positive, check_whole, image_shape

POOLS = ("mean", "cls")


class VisionTransformer(nn.Module):
    """Patches, learned positions, `depth` transformer blocks, norm, pooling, head.

    Linear weights are drawn from a truncated normal law (0.02, the patch embedding 1/√fan_in),
    positions from a normal law (0.5), biases are zero. The mini-ViT of OIALR's CIFAR-10 experiment is
    `patch=8, dim=768, depth=6, heads=6, mlp_ratio=4, qkv_bias=False`.

    Args:
        sample_shape: (channels, height, width); height and width must be equal.
        classes: number of logits.
        image: side of the image in pixels, as a check on the data; None takes the data's.
        patch: side of a patch in pixels; must divide the image's.
        dim: width of a token; must be a multiple of `heads`.
        depth: number of blocks.
        heads: attention heads of a block.
        mlp_ratio: hidden width of a block's MLP, in units of `dim`.
        dropout: probability after the positions, the attention and both layers of the MLP.
        qkv_bias: whether queries, keys and values have a bias.
        pool: what the head sees: the mean of the tokens, or a token of its own (cls).

    Raises:
        ValueError: an option is out of its range or does not fit the samples.
    """

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        classes: int,
        *,
        image: int | None = None,
        patch: int = 4,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        qkv_bias: bool = True,
        pool: str = "mean",
    ) -> None:
        super().__init__()
        channels, height, width = image_shape("vit", sample_shape)
        check_whole("vit", classes=classes, patch=patch, dim=dim, depth=depth, heads=heads)
        check_positive("vit", mlp_ratio=mlp_ratio)
        check_dropout("vit", dropout)
        _check_fit((height, width), image, patch, dim, heads)
        if pool not in POOLS:
            raise ValueError(f"vit: pool must be one of {', '.join(POOLS)}, found {pool!r}.")
        self.embed = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim)) if pool == "cls" else None
        tokens = (height // patch) ** 2 + (pool == "cls")
        self.positions = nn.Parameter(torch.zeros(1, tokens, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(Block(dim, heads, max(1, round(dim * mlp_ratio)), dropout, qkv_bias) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        self._init_weights()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, classes) for images (batch, channels, height, width)."""
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        if self.cls is not None:
            tokens = torch.cat([self.cls.expand(x.shape[0], -1, -1), tokens], dim=1)
        tokens = self.norm(self.blocks(self.dropout(tokens + self.positions)))
        pooled = tokens.mean(dim=1) if self.cls is None else tokens[:, 0]
        logits: Tensor = self.head(pooled)
        return logits

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                fan_in = module.weight[0].numel()
                nn.init.trunc_normal_(module.weight, std=0.02 if isinstance(module, nn.Linear) else fan_in**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.positions, std=0.5)  # half of what a patch contributes: with less, places are learnt late
        if self.cls is not None:
            nn.init.trunc_normal_(self.cls, std=0.02)


class Block(nn.Module):
    """One transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, qkv_bias: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, dropout, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (batch, tokens, dim) to the same shape."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Attention(nn.Module):
    """Multi-head self-attention with ONE Linear, of weight (3·dim, dim), for queries, keys and values."""

    def __init__(self, dim: int, heads: int, dropout: float, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (batch, tokens, dim) to the same shape."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim)
        out: Tensor = self.dropout(self.out(attended))
        return out


def _check_fit(size: tuple[int, int], image: int | None, patch: int, dim: int, heads: int) -> None:
    """Refuse images, patches and heads that do not go into one another."""
    height, width = size
    if height != width:
        raise ValueError(f"vit: images must be square, found {height}x{width} pixels; crop or resize the data.")
    if image is not None and image != height:
        raise ValueError(
            f"vit: image is {image!r}, but the data's images have {height}x{height} pixels; "
            f"leave image out to take the data's."
        )
    if height % patch:
        raise ValueError(
            f"vit: patch must divide the image's side, found patch {patch} for {height}x{height} pixels; "
            f"patch may be {', '.join(str(p) for p in range(1, height + 1) if height % p == 0)}."
        )
    if dim % heads:
        raise ValueError(f"vit: dim must be a multiple of heads, found dim {dim} and heads {heads}.")
