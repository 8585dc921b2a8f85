"""Time series in CSV: one row a time step, numeric columns, perhaps a date in the first."""

import csv
import io
import warnings
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hpclr.data.layout import BLOCK_BYTES, Array, rows_in
from hpclr.data.source import Block, Part, Source, open_binary, reading
from hpclr.errors import UsageError

_TENTHS = (0, 7, 8, 10)  # of the rows: where training, validation and test begin and end
_LEAST_RESOLUTION = 32  # a typical change from row to row, in units of the mean error of rounding to float32


class _Table(NamedTuple):
    """How a file is to be read."""

    path: Path
    delimiter: str
    header: list[str]  # empty if the first line is data already
    skip: int  # columns before the numbers: 1 with a date, else 0
    width: int  # columns of numbers

    def cells(self, line: str) -> list[str]:
        """The columns of a line, those before the numbers included."""
        return next(csv.reader([line.strip("\r\n")], delimiter=self.delimiter)) or [""]

    def name(self, column: int) -> str:
        """What to call a column, counted with those before the numbers."""
        return self.header[column] if self.header else str(column)


def read(path: Path) -> Source:
    """A CSV file, gzipped or xz-compressed or neither, split 70/10/20 in time.

    Raises:
        UsageError: for a file without rows of numbers; while reading, with the row and column of what is no number.
    """
    with reading(path):
        table = _table(path)
        count = sum(1 for _ in _lines(table))
    if count < 10:
        raise UsageError(f"{path}: expected at least 10 rows to split 70/10/20 in time, found {count}")
    bounds = [tenths * count // 10 for tenths in _TENTHS]
    splits = zip(("train", "valid", "test"), bounds, bounds[1:], strict=False)
    parts = {split: _part(table, first, last) for split, first, last in splits}
    names = table.header[table.skip :] or [str(column) for column in range(table.width)]
    return Source("forecasting", names, (table.width,), "float32", parts)


def _table(path: Path) -> _Table:
    plain = _Table(path, ",", [], 0, 0)
    first, second = [*islice(_lines(plain), 2), "", ""][:2]
    # numbers and dates hold neither tab nor semicolon, but perhaps a comma
    table = plain._replace(delimiter=next((sign for sign in "\t;" if sign in second), ","))
    head, row = table.cells(first), table.cells(second)
    skip = 1 if _is_date(row[0]) else 0
    is_data = _is_number(_without_commas(head[-1])) and (not skip or _is_date(head[0]))
    header = [] if is_data else head
    if len(row) <= skip or len(head) != len(row):
        raise UsageError(
            f"{path}: expected rows of numbers separated by comma, semicolon or tab, with or without a line of names "
            f"above and a date in front; found '{first[:60]}' and then '{second[:60]}'"
        )
    if head == [str(column) for column in range(len(head))] and is_data:
        raise UsageError(
            f"{path}: the first line '{first.strip()[:60]}' may be names of columns or data. Put a line of names above "
            "it, or in its place."
        )
    return table._replace(header=header, skip=skip, width=len(row) - skip)


def _lines(table: _Table) -> Iterator[str]:
    """The lines that hold data; empty ones do not count."""
    with io.TextIOWrapper(open_binary(table.path), encoding="utf-8-sig", errors="replace") as file:
        lines = (line for line in file if line.strip())
        yield from islice(lines, 1 if table.header else 0, None)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _without_commas(cell: str) -> str:
    return cell.replace(",", "")


def _is_date(cell: str) -> bool:
    """Whether a cell has digits but is no number, not even one with a decimal comma."""
    return any(sign.isdigit() for sign in cell) and not _is_number(_without_commas(cell))


def _part(table: _Table, first: int, last: int) -> Part:
    def blocks() -> Iterator[Block]:
        rows = rows_in(BLOCK_BYTES, (table.width,), 4)
        lines = islice(_lines(table), first, last)
        start = first
        while block := list(islice(lines, rows)):
            yield Block({"series": _numbers(block, table, start)}, table.path, start)
            start += len(block)

    return Part(last - first, blocks)


def _numbers(lines: list[str], table: _Table, start: int) -> Array:
    columns = range(table.skip, table.skip + table.width)
    if not any(_is_too_long(line, table) for line in lines):
        with suppress(ValueError):
            return _as_float32(
                np.loadtxt(
                    lines, np.float64, delimiter=table.delimiter, usecols=columns, ndmin=2, quotechar='"', comments=None
                ),
                table,
            )
    raise UsageError(f"{table.path}: {_first_fault(lines, table, start)}")


def _as_float32(values: Array, table: _Table) -> Array:
    """The rows (N, C) as they are stored, with a warning for columns whose changes do not survive that."""
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused later, by row
        rounded = values.astype(np.float32)
        changes = np.abs(np.diff(values, axis=0))
        change = changes.sum(axis=0) / np.maximum(1, np.count_nonzero(changes, axis=0))
        lost = np.abs(values - rounded).mean(axis=0) > change / _LEAST_RESOLUTION
    for column in np.flatnonzero(lost & (change > 0)).tolist():
        warnings.warn(
            f"{table.path}: the values of column '{table.name(column + table.skip)}' are too large for their changes: "
            "float32, in which series are kept, rounds these away or makes them coarse. Remove the column if it is a "
            "time stamp, else subtract a constant from it.",
            stacklevel=2,
        )
    return rounded


def _is_too_long(line: str, table: _Table) -> bool:
    """Whether a row has more columns than the first, which numpy would leave out without a word."""
    width = table.skip + table.width
    return line.count(table.delimiter) >= width and len(table.cells(line)) > width


def _first_fault(lines: list[str], table: _Table, start: int) -> str:
    """Where the fast reading failed, and on what."""
    width = table.skip + table.width
    for row, line in enumerate(lines, start):
        cells = table.cells(line)
        if len(cells) != width:
            return f"data row {row} (from 0) has {len(cells)} columns, expected {width}. Repair or remove the row."
        for column, cell in enumerate(cells[table.skip :], table.skip):
            if not _is_number(cell):
                where = f"column '{table.name(column)}' of data row {row} (from 0)"
                return f"{where}: expected a number, found '{cell[:40]}'. {_remedy(cell)}"
    return "a row could not be read as numbers"


def _remedy(cell: str) -> str:
    if _is_number(_without_commas(cell)):
        return "Write decimals with a point, and no sign between thousands."
    return "Fill in or remove rows with missing values; remove columns without numbers."
