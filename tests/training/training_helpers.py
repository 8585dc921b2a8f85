"""What the tests of training share: the command line in this process, small run files, runs compared bit by bit."""

import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hpclr.checkpoint import Json, load_file
from hpclr.cli import main

# Of 13 steps: the conversion after 6, checks after 3, 9 and 12.
OIALR = {"name": "oialr", "delay": 0.5, "every": 0.25, "cutoff": 0.3, "layer_fraction": 0.5}
# Of 13 steps: regularised after 3, pruned after 6.
SVD = {"name": "svd_training", "sparsity": 0.05, "regularize_at": 3, "prune_at": 0.5, "energy": 0.2}
BY_THE_CLOCK = {"save", "pace", "attempt"}  # kinds of records that tell what happened, not what was computed
VIT = {"name": "vit", "patch": 4, "dim": 16, "depth": 1, "heads": 2}


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def hpclr(*arguments: object) -> Done:
    """The command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code
    return Done(code, out.getvalue(), err.getvalue())


def run_file(digits: Path, **sections: Any) -> dict[str, Any]:
    """A run file with small defaults; a section given replaces keys of the default one, but a model or method all."""
    run: dict[str, Any] = {
        "name": "run",
        "model": {"name": "mlp", "hidden": [32, 24]},
        "data": {"path": str(digits), "batch_size": 64},
        "optimizer": {"name": "adamw", "lr": 0.003},
        "method": OIALR,
        "train": {"steps": 13, "threads": 1},
        "validation": {"every_steps": 4},
        "checkpoint": {"every": 5},
    }
    for name, section in sections.items():
        merge = name in ("data", "train", "validation", "checkpoint")
        run[name] = run[name] | section if merge else section
    if "epochs" in run["train"]:
        del run["train"]["steps"]
    return run


@dataclass
class Bench:
    """A directory to train in."""

    path: Path
    digits: Path

    @property
    def run(self) -> Path:
        """The directory of the run called `run`."""
        return self.path / "runs" / "run"

    def write(self, **sections: Any) -> Path:
        """Writes run.yaml; JSON is YAML."""
        file = self.path / "run.yaml"
        file.write_text(json.dumps(run_file(self.digits, **sections)))
        return file

    def train(self, *arguments: object, code: int = 0, **sections: Any) -> Path:
        """Trains a run file in runs/run, and expects this exit code."""
        done = hpclr("train", self.write(**sections), *arguments)
        assert done.code == code, done.err
        return self.run

    def listing(self) -> dict[str, bytes]:
        """Every file here with its content, every directory; but who has held the run directory."""
        found = (path for path in sorted(self.path.rglob("*")) if ".locks" not in path.parts)
        return {str(path): path.read_bytes() if path.is_file() else b"/" for path in found}


def records(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """The records of these kinds, all without any."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if not kinds or record["kind"] in kinds]


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def steps_kept(run: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in (run / "checkpoints").glob("step-*.h5"))


def last_tree(run: Path) -> dict[str, Any]:
    """The newest checkpoint, flat: path → tensor or value; without what a clock, a host or its memory decides."""
    path = max((run / "checkpoints").glob("step-*.h5"))
    flat = dict(_flat(load_file(path).tree, ""))
    del flat["/environment"], flat["/run"]
    del flat["/position"]["seconds"], flat["/position"]["peak_memory"]
    return flat


def _flat(tree: Any, path: str):
    if isinstance(tree, dict):
        for key, item in tree.items():
            yield from _flat(item, f"{path}/{key}")
    else:
        yield path, tree.value if isinstance(tree, Json) else tree


def assert_same_run(one: Path, other: Path) -> None:
    """Equal to the bit: all of the last checkpoint, every record of what was computed, all but the times."""
    a, b = last_tree(one), last_tree(other)
    assert a.keys() == b.keys()
    differing = [key for key in a if not _same(a[key], b[key])]
    assert not differing
    pairs = zip(*([r for r in records(run) if r["kind"] not in BY_THE_CLOCK] for run in (one, other)), strict=True)
    for x, y in pairs:
        assert _without_chance(x) == _without_chance(y)


def _without_chance(record: dict[str, Any]) -> dict[str, Any]:
    """A record without times and memory."""
    cost = {key: value for key, value in record.get("cost", {}).items() if not key.startswith("peak_memory")}
    return record | {"seconds": 0, "time": 0, "cost": cost}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


def as_killed_after(run: Path, step: int, copy: Path) -> Path:
    """A copy of a run that saved every step, as it would be if it had died right after saving this one."""
    shutil.copytree(run, copy)
    (copy / "summary.json").unlink()
    for path in (copy / "checkpoints").glob("step-*"):
        if int(path.name[5:13]) > step:
            path.unlink()
    return copy
