"""One question to all processes, one verdict for all: rank 0 hears every process, and every process hears rank 0."""

import contextlib
import json
import time
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpclr.errors import HpclrError, RetryableError, error_of
from hpclr.parallel.meeting.layout import Layout

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_PAUSE = 0.01
_GRACE = 5.0  # seconds that rank 0 may need to tell the others what it found
_STALE = 24 * 3600.0


def consult(
    store: "Store",
    layout: Layout,
    topic: str,
    card: dict[str, Any],
    judge: Callable[[list[dict[str, Any]]], Any],
    timeout: float,
) -> Any:
    """Every process hands in a card, rank 0 judges them all, and every process gets the same verdict.

    Args:
        store: shared by all.
        layout: which process this is.
        topic: used once, for messages too.
        card: JSON values of this process.
        judge: called on rank 0 with the cards by rank; gives a JSON value, or raises an HpclrError for all.
        timeout: seconds to wait for the others.

    Raises:
        HpclrError: as `judge`, on all processes.
        RetryableError: if a process does not hand in its card, naming it.
    """
    from torch.distributed import DistNetworkError

    prefix = f"hpclr/{topic}"
    try:
        store.set(f"{prefix}/{layout.rank}", json.dumps(card))
        if layout.rank == 0:
            verdict = _judge(store, layout, topic, judge, timeout)
            store.set(f"{prefix}/verdict", zlib.compress(json.dumps(verdict).encode()))  # type: ignore[arg-type]
        else:
            verdict = _await_verdict(store, topic, timeout)
        if verdict["error"] is not None:
            _let_all_read(store, prefix, layout, verdict["present"])
    except DistNetworkError as error:
        raise RetryableError(
            f"The connection to rank 0 broke at the {topic}: that process, or its node, is gone. Look in its log for "
            f"the first error. ({first_line(error)})"
        ) from error
    if verdict["error"] is not None:
        found = error_of(verdict["code"], verdict["error"])
        found.shared = layout.rank > 0
        raise found
    return verdict["answer"]


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    parts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(parts)


def first_line(error: BaseException) -> str:
    """What an error says, without the stack that torch adds."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def sweep(directory: Path, pattern: str) -> None:
    """Removes files that earlier attempts left behind more than a day ago."""
    for path in directory.glob(pattern):
        with contextlib.suppress(OSError):  # another attempt sweeps too
            if time.time() - path.stat().st_mtime > _STALE:
                path.unlink()


def _judge(
    store: "Store", layout: Layout, topic: str, judge: Callable[[list[dict[str, Any]]], Any], timeout: float
) -> dict[str, Any]:
    keys = [f"hpclr/{topic}/{rank}" for rank in range(layout.world_size)]
    missing = _missing(store, keys, timeout)
    present = layout.world_size - len(missing)
    try:
        if missing:
            raise RetryableError(
                f"{ranks_text(missing)} of {layout.world_size} did not come to the {topic} within {timeout:g} s "
                "(parallel.timeout): they were not started, ended early or hang. Look in their logs for the first "
                "error."
            )
        answer = judge([json.loads(store.get(key)) for key in keys])
    except HpclrError as error:
        return {"error": str(error), "code": error.exit_code, "present": present, "answer": None}
    return {"error": None, "code": 0, "present": present, "answer": answer}


def _missing(store: "Store", keys: list[str], timeout: float) -> list[int]:
    """The ranks that have not put anything under their key in time."""
    if _is_there(store, keys, timeout):
        return []
    return [rank for rank, key in enumerate(keys) if not store.check([key])]


def _is_there(store: "Store", keys: list[str], timeout: float) -> bool:
    from torch.distributed import DistStoreError

    try:
        store.wait(keys, timedelta(seconds=timeout))
    except DistStoreError:  # not in time
        return False
    return True


def _await_verdict(store: "Store", topic: str, timeout: float) -> Any:
    prefix = f"hpclr/{topic}"
    for key, seconds in ((f"{prefix}/0", timeout), (f"{prefix}/verdict", timeout + _GRACE)):
        if not _is_there(store, [key], seconds):
            raise RetryableError(
                f"Rank 0 did not come to the {topic}, or said nothing there, within {seconds:g} s (parallel.timeout). "
                "Look in its log for the first error."
            )
    return json.loads(zlib.decompress(store.get(f"{prefix}/verdict")))


def _let_all_read(store: "Store", prefix: str, layout: Layout, present: int) -> None:
    """Rank 0 may end, and the store with it, only when all who are there know why."""
    read = store.add(f"{prefix}/read", 1)
    deadline = time.monotonic() + _GRACE
    while layout.rank == 0 and read < present and time.monotonic() < deadline:
        time.sleep(_PAUSE)
        read = store.add(f"{prefix}/read", 0)
