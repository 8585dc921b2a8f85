"""A small time series and a small text, prepared by the command line, and run files for them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_helpers import hpclr

CONTEXT, HORIZON = 16, 4
PATCHTST = {"name": "patchtst", "patch": 4, "patch_stride": 2, "dim": 16, "depth": 1, "heads": 2, "ffn": 24}
GPT2 = {"name": "gpt2", "dim": 16, "depth": 1, "heads": 2}
SERIES = {"context": CONTEXT, "horizon": HORIZON, "batch_size": 30}
TEXT = {"context": CONTEXT, "batch_size": 30}


def series_values() -> np.ndarray:
    """Three columns of 240 rows: waves, a ramp, and noise that depends on both."""
    t = np.arange(240)
    noise = np.random.default_rng(0).normal(size=240)
    return np.stack([10 + 3 * np.sin(t / 5), t / 40 + np.cos(t / 7), 0.2 * noise + np.sin(t / 5 + 1)], axis=1)


def characters() -> str:
    """A text of 3000 characters."""
    words = ["in", "the", "beginning", "was", "a", "word", "and", "the", "word", "was", "made", "of", "letters"]
    order = np.random.default_rng(1).integers(len(words), size=900)
    return " ".join(words[i] for i in order)[:3000]


@pytest.fixture(scope="session", name="series")
def the_series(tmp_path_factory) -> Path:
    """168 rows to train on, that is, 149 windows and five steps an epoch, 23 to validate and 49 to test."""
    place = tmp_path_factory.mktemp("series")
    np.savetxt(place / "series.csv", series_values(), delimiter=",", header="a,b,c", comments="", fmt="%.9g")
    return _prepared("csv", place / "series.csv", place / "series.h5")


@pytest.fixture(scope="session", name="text")
def the_text(tmp_path_factory) -> Path:
    """2400 characters to train on, that is, 149 windows and five steps an epoch, 300 to validate and 300 to test."""
    place = tmp_path_factory.mktemp("text")
    (place / "text.txt").write_text(characters())
    return _prepared("text", place / "text.txt", place / "text.h5")


def _prepared(reader: str, source: Path, out: Path) -> Path:
    done = hpclr("data", "prepare", reader, source, out)
    assert done.code == 0, done.err
    return out


def forecasting(series: Path, **sections: Any) -> dict[str, Any]:
    """Sections of a run file for the series."""
    return _sections({"path": str(series), **SERIES}, PATCHTST, sections)


def language(text: Path, **sections: Any) -> dict[str, Any]:
    """Sections of a run file for the text."""
    return _sections({"path": str(text), **TEXT}, GPT2, sections)


def _sections(data: dict[str, Any], model: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    return {"model": model, **sections, "data": data | sections.get("data", {})}


def literal_windows(split: str) -> list[tuple[list[list[float]], list[list[float]]]]:
    """Every window of a split and what follows it, standardised by the training rows, with nothing but loops."""
    rows = [
        [float(np.float32(value)) for value in row]
        for row in np.float64([[f"{v:.9g}" for v in r] for r in series_values()])
    ]
    train = rows[:168]
    means = [sum(row[c] for row in train) / len(train) for c in range(3)]
    stds = [math.sqrt(sum((row[c] - means[c]) ** 2 for row in train) / len(train)) for c in range(3)]
    scaled = [[(row[c] - means[c]) / stds[c] for c in range(3)] for row in rows]
    begin, end = {"valid": (168, 192), "test": (192, 240)}[split]
    return [(scaled[t - CONTEXT : t], scaled[t : t + HORIZON]) for t in range(begin, end - HORIZON + 1)]


def literal_tokens(split: str) -> tuple[list[int], list[str]]:
    """The tokens of a split, and the vocabulary."""
    vocabulary = sorted(set(characters()))
    begin, end = {"train": (0, 2400), "valid": (2400, 2700), "test": (2700, 3000)}[split]
    return [vocabulary.index(character) for character in characters()[begin:end]], vocabulary
