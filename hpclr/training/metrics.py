"""metrics.jsonl: one line a record, rewound to the checkpoint when a run continues."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpclr.files import write_whole


class MetricsFile:
    """Appends records; a record has a `kind` and the `step` after which it was taken.

    Args:
        path: the file; made when the first record comes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, kind: str, step: int, **values: Any) -> None:
        """Writes one record."""
        line = json.dumps({"kind": kind, "step": step} | {k: _plain(v) for k, v in values.items()})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def rewind(self, step: int) -> None:
        """Drops what was recorded after this step, and a line that a crash cut short."""
        if not self._path.exists():
            return
        kept = [record for record in read_metrics(self._path) if record["step"] <= step and record["kind"] != "final"]
        write_whole(self._path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file; a last line cut short is passed over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: they are written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
