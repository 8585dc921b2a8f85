"""metrics.jsonl as its readers see it: a file that grows, may be cut at its end, and is replaced on rewinding."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from hpclr.files import open_regular

Record = dict[str, Any]

_CHUNK = 4 << 20  # bytes read at once; a line that is longer is no record
_NO_STEP = 2**62  # what is not below it no counter can come to
_TRAIN = b'{"kind":"train"'  # how a record of a step begins


def record_of(line: bytes) -> Record | None:
    """The record in a line; None if that holds none, as one cut short."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        record = msgspec.json.decode(line, type=Record)
        if isinstance(record.get("step"), int) and isinstance(record.get("kind"), str):
            return record if 0 <= record["step"] < _NO_STEP else None
    return None


def without_most_steps(lines: list[bytes]) -> list[bytes]:
    """Lines for whoever wants to know how a run is, not how it went: of those of steps only the last."""
    last = next((number for number in reversed(range(len(lines))) if lines[number].startswith(_TRAIN)), None)
    return [line for number, line in enumerate(lines) if number == last or not line.startswith(_TRAIN)]


class Tail:
    """Reads a metrics file from its beginning, and on as it grows.

    Args:
        path: the file, which need not be there yet.

    Attributes:
        restarts: how many times reading has begun anew, since the file was replaced or had become shorter.
        fault: why the file could not be read the last time; "" if it could, or is not there yet.
    """

    def __init__(self, path: Path) -> None:
        self.restarts, self.fault = 0, ""
        self._path, self._at = path, 0
        self._identity: tuple[int, int] | None = None

    def read(self) -> list[bytes]:
        """The next whole lines, some megabytes at most; none if there are no more yet, or the file cannot be read."""
        self.fault = ""
        try:
            with open_regular(self._path) as file:
                return self._next_lines(file)
        except FileNotFoundError:
            return []
        except OSError as error:
            self.fault = error.strerror or str(error)
            return []

    def _next_lines(self, file: BinaryIO) -> list[bytes]:
        self._look_for_another(file)
        file.seek(self._at)
        content = file.read(_CHUNK)
        end = content.rfind(b"\n") + 1
        if end == 0 and len(content) == _CHUNK:
            end = _CHUNK
        self._at += end
        return content[:end].splitlines()

    def _look_for_another(self, file: BinaryIO) -> None:
        found = os.fstat(file.fileno())
        identity = (found.st_dev, found.st_ino)
        if self._identity is not None and (identity != self._identity or found.st_size < self._at):
            self._at = 0
            self.restarts += 1
        self._identity = identity
