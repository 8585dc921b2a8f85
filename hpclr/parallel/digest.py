"""A number that two tensors share if, and practically only if, they are equal to the bit.

The words of a tensor are multiplied by odd random numbers and summed modulo 2⁶⁴, in rows and then over the rows. Any
single changed word changes the sum, since odd numbers are invertible there. Sums of whole numbers do not
depend on their order, so that the number is the same on every device and for any number of threads. It
guards against mistakes and faults of the machine, not against an adversary.
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

_ROW = 1 << 14  # words that each have a weight of their own
_BLOCK = _ROW << 6  # words taken at a time
_SEED = 0x6F6961


def digest(tensors: Iterable[Tensor]) -> int:
    """One 64-bit number for tensors of any shapes and types, in this order."""
    result = 0
    for tensor in tensors:
        result = (result * 0x9E3779B97F4A7C15 + _digest(tensor) + 1) % 2**64
    return result


def _digest(tensor: Tensor) -> int:
    words = _words(tensor.detach())
    weights = _weights(words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for number, block in enumerate(words.split(_BLOCK)):
        block = block.to(torch.int64)
        block = block ^ ((block >> 32) & 0xFFFFFFFF)  # else an even number of changed signs would cancel modulo 2⁶⁴
        whole = block.numel() // _ROW * _ROW
        rows = (block[:whole].view(-1, _ROW) * weights).sum(1)
        rest = (block[whole:] * weights[: block.numel() - whole]).sum()
        total += ((rows * weights[: rows.numel()]).sum() + rest * weights[-1]) * (2 * number + 1)
    return (int(total) ^ tensor.numel()) % 2**64


def _words(tensor: Tensor) -> Tensor:
    """The bits of a tensor as whole numbers, one for each of its elements."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    of_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().reshape(-1).view(of_size[tensor.element_size()])


@functools.cache
def _weights(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    numbers = torch.randint(-(2**62), 2**62, (_ROW,), generator=generator)
    return (2 * numbers + 1).to(device)
