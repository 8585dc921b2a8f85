"""metrics.jsonl as columns of numbers: all that is in it, of whoever's making, also while it is being written."""

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import structs

from hpclr.files import open_regular
from hpclr.training.scores import METRICS

_LONGEST_LINE = 16 << 20  # bytes: a check of 100 000 layers
_FAULTS_NAMED = 20
MOST = 1e100  # to which axes have room for their arithmetic; nothing that training records comes near it
_COLUMNS = {
    "train": ("loss", "lr"),
    "valid": ("seconds", *METRICS),
    "check": (
        "seconds", "trainable", "stored", "dense", "gradient_bytes", "dense_gradient_bytes", "optimizer_bytes",
        "rank_share", "failures",
    ),
    "pace": ("steps", "seconds", "data", "check", "save", "valid", "memory"),
    "attempt": ("attempt", "world_size"),
}  # fmt: skip
_OF_LAYERS = ("ranks", "stability", "outside", "frozen")
_KNOWN = {*_COLUMNS, "save", "final", "gap"}

Point = tuple[float, float]


class _Line(msgspec.Struct):
    """A record, as far as all have it, and what the most of them have."""

    kind: str
    step: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    time: float | None = None
    loss: float | None = None
    lr: float | None = None


class Table:
    """Records of a kind, as columns of equal length; a value that is missing is NaN.

    Args:
        names: of the columns besides `step` and `time` (Unix time, seconds).
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.columns = {name: array("d") for name in ("step", "time", *names)}

    def __len__(self) -> int:
        return len(self.columns["step"])

    def __getitem__(self, name: str) -> "array[float]":
        return self.columns[name]

    def add(self, values: Mapping[str, Any]) -> None:
        """Takes a record.

        Raises:
            ValueError: if a number in it cannot be drawn; nothing of it is then taken.
        """
        numbers = [_as_number(name, values.get(name)) for name in self.columns]
        for column, number in zip(self.columns.values(), numbers, strict=True):
            column.append(number)

    def points(self, x: str, y: str) -> list[Point]:
        """Pairs in the order of x; those are left out of which either is not known."""
        pairs = [(a, b) for a, b in zip(self[x], self[y], strict=True) if a == a and b == b]  # NaN is not itself
        return pairs if all(a[0] <= b[0] for a, b in pairwise(pairs)) else sorted(pairs)


@dataclass
class Records:
    """What a metrics file holds.

    Attributes:
        tables: kind → its records.
        layers: what is known of layers (`ranks`, `stability`, `outside`, `frozen`) → layer → steps and values.
        faults: what is wrong with lines, in words.
        faulty: how many lines that are.
        lines: how many there are in all.
        lost: records that the run could not write, its disk being full.
        not_finite: losses that were not.
    """

    tables: dict[str, Table] = field(default_factory=lambda: {kind: Table(names) for kind, names in _COLUMNS.items()})
    layers: dict[str, dict[str, list[Point]]] = field(default_factory=lambda: {name: {} for name in _OF_LAYERS})
    faults: list[str] = field(default_factory=list)
    faulty: int = 0
    lines: int = 0
    lost: float = 0
    not_finite: int = 0

    @property
    def last_step(self) -> int:
        """The last step of which there is a record."""
        return int(max((step for table in self.tables.values() for step in table["step"]), default=0))

    def fault(self, text: str) -> None:
        """Notes a line that cannot be used."""
        self.faulty += 1
        if len(self.faults) < _FAULTS_NAMED:
            self.faults.append(text)


def read_records(path: Path) -> Records:
    """Reads a metrics file to where it ends now; one that is not there has no records.

    Raises:
        OSError: if it is there and cannot be read.
    """
    records = Records()
    for number, line in enumerate(_lines(path), start=1):
        records.lines = number
        try:
            _take(records, line)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            cut = "" if line.endswith(b"\n") else ", which is cut short"
            records.fault(f"line {number}{cut}: {error}")
    return records


def _lines(path: Path) -> Iterator[bytes]:
    """Lines, also of a file that has none: what is too long comes in pieces that end without a line feed."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        while line := file.readline(_LONGEST_LINE):
            yield line


def _take(records: Records, line: bytes) -> None:
    head = _head.decode(line)
    if head.kind == "train":  # nearly all are
        records.tables["train"].add(structs.asdict(head))
        records.not_finite += head.loss is None
    elif head.kind in _KNOWN:
        _take_other(records, head.kind, _any.decode(line))


_head = msgspec.json.Decoder(_Line)
_any = msgspec.json.Decoder(dict[str, Any])


def _take_other(records: Records, kind: str, values: dict[str, Any]) -> None:
    of_layers = {name: _of_layers(name, values.get(name)) for name in _OF_LAYERS} if kind == "check" else {}
    if kind in records.tables:
        records.tables[kind].add(values)
    for name, numbers in of_layers.items():
        for layer, number in numbers.items():
            records.layers[name].setdefault(layer, []).append((float(values["step"]), number))
    if kind == "gap":
        lost = _as_number("lost", values.get("lost"))
        records.lost += lost if lost == lost else 0


def _of_layers(name: str, values: object) -> dict[str, float]:
    """Layer → number, of those that have one."""
    numbers = {layer: _as_number(name, value) for layer, value in values.items()} if isinstance(values, dict) else {}
    return {layer: number for layer, number in numbers.items() if number == number}


def _as_number(name: str, value: object) -> float:
    """NaN if it is none; zero if it is next to that.

    Raises:
        ValueError: if it cannot be drawn.
    """
    if not isinstance(value, int | float):
        return math.nan
    if abs(value) > MOST:
        raise ValueError(f"{name} is beyond {MOST:g}, for which no axis has room")
    return 0.0 if abs(value) < 1 / MOST else float(value)
