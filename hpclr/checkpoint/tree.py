"""What a checkpoint is before it becomes a file: a nested tree, its JSON leaves and its key names."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch  # loaded late: a file is examined without it

Tree: TypeAlias = dict[str, "Tree | torch.Tensor | Json"]
TreeLike: TypeAlias = Mapping[str, "TreeLike | torch.Tensor | Json | Piece"]
"""What is saved: a `Tree` is what comes back, with every tensor whole."""

MAX_DEPTH = 32
"""Groups may be nested this deep; a JSON value likewise."""

_NON_FINITE = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
_FLOAT_KEY = "$float"


@dataclass(frozen=True)
class Json:
    """A leaf that is no tensor: None, bool, int of any size, float, str, or lists and dicts of these."""

    value: Any


@dataclass(frozen=True, eq=False)
class Piece:
    """A leaf that is one process's rows of a tensor, whose others have the rest.

    Attributes:
        tensor: the rows, of shape (rows, *shape[1:]); there may be none.
        offset: the first of them in the whole tensor.
        shape: of the whole tensor.
    """

    tensor: "torch.Tensor"
    offset: int
    shape: tuple[int, ...]


def encode_json(value: Any, where: str) -> bytes:
    """Standard JSON in UTF-8 of a value; `nan` and `inf`, unknown to JSON, as `{"$float": "nan"}`.

    Raises:
        TypeError: a value or a key that JSON does not give back as it was (a tuple, an int key).
        ValueError: a value nested too deep, the reserved key `$float`, or a string outside Unicode.
    """
    plain = _to_plain(value, where, MAX_DEPTH)
    try:
        text = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8")
    except ValueError as error:  # a lone surrogate, or an int beyond Python's limit of digits
        raise ValueError(f"{where}: expected a value that JSON can hold, found one that it cannot: {error}") from error


def decode_json(data: bytes) -> Any:
    """The value that `encode_json` was given.

    Raises:
        ValueError: the bytes are not such JSON (also RecursionError, when nested without end).
    """
    return json.loads(data.decode("utf-8"), object_pairs_hook=_from_pairs, parse_constant=_refuse_constant)


def dtype_name(dtype: "torch.dtype") -> str:
    """`float32` for torch.float32: how a file spells it."""
    return str(dtype).removeprefix("torch.")


def show_keys(keys: Sequence[str]) -> str:
    """The way to something in the tree, as messages spell it."""
    return "/" + "/".join(keys)


def quote_name(name: str) -> str:
    """An HDF5 link name for a key: `%`, `/` and NUL as %25, %2F and %00, `.` as %2E, the empty key as `%`."""
    if name in ("", "."):
        return "%2E" if name else "%"
    return re.sub(r"[%/\0]", lambda match: f"%{ord(match[0]):02X}", name)


def unquote_name(link: str) -> str:
    """The key that `quote_name` was given.

    Raises:
        ValueError: `quote_name` does not write such a link.
    """
    name = "" if link == "%" else re.sub(r"%(25|2F|00|2E)", lambda match: chr(int(match[1], 16)), link)
    if quote_name(name) != link:
        raise ValueError(f"{link!r} is not the name of a key, the nearest is {quote_name(name)!r}")
    return name


def _to_plain(value: Any, where: str, depth: int) -> Any:
    if depth < 0:
        raise ValueError(f"{where}: expected JSON nested at most {MAX_DEPTH} deep, found more; flatten it")
    if isinstance(value, float):
        return _plain_float(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list):
        return [_to_plain(item, where, depth - 1) for item in value]
    if isinstance(value, dict):
        return {_checked_key(key, where): _to_plain(item, where, depth - 1) for key, item in value.items()}
    raise TypeError(
        f"{where}: expected None, bool, int, float, str, list or dict in a Json value, found {type(value).__name__}; "
        "convert it first (a tuple to a list, an array to a tensor of its own)"
    )


def _plain_float(value: float) -> Any:
    if value - value == 0:  # finite
        return float(value)
    return {_FLOAT_KEY: "nan" if value != value else f"{float(value)}"}


def _checked_key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{where}: expected keys of type str in a Json dict, found {key!r} ({type(key).__name__})")
    if key == _FLOAT_KEY:
        raise ValueError(f"{where}: the key {_FLOAT_KEY!r} is reserved for floats that JSON lacks; rename the key")
    return key


def _from_pairs(pairs: list[tuple[str, Any]]) -> Any:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"a key occurs twice among {[key for key, _ in pairs]}")
    if _FLOAT_KEY not in value:
        return value
    name = str(value[_FLOAT_KEY])
    if len(value) > 1 or name not in _NON_FINITE:
        raise ValueError(f"{_FLOAT_KEY} stands beside other keys, or for none of {list(_NON_FINITE)}")
    return _NON_FINITE[name]


def _refuse_constant(token: str) -> Any:
    raise ValueError(f"{token} is not standard JSON")
