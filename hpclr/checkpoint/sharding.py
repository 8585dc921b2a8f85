"""From the pieces of sharded tensors, one a process, to what their parts and the index of these hold."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from hpclr.checkpoint.parts import PartReport, PieceReport
from hpclr.checkpoint.tree import Json, Piece, TreeLike, dtype_name, show_keys

Keys: TypeAlias = tuple[str, ...]
IndexLike: TypeAlias = Mapping[str, "IndexLike | torch.Tensor | Json | Piece | Sharded"]


@dataclass(frozen=True, eq=False)
class Sharded:
    """A leaf that tells where the rows of a tensor are.

    Attributes:
        dtype: torch's name of the tensor's type.
        shape: of the whole tensor.
        table: (pieces, 5), int64, the rows in order: part, first row, rows, byte of the part, crc32.
    """

    dtype: str
    shape: tuple[int, ...]
    table: torch.Tensor


def pieces_in(tree: TreeLike) -> list[tuple[Keys, Piece]]:
    """All pieces, in the order of the tree.

    Raises:
        ValueError: one does not fit the tensor that it says it is of.
    """
    found = list(_pieces_in(tree, ()))
    for keys, piece in found:
        _check(keys, piece)
    return found


def _pieces_in(tree: TreeLike, keys: Keys) -> Iterator[tuple[Keys, Piece]]:
    for key, node in tree.items():
        if isinstance(node, Piece):
            yield (*keys, key), node
        elif isinstance(node, Mapping):
            yield from _pieces_in(node, (*keys, key))


def _check(keys: Keys, piece: Piece) -> None:
    rows, others = piece.tensor.shape[:1], piece.tensor.shape[1:]
    if not rows or not piece.shape or others != tuple(piece.shape[1:]):
        found = f"{tuple(piece.tensor.shape)} of {tuple(piece.shape)}"
        raise ValueError(f"{show_keys(keys)}: expected rows of a tensor, which differ in the first axis, found {found}")
    if not 0 <= piece.offset <= piece.offset + rows[0] <= piece.shape[0]:
        raise ValueError(
            f"{show_keys(keys)}: expected rows among the {piece.shape[0]} of the tensor, "
            f"found {piece.offset} to {piece.offset + rows[0]}"
        )


def part_tree(pieces: Sequence[tuple[Keys, Piece]]) -> TreeLike:
    """The tree that a part holds: the rows that its process has, under the keys of their tensors."""
    tree: dict[str, Any] = {}
    for keys, piece in pieces:
        if piece.tensor.numel():
            group = tree
            for key in keys[:-1]:
                group = group.setdefault(key, {})
            group[keys[-1]] = piece.tensor
    return tree


def index_tree(tree: TreeLike, reports: Sequence[PartReport], step: int) -> IndexLike:
    """The tree that the index holds: where the rows are in place of the pieces.

    Args:
        tree: of the first process.
        reports: of all processes, in their order.
        step: optimiser steps done.

    Raises:
        ValueError: the reports do not belong together, or their rows do not make up every tensor exactly once.
    """
    pieces = pieces_in(tree)
    if pieces or reports:
        _check_reports(pieces, reports, step)
    leaves = {keys: _leaf(keys, piece, reports, number) for number, (keys, piece) in enumerate(pieces)}
    return _replaced(tree, (), leaves)


def _check_reports(pieces: Sequence[tuple[Keys, Piece]], reports: Sequence[PartReport], step: int) -> None:
    found = [(report.step, report.process, report.processes) for report in reports]
    if not reports or found != [(step, process, len(reports)) for process in range(len(reports))]:
        said = ", ".join(f"{process} of {processes} at step {at}" for at, process, processes in found) or "none"
        raise ValueError(f"expected the parts of all processes at step {step}, in their order, found {said}")
    expected = [(keys, dtype_name(piece.tensor.dtype), tuple(piece.shape)) for keys, piece in pieces]
    for report in reports:
        listed = [(piece.keys, piece.dtype, piece.shape) for piece in report.pieces]
        if listed != expected:
            raise ValueError(_difference(report.process, expected, listed))


def _difference(process: int, expected: Sequence[tuple[Any, ...]], found: Sequence[tuple[Any, ...]]) -> str:
    longest = max(len(expected), len(found))
    padded = [[*listed, *[None] * (longest - len(listed))] for listed in (expected, found)]
    ours, theirs = next((a, b) for a, b in zip(*padded, strict=True) if a != b)
    said = [f"{show_keys(tensor[0])} ({tensor[1]}, {tensor[2]})" if tensor else "no more" for tensor in (ours, theirs)]
    return f"expected the same sharded tensors on every process, found {said[0]} on process 0, {said[1]} on {process}"


def _leaf(keys: Keys, piece: Piece, reports: Sequence[PartReport], number: int) -> "Sharded | torch.Tensor":
    if 0 in piece.shape:
        return torch.empty(piece.shape, dtype=piece.tensor.dtype)  # there are no rows to be anywhere
    found = [(report.process, report.pieces[number]) for report in reports]
    ordered = sorted((item for item in found if item[1].rows), key=lambda item: item[1].offset)
    _check_rows(keys, piece.shape[0], ordered)
    table = [[process, part.offset, part.rows, part.place, part.crc32] for process, part in ordered]
    return Sharded(dtype_name(piece.tensor.dtype), tuple(piece.shape), torch.tensor(table))


def _check_rows(keys: Keys, count: int, ordered: Sequence[tuple[int, PieceReport]]) -> None:
    """Every row of a tensor must be in one part."""
    end = 0
    for process, piece in ordered:
        if piece.offset != end:
            rows = f"{piece.offset} to {piece.offset + piece.rows} of process {process}"
            raise ValueError(f"{show_keys(keys)}: expected row {end} next, each once, found the rows {rows}")
        end += piece.rows
    if end != count:
        raise ValueError(f"{show_keys(keys)}: expected {count} rows from all processes together, found {end}")


def _replaced(tree: TreeLike, keys: Keys, leaves: Mapping[Keys, "Sharded | torch.Tensor"]) -> IndexLike:
    replaced: dict[str, Any] = {}
    for key, node in tree.items():
        here = (*keys, key)
        is_group = isinstance(node, Mapping)
        replaced[key] = _replaced(node, here, leaves) if is_group else leaves.get(here, node)  # type: ignore[arg-type]
    return replaced
