"""metrics.jsonl: one line a record, rewound to the checkpoint when a run continues."""

import errno
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from hpclr.files import write_whole
from hpclr.output import say
from hpclr.track.records import record_of
from hpclr.training.run_directory import writing

_MOST_WAITING = 100_000  # lines, some 20 MB


class MetricsFile:
    """Appends records; a record has a `kind`, the `step` after which it was taken, and the `time` (Unix, seconds).

    Args:
        path: the file; made when the first record comes. None, as on all processes but the first: nothing is recorded.
        show: is given every record, whether or not it can be written.
    """

    def __init__(self, path: Path | None, show: Callable[[Mapping[str, Any]], None] = lambda record: None) -> None:
        self._path, self._show = path, show
        self._waiting: list[bytes] = []  # lines that could not be written yet
        self._lost = 0

    def append(self, kind: str, step: int, **values: Any) -> None:
        """Writes one record; where it cannot be written, it is kept, and written with a later one."""
        if self._path is None:
            return
        had_trouble, record = bool(self._waiting), {"kind": kind, "step": step, "time": now(), **values}
        self._show(record)
        self._waiting.append(_line(record))
        try:
            self._write(self._path)
        except OSError as error:
            if not had_trouble:
                say(f"hpclr: warning: {self._path} cannot be written: {error}. Its records are kept for later.")
            self._forget_some(step)

    def settle(self) -> None:
        """Writes what could not be written before.

        Raises:
            HpclrError: as `writing`.
        """
        if self._path is not None and self._waiting:
            with writing(self._path.parent):
                self._write(self._path)

    def _write(self, path: Path) -> None:
        """Writes all that waits, or leaves the file as it was."""
        with path.open("ab", buffering=0) as file:
            end, lines = os.fstat(file.fileno()).st_size, b"".join(self._waiting)
            try:
                if file.write(lines) < len(lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise
        self._waiting.clear()

    def _forget_some(self, step: int) -> None:
        """A disk that stays full must not fill the memory too; the gap is recorded."""
        if len(self._waiting) > _MOST_WAITING:
            self._lost += _MOST_WAITING // 2 - (self._lost > 0)  # one of them may be the record of an earlier gap
            self._waiting[: _MOST_WAITING // 2] = [_line({"kind": "gap", "step": step, "lost": self._lost})]

    def rewind(self, step: int) -> None:
        """Drops what was recorded after this step, and a line that a crash cut short; that there were attempts stays.

        Raises:
            HpclrError: as `writing`.
        """
        if self._path is None or not self._path.exists():
            return
        with writing(self._path.parent):
            kept = (record for record in read_metrics(self._path) if _is_kept(record, step))
            write_whole(self._path, b"".join(map(_line, kept)))


class LossLog:
    """Losses of steps, left on the device until several can be fetched at once.

    Args:
        metrics: where they are recorded.
        every: how many to gather; 1 on a CPU, where fetching costs nothing.
        total: sums over all processes what each has of the losses (n,).
    """

    def __init__(self, metrics: MetricsFile, every: int, total: Callable[[Tensor], Tensor]) -> None:
        self._metrics, self._every, self._total = metrics, every, total
        self._waiting: list[tuple[int, Tensor, dict[str, Any]]] = []

    def add(self, step: int, loss: Tensor, **values: Any) -> None:
        """Takes the loss of a step, or this process's part of it: a tensor without dimensions."""
        self._waiting.append((step, loss, {"time": now(), **values}))

    @property
    def full(self) -> bool:
        """Whether it is time to flush."""
        return len(self._waiting) >= self._every

    def flush(self) -> tuple[int, float] | None:
        """Records what is waiting; returns the first step whose loss is not finite, and that loss."""
        if not self._waiting:
            return None
        losses = self._total(torch.stack([loss for _, loss, _ in self._waiting])).tolist()
        entries, self._waiting = self._waiting, []
        for (step, _, values), loss in zip(entries, losses, strict=True):
            self._metrics.append("train", step, loss=loss, **values)
            if not math.isfinite(loss):
                return step, loss
        return None


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file; a line that is none, as one cut short, is passed over."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if (record := record_of(line)) is not None:
                yield record


def now() -> float:
    """Unix time in seconds, to the millisecond."""
    return round(time.time(), 3)


def _is_kept(record: Mapping[str, Any], step: int) -> bool:
    kind: str = record["kind"]
    return kind == "attempt" or (kind != "final" and bool(record["step"] <= step))


def _line(record: dict[str, Any]) -> bytes:
    """One record; NaN and infinities, which JSON does not have, become null."""
    return msgspec.json.encode(record) + b"\n"
