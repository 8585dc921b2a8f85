"""metrics.jsonl: one line a record, rewound to the checkpoint when a run continues."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from hpclr.files import write_whole
from hpclr.training.progress import Display
from hpclr.training.run_directory import writing


class MetricsFile:
    """Appends records; a record has a `kind` and the `step` after which it was taken.

    Args:
        path: the file; made when the first record comes. None, as on all processes but the first: nothing is recorded.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def append(self, kind: str, step: int, **values: Any) -> None:
        """Writes one record.

        Raises:
            HpclrError: as `writing`.
        """
        if self._path is None:
            return
        with writing(self._path.parent), self._path.open("ab") as file:
            file.write(_line({"kind": kind, "step": step, **values}))

    def rewind(self, step: int) -> None:
        """Drops what was recorded after this step, and a line that a crash cut short.

        Raises:
            HpclrError: as `writing`.
        """
        if self._path is None or not self._path.exists():
            return
        with writing(self._path.parent):
            kept = [
                record for record in read_metrics(self._path) if record["step"] <= step and record["kind"] != "final"
            ]
            write_whole(self._path, b"".join(map(_line, kept)))


class LossLog:
    """Losses of steps, left on the device until several can be fetched at once.

    Args:
        metrics: where they are recorded.
        shown: where they are shown.
        every: how many to gather; 1 on a CPU, where fetching costs nothing.
        total: sums over all processes what each has of the losses (n,).
    """

    def __init__(self, metrics: MetricsFile, shown: Display, every: int, total: Callable[[Tensor], Tensor]) -> None:
        self._metrics, self._shown, self._every, self._total = metrics, shown, every, total
        self._waiting: list[tuple[int, Tensor, dict[str, Any]]] = []

    def add(self, step: int, loss: Tensor, **values: Any) -> None:
        """Takes the loss of a step, or this process's part of it: a tensor without dimensions."""
        self._waiting.append((step, loss, values))

    @property
    def full(self) -> bool:
        """Whether it is time to flush."""
        return len(self._waiting) >= self._every

    def flush(self) -> tuple[int, float] | None:
        """Records and shows what is waiting; returns the first step whose loss is not finite, and that loss."""
        if not self._waiting:
            return None
        losses = self._total(torch.stack([loss for _, loss, _ in self._waiting])).tolist()
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
    with path.open("rb") as file:
        for line in file:
            try:
                yield msgspec.json.decode(line)
            except msgspec.DecodeError:
                continue


def _line(record: dict[str, Any]) -> bytes:
    """One record; NaN and infinities, which JSON does not have, become null."""
    return msgspec.json.encode(record) + b"\n"
