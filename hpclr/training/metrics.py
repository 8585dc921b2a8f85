"""metrics.jsonl: one line a record, rewound to the checkpoint when a run continues."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpclr.files import write_whole
from hpclr.training.progress import Display


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


class LossLog:
    """Losses of steps, left on the device until several can be fetched at once.

    Args:
        metrics: where they are recorded.
        shown: where they are shown.
        every: how many to gather; 1 on a CPU, where fetching costs nothing.
    """

    def __init__(self, metrics: MetricsFile, shown: Display, every: int) -> None:
        self._metrics, self._shown, self._every = metrics, shown, every
        self._waiting: list[tuple[int, Tensor, dict[str, Any]]] = []

    def add(self, step: int, loss: Tensor, **values: Any) -> None:
        """Takes the loss of a step, a tensor without dimensions."""
        self._waiting.append((step, loss, values))

    @property
    def full(self) -> bool:
        """Whether it is time to flush."""
        return len(self._waiting) >= self._every

    def flush(self) -> tuple[int, float] | None:
        """Records and shows what is waiting; returns the first step whose loss is not finite, and that loss."""
        if not self._waiting:
            return None
        losses = torch.stack([loss for _, loss, _ in self._waiting]).tolist()
        entries, self._waiting = self._waiting, []
        for (step, _, values), loss in zip(entries, losses, strict=True):
            self._metrics.append("train", step, loss=loss, **values)
            if not math.isfinite(loss):
                return step, loss
        self._shown.step(entries[-1][0], losses[-1])
        return None


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
