"""A JSON value and tensors as one row of bytes, so that one message carries them all and no bit is changed."""

import json
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; the start of each part, for views as any number type
_HEADER = 8  # bytes: the length of the JSON text


def pack(value: Any, tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Value and tensors as uint8 (n,) on a device."""
    facts = [(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for t in tensors]
    text = json.dumps([value, facts]).encode()
    head = len(text).to_bytes(_HEADER, "little") + text
    parts = [torch.frombuffer(bytearray(_padded(head)), dtype=torch.uint8).to(device)]
    for tensor in tensors:
        raw = tensor.detach().to(device).resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        parts += [raw, raw.new_zeros(-raw.numel() % _ALIGNMENT)]
    return torch.cat(parts)


def unpack(buffer: Tensor) -> tuple[Any, list[Tensor]]:
    """What `pack` packed; the tensors own their memory."""
    length = int.from_bytes(bytes(buffer[:_HEADER].tolist()), "little")
    value, facts = json.loads(buffer[_HEADER : _HEADER + length].cpu().numpy().tobytes())
    first = _HEADER + length + (-(_HEADER + length) % _ALIGNMENT)
    tensors = []
    for name, shape in facts:
        dtype = getattr(torch, name)
        size = prod(shape) * dtype.itemsize
        tensors.append(buffer[first : first + size].clone().view(dtype).reshape(shape))
        first += size + (-size % _ALIGNMENT)
    return value, tensors


def _padded(raw: bytes) -> bytes:
    return raw + b"\0" * (-len(raw) % _ALIGNMENT)
