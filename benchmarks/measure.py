"""What the benchmarks share: measuring side by side, the machine's name, tables and JSON."""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def interleaved(
    ways: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    repeats: int = 7,
    least_seconds: float = 0.05,
) -> dict[str, list[float]]:
    """Seconds per call of each way, measured in turns, so that what the machine does meanwhile strikes all alike.

    Args:
        ways: name → what is timed.
        device: waited for before the clock is read.
        repeats: turns; in every second one the ways come in reverse order.
        least_seconds: a turn calls a way as often as it takes to fill this time.
    """
    calls = {name: _calls(way, device, least_seconds) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(repeats):
            for name in list(ways)[:: -1 if turn % 2 else 1]:
                times[name].append(_seconds(ways[name], calls[name], device))
    finally:
        if collecting:
            gc.enable()
    return times


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """name → the median."""
    return {name: statistics.median(values) for name, values in times.items()}


def speed_ratios(times: Mapping[str, Sequence[float]], base: str) -> dict[str, float]:
    """name → how many times as fast as `base`: the median of the ratios of each turn, in which both met the same."""
    return {
        name: statistics.median(b / t for b, t in zip(times[base], values, strict=True))
        for name, values in times.items()
    }


def _calls(way: Callable[[], object], device: torch.device | str, least_seconds: float) -> int:
    way()  # warms up
    once = max(_seconds(way, 1, device), 1e-7)
    return max(1, round(least_seconds / once))


def _seconds(way: Callable[[], object], calls: int, device: torch.device | str) -> float:
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        way()
    synchronise(device)
    return (time.perf_counter() - start) / calls


def synchronise(device: torch.device | str) -> None:
    """Waits until an accelerator has done all it was given."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What the figures were measured on; goes into the heading of the table and the JSON."""
    found: dict[str, Any] = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found | {"torch": torch.__version__}


def heading(facts: Mapping[str, Any]) -> str:
    """The machine in one line."""
    gpu = f"{facts['gpu']}, " if "gpu" in facts else ""
    return (
        f"{gpu}{facts['processor']}, {facts['cores']} cores, {facts['threads']} torch threads, torch {facts['torch']}"
    )


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def show(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table; the first column to the left, numbers to the right."""
    cells = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *rest]).rstrip())


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=7, help="turns that the ways take; medians count")
    made.add_argument("--device", default="cpu", help="cpu, cuda, …")
    made.add_argument("--dtype", default="float32", help="of weights and inputs: float32, bfloat16 …")
    made.add_argument("--threads", type=int, default=0, help="torch threads; 0: torch's own choice")
    made.add_argument("--json", type=Path, help="write the numbers here")
    return made


def begin(arguments: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Sets threads and seed; returns the device and the type asked for."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    assert isinstance(dtype, torch.dtype), f"--dtype {arguments.dtype} is no type of torch"
    return torch.device(arguments.device), dtype


def write_json(path: Path | None, facts: Mapping[str, Any], results: object) -> None:
    """{"machine": …, "results": …}, where a path was given."""
    if path is not None:
        path.write_text(json.dumps({"machine": dict(facts), "results": results}, indent=2) + "\n")
