"""Where the rows of sharded tensors are, as an index says: what it may say."""

from typing import Any

import msgspec
import numpy as np

from hpclr.checkpoint.parts import Part

MAX_PARTS = 1 << 16


def parts_of_json(text: bytes) -> tuple[Part, ...]:
    """The parts that an index lists.

    Raises:
        ValueError: they are not described as they should be, or there are none or too many.
    """
    listed = msgspec.json.decode(text, type=tuple[Part, ...])
    if not 1 <= len(listed) <= MAX_PARTS:
        raise ValueError(f"{len(listed)} parts, where 1 to {MAX_PARTS} may be")
    return listed


def fault_of_table(table: np.ndarray[Any, Any], count: int, row_bytes: int, sizes: list[int]) -> tuple[str, str] | None:
    """What is wrong with the table of a sharded tensor, as what was expected and what was found.

    Args:
        table: as `sharding.Sharded` has it.
        count: rows of the tensor.
        row_bytes: bytes of each of them.
        sizes: bytes of each part.
    """
    part, first, rows, place, _ = table.T
    if part.min() < 0 or part.max() >= len(sizes):
        return f"parts of numbers below {len(sizes)}", f"{part.min()} to {part.max()}"
    if min(rows.min() - 1, first.min()) < 0 or max(rows.max(), first.max()) > count:
        return f"rows among the {count} of the tensor", f"{rows.min()} to {rows.max()} from {first.min()} on"
    ends = np.concatenate([[0], first + rows])
    if (ends[:-1] != first).any() or ends[-1] != count:
        return f"the rows 0 to {count}, each once and in order", "gaps, overlaps or others"
    room = np.array(sizes)[part] - rows * row_bytes
    if place.min() < 0 or (place > room).any():
        return "rows that lie in their part", f"bytes from {place.min()} to {(place + rows * row_bytes).max()}"
    return None
