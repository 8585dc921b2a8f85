"""The numbers of a record, by the names under which TensorBoard and MLflow show them."""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from hpclr.track.records import Record

_NO_SCORES = ("kind", "step", "time", "seconds", "flops", "dense_flops", "samples")  # in a validation's record


def scalars(record: Record) -> dict[str, float]:
    """Name → value of what is worth a curve; empty for records of other kinds."""
    maker = _MAKERS.get(record["kind"])
    found = {} if maker is None else maker(record)
    return {name: float(value) for name, value in found.items() if is_number(value)}


def time_of(record: Mapping[str, Any]) -> float:
    """When a record was taken, Unix time in seconds; 0 if it does not say."""
    return float(taken) if is_number(taken := record.get("time")) else 0.0


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a finite number that a double holds; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 and math.isfinite(value)


def ratio(part: object, whole: object) -> float | None:
    """One as a share of the other; None where that is not known."""
    return part / whole if is_number(part) and is_number(whole) and whole else None


def scores(record: Record) -> dict[str, Any]:
    """The loss and the metrics of a validation."""
    return {name: value for name, value in record.items() if name not in _NO_SCORES}


def _train(record: Record) -> Mapping[str, object]:
    return {"train/loss": record.get("loss"), "train/learning_rate": record.get("lr")}


def _valid(record: Record) -> Mapping[str, object]:
    return {f"valid/{name}": value for name, value in scores(record).items()}


def _check(record: Record) -> Mapping[str, object]:
    return {
        "parameters/trained": ratio(record.get("trainable"), record.get("dense")),
        "parameters/stored": ratio(record.get("stored"), record.get("dense")),
        "parameters/rank": record.get("rank_share"),
        "communication/gradient_bytes": record.get("gradient_bytes"),
    }


def _pace(record: Record) -> Mapping[str, object]:
    shares = {f"pace/{part}": ratio(record.get(part), record.get("seconds")) for part in PACE_PARTS}
    return {
        "pace/steps_per_second": ratio(record.get("steps"), record.get("seconds")),
        **shares,
        "memory/bytes": record.get("memory"),
    }


def _final(record: Record) -> Mapping[str, object]:
    test = record.get("test")
    return {f"test/{name}": value for name, value in scores(test).items()} if isinstance(test, dict) else {}


PACE_PARTS = ("data", "check", "save", "valid")
_MAKERS = {"train": _train, "valid": _valid, "check": _check, "pace": _pace, "final": _final}
