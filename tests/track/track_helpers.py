"""What the tests of tracking share: records, metrics files, waiting."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def train(step: int, **values: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "time": 1e9 + step, "loss": 1 / step, "lr": 0.1, "epoch": 0, **values}


def check(step: int, **ranks: Any) -> dict[str, Any]:
    sizes = {"trainable": 25, "stored": 120, "dense": 100, "gradient_bytes": 100}
    return {"kind": "check", "step": step, "time": 1e9 + step, **sizes, "ranks": ranks, "stability": ranks}


def attempt(step: int, **values: Any) -> dict[str, Any]:
    facts = {"attempt": 1, "world_size": 4, "device": "cpu", "steps": 100, "save_every": 20, "save_minutes": None}
    return {"kind": "attempt", "step": step, "time": 1e9, "checks": {"delay": 10, "every": 15}, **facts, **values}


def write(path: Path, *records: dict[str, Any], more: bool = True) -> Path:
    with path.open("a" if more else "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


def eventually(true: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it has not come to pass"
        time.sleep(0.01)
