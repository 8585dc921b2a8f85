"""Factors drawn at random, of the size of a weight.

The draw depends on the weight alone, so that it is the same whichever process makes it, and follows from the seed.
"""

from hashlib import sha256

import torch
from torch import Tensor

from hpclr.lowrank.factors import SVD, FactorizationError, working_dtype
from hpclr.methods.regularizers import squared_norm


def random_factors(weight: Tensor) -> SVD:
    """Orthonormal factors drawn at random, with s ~ N(0, 1) times what gives the weight's Frobenius norm.

    Raises:
        FactorizationError: if the weight (m×n) is not finite.
    """
    work, generator = _prepared(weight)
    (m, n), r = work.shape, min(work.shape)
    u, v, s = (torch.randn(*size, dtype=work.dtype, generator=generator) for size in ((m, r), (n, r), (r,)))
    s *= torch.linalg.vector_norm(work) / torch.linalg.vector_norm(s)
    return SVD(*(part.to(weight.device) for part in (torch.linalg.qr(u).Q, s, torch.linalg.qr(v).Q.mT.contiguous())))


def random_product(weight: Tensor, rank: int) -> SVD:
    """A (m×k) and B (k×n) with independent normal entries, and between them what gives the weight's Frobenius norm.

    So the entries of the product have the variance of those of the weight, and signals the size for which it was
    initialised.

    Raises:
        FactorizationError: if the weight (m×n) is not finite.
    """
    work, generator = _prepared(weight)
    m, n = work.shape
    a = torch.randn(m, rank, dtype=work.dtype, generator=generator) / m**0.5
    b = torch.randn(rank, n, dtype=work.dtype, generator=generator) / n**0.5
    s = (torch.linalg.vector_norm(work) / squared_norm(a, b).sqrt()).repeat(rank)
    return SVD(*(part.to(weight.device) for part in (a, s, b)))


def _prepared(weight: Tensor) -> tuple[Tensor, torch.Generator]:
    """The weight on the CPU, and a generator seeded by its contents."""
    work = weight.to("cpu", working_dtype(weight.dtype))
    if not torch.isfinite(work).all():
        raise FactorizationError(f"a {work.shape[0]}×{work.shape[1]} matrix has entries that are not finite")
    digest = sha256(work.contiguous().numpy().tobytes()).digest()
    return work, torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
