"""What the tests of sweeps share: a place with a small run file, data, and sweep files over it."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "training"))
from training_helpers import Done, hpclr, run_file

from hpclr.cluster.sweep.points import Sweep, load_sweep


@dataclass
class Sweeps:
    """The current directory, with sweep.yaml over run.yaml."""

    path: Path

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    def write(self, base: dict[str, Any] | None = None, **parts: Any) -> Path:
        """The sweep file; `base` are sections of the run file. JSON is YAML."""
        (self.path / "run.yaml").write_text(json.dumps(run_file(Path("digits.h5"), **(base or {}))))
        file = self.path / "sweep.yaml"
        file.write_text(json.dumps({"run": "run.yaml"} | parts))
        return file

    def load(self, started: Sequence[str] = (), **parts: Any) -> Sweep:
        return load_sweep(self.write(**parts), started.__contains__)

    def names(self, **parts: Any) -> list[str]:
        return [point.name for point in self.load(**parts).points]

    def sweep(self, *words: object, **parts: Any) -> Done:
        """`hpclr sweep`, in this process."""
        return hpclr("sweep", self.write(**parts), *words)

    def finished(self) -> set[str]:
        return {path.parent.name for path in self.runs.glob("*/summary.json")}


def make_sweeps(path: Path, digits: Path | None = None) -> Sweeps:
    if digits is not None:
        shutil.copy(digits, path / "digits.h5")
    return Sweeps(path)
