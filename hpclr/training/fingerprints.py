"""Fingerprints of the weights under adapters: on another base of the same shapes an adapter is worth nothing.

A weight is known by digests of its bytes, in its own type and, of a wider one, rounded to 16 bits: so that a copy of
the base in bfloat16 or float16, or one in a wider type, is still known to be of the same numbers.
"""

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Annotated, NamedTuple

import msgspec
import torch
from torch import Tensor

_NARROW = (torch.bfloat16, torch.float16)


class Fingerprint(msgspec.Struct, frozen=True):
    """Of one weight: its type, and digests by type."""

    dtype: Annotated[str, msgspec.Meta(pattern="^(float64|float32|bfloat16|float16)$")]
    digests: dict[str, str]


class Compared(NamedTuple):
    """Names of weights that are not those of the fingerprints, and of those that are, rounded to another type."""

    others: list[str]
    rounded: list[str]


def fingerprints(weights: Mapping[str, Tensor]) -> str:
    """The fingerprints of weights by their names, as JSON."""
    return json.dumps({name: msgspec.to_builtins(_fingerprint(weight)) for name, weight in weights.items()})


def compare(text: str, weights: Mapping[str, Tensor]) -> Compared:
    """Compares a model's weights with fingerprints.

    Args:
        text: as `fingerprints` gave them.
        weights: by name; they may be of other types than those were.

    Raises:
        ValueError: if the text is no such JSON.
    """
    known = msgspec.json.decode(text, type=dict[str, Fingerprint])
    found = dict(_compared(known, weights))
    rounded = [name for name, same in found.items() if same and _name(weights[name]) != known[name].dtype]
    return Compared([name for name, same in found.items() if not same], rounded)


def _compared(known: Mapping[str, Fingerprint], weights: Mapping[str, Tensor]) -> Iterator[tuple[str, bool]]:
    for name, expected in known.items():
        if name not in weights:
            continue
        weight = weights[name]
        if _name(weight) not in expected.digests:  # of a wider type, perhaps
            weight = weight.to(getattr(torch, expected.dtype))
        yield name, expected.digests.get(_name(weight)) == _digest(weight)


def _fingerprint(weight: Tensor) -> Fingerprint:
    narrow = [weight.to(dtype) for dtype in _NARROW] if weight.dtype.itemsize > 2 else []
    single = [weight.float()] if weight.dtype == torch.float64 else []
    return Fingerprint(_name(weight), {_name(one): _digest(one) for one in (weight, *single, *narrow)})


def _digest(weight: Tensor) -> str:
    plain = weight.detach().cpu().contiguous().view(torch.uint8)
    return sha256(plain.numpy().data).hexdigest()[:32]


def _name(weight: Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")
