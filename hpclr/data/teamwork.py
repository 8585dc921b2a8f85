"""Several processes read one source: block i is read by process i mod N, and the first process gets them in order."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from hpclr.data.layout import Array
from hpclr.data.readers import open_source
from hpclr.data.source import Block, Source, guarded

Every = Callable[[int, int], Iterator[Block]]


class Team(Protocol):
    """The processes, and how arrays get from one of them to the first."""

    rank: int
    size: int

    def send(self, arrays: Mapping[str, Array], note: Mapping[str, Any]) -> None:
        """To the first process, once that receives; waits until then."""

    def receive(self, rank: int) -> tuple[dict[str, Array], dict[str, Any]]:
        """What a process sends next; raises what that process failed with."""


def all_blocks(source: Source, part: str, team: Team | None) -> Iterator[Block]:
    """The blocks of a part in their order, for the first process; read by all, where the source can be divided."""
    every = source.parts[part].every
    blocks = source.parts[part].blocks() if team is None or every is None else _in_order(every, team)
    return guarded(blocks, _where(source, part))


def read_share(reader: str, path: Path | None, image_size: int | None, team: Team) -> None:
    """What every process but the first does: reads its blocks of every part, and sends them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first process says the same
        source = open_source(reader, path, image_size)
    for name, part in source.parts.items():
        if part.every is not None:
            for block in guarded(part.every(team.rank, team.size), _where(source, name)):
                team.send(block.arrays, {"file": str(block.file), "first": block.first})
            team.send({}, {})


def _where(source: Source, part: str) -> str:
    return f"{source.origin}, {part} split"


def _in_order(every: Every, team: Team) -> Iterator[Block]:
    own = every(0, team.size)
    for number in count():
        rank = number % team.size
        block = _received(team, rank) if rank else next(own, None)
        if block is None:
            break
        yield block
    for other in range(1, team.size):  # the first block that is not there was the last of its process: now the others
        if other != rank:
            _received(team, other)


def _received(team: Team, rank: int) -> Block | None:
    arrays, note = team.receive(rank)
    return Block(arrays, note["file"], note["first"]) if arrays else None
