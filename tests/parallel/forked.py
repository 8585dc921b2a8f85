"""Several real processes from one test: forked, so that torch is imported once."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch.distributed  # noqa: F401 - here, so that no child has to

from hpclr.errors import HpclrError
from hpclr.parallel.meeting.layout import Layout

_LIMIT = 40  # seconds


def layout(rank: int, size: int, key: str | None = "13.0.0", launcher: str = "slurm") -> Layout:
    return Layout(rank, size, rank, size, launcher, key)


def run_all(size: int, work: Callable[[int], Any], absent: tuple[int, ...] = ()) -> dict[int, Any]:
    """What `work(rank)` gives in each process: its result, or (name, text) of an HpclrError."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [rank for rank in range(size) if rank not in absent]
    processes = [context.Process(target=_run, args=(rank, work, results), daemon=True) for rank in ranks]
    for process in processes:
        process.start()
    try:
        return dict(results.get(timeout=_LIMIT) for _ in ranks)
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def _run(rank: int, work: Callable[[int], Any], results: Any) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.pop(name, None)
    try:
        results.put((rank, work(rank)))
    except HpclrError as error:
        results.put((rank, (type(error).__name__, str(error))))
