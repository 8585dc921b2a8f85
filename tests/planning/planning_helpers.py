"""What the tests of plans share: run files in memory and on disk, the command line in this process."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from hpclr.cli import main
from hpclr.config import RunFile, parse_run_file
from hpclr.planning.counting import Counts
from hpclr.planning.forms import Layer, layers_of
from hpclr.planning.subject import Said, blank_model, subject_of

DENSE = {"name": "dense"}
OIALR = {"name": "oialr", "delay": 6, "every": 3, "layer_fraction": 0.5, "cutoff": 0.3}
METHODS = {
    "dense": DENSE,
    "oialr": OIALR,
    "oialr when it pays": OIALR | {"convert": "when_it_pays"},
    "fixed_rank": {"name": "fixed_rank", "rank": 0.25},
    "truncate": {"name": "truncate", "at": 5, "rank": 0.5},
    "truncate by rule": {"name": "truncate", "at": 5, "rank": {"rule": "energy", "share": 0.9}},
    "cuttlefish": {"name": "cuttlefish", "every": 2, "delay": 10, "window": 3},
    "nested": {"name": "nested", "delay": 5, "fractions": [0.5, 0.25]},
    "svd_training": {"name": "svd_training", "sparsity": 0.01, "prune_at": 8},
    "svd_training spatial": {"name": "svd_training", "sparsity": 0.01, "prune_at": 8, "decomposition": "spatial"},
}
DIGITS = Said(300, (1, 8, 8), 10)
PICTURES = Said(256, (3, 32, 32), 10)
VIT = {"name": "vit", "patch": 4, "dim": 64, "depth": 2, "heads": 2}


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def hpclr(*words: object) -> Done:
    """The command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as exit_:
            code = exit_.code
    return Done(code or 0, out.getvalue(), err.getvalue())


def sections(**changes: Any) -> dict[str, Any]:
    """A run file with small defaults; a section given takes the place of the default one."""
    return {
        "name": "run",
        "model": {"name": "mlp", "hidden": [32, 24]},
        "data": {"path": "absent.h5", "batch_size": 64},
        "optimizer": {"name": "adamw", "lr": 0.003},
        "method": OIALR,
        "train": {"steps": 13, "threads": 1, "device": "cpu"},
    } | changes


def run_of(**changes: Any) -> RunFile:
    return parse_run_file(json.dumps(sections(**changes)), "run.yaml")


def written(**changes: Any) -> Path:
    """The run file, in the current directory."""
    path = Path("run.yaml")
    path.write_text(json.dumps(sections(**changes)))
    return path


def counts_of(run: RunFile, said: Said = DIGITS) -> tuple[Counts, list[Layer]]:
    subject = subject_of(run, said)
    model = blank_model(subject)
    return Counts(subject, model), layers_of(run.method, model)
