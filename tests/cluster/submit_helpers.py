"""What the tests of submitting share: a place with a small run file, data and the module of a model."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "training"))
from training_helpers import Done, hpclr, run_file

from hpclr.cluster.record import submitted
from hpclr.cluster.submit import Prepared, Resources, prepare
from hpclr.config import load_run_file

NET = """
from torch import nn

import helpers

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), helpers.activation(), nn.Linear(16, 10))
"""
HELPERS = "from torch import nn\n\nactivation = nn.ReLU\n"
TARGET = {"model": {"target": "net:make"}}
CPU = ("--ntasks-per-node", 2, "--time", "00:10:00")


@dataclass
class Place:
    """The current directory: run.yaml, digits.h5, net.py and the module beside it that it imports."""

    path: Path

    @property
    def run(self) -> Path:
        return self.path / "runs" / "run"

    @property
    def submission(self) -> Path:
        return self.run / "submission"

    def write(self, **sections: Any) -> Path:
        """The run file; its data is named by a relative path."""
        file = self.path / "run.yaml"
        file.write_text(json.dumps(run_file(Path("digits.h5"), **sections)))
        return file

    def prepared(self, resources: Resources | None = None, **sections: Any) -> Prepared:
        run = load_run_file(self.write(**sections))
        return prepare(run, self.path / "runs", resources or Resources(ntasks_per_node=2, time="00:10:00"), ["hpclr"])

    def submit(self, *words: object, **sections: Any) -> Done:
        """`hpclr submit` with two processes, unless the words say otherwise."""
        asked = () if "--gpus-per-node" in words or "--ntasks-per-node" in words else CPU
        return hpclr("submit", self.write(**sections), *asked, *words)

    def jobs(self) -> list[tuple[str, ...]]:
        """What was submitted, by the run directory's own record."""
        return [entry.jobs for entry in submitted(self.run)]

    def listing(self) -> dict[str, bytes]:
        """Every file under runs/ with its content."""
        return {str(path): path.read_bytes() for path in sorted(self.path.glob("runs/**/*")) if path.is_file()}


def make_place(path: Path, digits: Path) -> Place:
    shutil.copy(digits, path / "digits.h5")
    (path / "net.py").write_text(NET)
    (path / "helpers.py").write_text(HELPERS)
    return Place(path)
