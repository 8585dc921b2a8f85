"""Names of the runs of a sweep: made of what the sweep says of a run, and of nothing else.

So they stay when values are added or put into another order. Two runs never share one: a name can be read back into
keys and values, since words begin with a letter, numbers with a digit or a sign, and 0x is a checksum of anything else.
"""

import functools
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from hpclr.config import RunFile, describe

_LONGEST = 100  # characters; a run's name may have 128
_WORD = re.compile("(?!(?:null|true|false)$)[A-Za-z][A-Za-z0-9.]*")
_KEY = re.compile("[A-Za-z][A-Za-z0-9._]*")


def run_name(sweep: str, values: Mapping[str, Any]) -> str:
    """The name of a run, such as "sweep-lr-0.001-seed-1".

    Args:
        sweep: the name of the sweep.
        values: keys such as "optimizer.lr" and their values, in any order.
    """
    words = [word for key in sorted(values) for word in (_label(key), _text(values[key]))]
    name = "-".join([sweep, *words])
    return name if len(name) <= _LONGEST else f"{sweep}-{_checksum(words)}"


def _label(key: str) -> str:
    """The key, without its section where no other section has such a key; of `section.name`, the section."""
    section, _, rest = key.partition(".")
    if rest == "name":
        return section
    if _sections_with()[rest] == 1:
        return rest
    return key if _KEY.fullmatch(key) else _checksum(key)


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return describe.show(value)
    if _is_number(value):
        return _number(value)
    if isinstance(value, (list, tuple)) and value and all(map(_is_number, value)):
        return "_".join(map(_number, value)) + "_" * (len(value) == 1)  # [64] is not 64
    return value if isinstance(value, str) and _WORD.fullmatch(value) else _checksum(value)


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _number(value: float) -> str:
    return repr(value).replace("+", "")  # 1e+30


def _checksum(value: Any) -> str:
    return f"0x{hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]}"


@functools.cache
def _sections_with() -> Counter[str]:
    """How many sections of a run file have a key."""
    sections = describe.fields(RunFile).values()
    keys = [{key for kind in describe.kinds(section.type) for key in describe.fields(kind)} for section in sections]
    return Counter(key for found in keys for key in found)
