"""What a run ran on: recorded once an attempt, so that results can be traced and differences explained."""

import hashlib
import os
import platform
import random
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

PACKAGES = ("hpclr", "torch", "numpy", "h5py", "msgspec", "PyYAML", "safetensors")


def record(device: torch.device, threads: int, processes: Sequence[str], launcher: str) -> dict[str, object]:
    """The versions, the machine and the command of this attempt, as plain values.

    Args:
        device: of this process.
        threads: of this process.
        processes: the host of each process, by rank.
        launcher: who started them.
    """
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "host": platform.node(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": threads,
        "processes": len(processes),
        "hosts": sorted(set(processes)),
        "launcher": launcher,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _git_commit() -> str | None:
    """The commit of the code in the current directory, marked where it has been changed since."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],  # noqa: S607 - whichever git is there
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def use_threads(wanted: int | str, sharers: int = 1) -> int:
    """Sets torch's CPU threads and returns their number.

    Args:
        wanted: a number; or "auto", this process's share of the cores that it may use.
        sharers: how many processes share these cores.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // sharers) if wanted == "auto" else int(wanted)
    torch.set_num_threads(threads)
    return threads


def choose_device(wanted: str, index: int = 0) -> torch.device:
    """The device for "auto", "cpu" or "cuda"; of several CUDA devices the one with this index.

    Raises:
        ValueError: if CUDA is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no CUDA device; use train.device=cpu or auto")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted, index) if wanted == "cuda" else torch.device(wanted)


def seed_everything(seed: int) -> None:
    """Every generator that a model might draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_of(seed: int, *place: int) -> int:
    """A seed for a place in a run, such as (rank, step), unlike that of any other place."""
    text = ",".join(map(str, (seed, *place))).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def random_states() -> dict[str, Any]:
    """The states of all generators, to continue from exactly."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    states: dict[str, Any] = {
        "python": list(random.getstate()),
        "numpy": [name, [int(key) for key in keys], position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Takes back what `random_states` gave."""
    form, internal, gauss = states["python"]
    random.setstate((form, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"].clone())  # given a view of something longer, torch 2.13 crashes
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].clone())
