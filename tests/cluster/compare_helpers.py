"""What the tests of comparisons share: a place with a run file, comparison files over it, and runs that are made up."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweep_helpers import Done, Sweeps, hpclr, make_sweeps

from hpclr.cluster.comparison.files import Comparison, Wanted, load_comparison
from hpclr.config import dump

NOTHING = Wanted()
SHORT = {"train": {"steps": 4}, "validation": {"every_steps": 2}}


@dataclass
class Comparisons(Sweeps):
    """The current directory, with run.yaml and compare.yaml over it."""

    def file(self, base: dict[str, Any] | None = None, **parts: Any) -> Path:
        """The comparison file, or, where nothing is said of one, the run file."""
        self.write(base)
        if not parts:
            return self.path / "run.yaml"
        file = self.path / "compare.yaml"
        file.write_text(json.dumps({"run": "run.yaml"} | parts))
        return file

    def found(self, wanted: Wanted = NOTHING, **parts: Any) -> Comparison:
        return load_comparison(self.file(**parts), wanted)

    def compare(self, *words: object, **parts: Any) -> Done:
        """`hpclr compare`, in this process."""
        return hpclr("compare", self.file(**parts), *words)

    def invent(self, point: Any, validations: list[dict[str, Any]] | None = None, **summary: Any) -> Path:
        """A run that is finished; its results are made up."""
        directory = self.runs / point.name
        directory.mkdir(parents=True)
        (directory / "run.yaml").write_text(dump(point.run))
        (directory / "summary.json").write_text(json.dumps({"steps": point.run.train.steps, "seconds": 10.0} | summary))
        records = [{"kind": "valid", "step": number, **record} for number, record in enumerate(validations or [], 1)]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return directory

    def stamps(self) -> dict[str, int]:
        """When each finished run has come to its end."""
        return {name: (self.runs / name / "summary.json").stat().st_mtime_ns for name in self.finished()}


def make_comparisons(path: Path, digits: Path | None = None) -> Comparisons:
    return Comparisons(make_sweeps(path, digits).path)


def cells(out: str) -> dict[str, list[str]]:
    """The rows of a printed table by their headings; rows below one of these by both, as "seconds: of dense"."""
    found: dict[str, list[str]] = {}
    above = ""
    for line in out.splitlines():
        if not line.strip() or line.strip().startswith("─"):
            continue
        heading, *values = [part.strip() for part in line.strip("\n").split("  ") if part.strip()]
        above, heading = (above, f"{above}: {heading}") if line.startswith("   ") else (heading, heading)
        found[heading] = values
    return found
