"""What the tests of watching runs share: run directories in every condition, and a count of the questions to Slurm."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from hpclr.parallel.watch.attempt import attempt_directory, next_attempt
from hpclr.parallel.watch.outcome import Outcome, record_outcome
from hpclr.training.owner import Owner, this_process

ELSEWHERE = "another-boot pid:[1]"  # no process of this machine is there


def unfinished(run: Path, copy: Path, outcome: Outcome | None = None) -> Path:
    """A copy of a run that did not come to its end: without a summary, and its attempt with another outcome."""
    shutil.copytree(run, copy)
    (copy / "summary.json").unlink()
    (attempt_directory(copy, 1) / "exit.json").unlink()
    if outcome is not None:
        record_outcome(attempt_directory(copy, 1), outcome)
    return copy


def owned_elsewhere(run: Path, **changes: object) -> Owner:
    """Has the directory taken by a process of another machine, which never gives it back."""
    owner = this_process()
    for name, value in ({"host": "n7", "pid_namespace": ELSEWHERE} | changes).items():
        setattr(owner, name, value)
    (run / ".locks").mkdir(exist_ok=True)
    (run / ".locks" / "000009").write_bytes(owner.encode())
    return owner


def killed_in(run: Path) -> None:
    """Has a process of this machine take the directory, and kills it."""
    text = (
        "import os, sys; from pathlib import Path; from hpclr.training.lock import locked\n"
        "with locked(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", text, run], timeout=60)
    assert ended.returncode == -signal.SIGKILL


def attempt_with_log(run: Path, text: str = "", rank: int = 0) -> Path:
    """The log of one more attempt."""
    log = attempt_directory(run, next_attempt(run)) / f"rank-{rank:04d}.log"
    log.write_text(text)
    return log


def away_slurm(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of a Slurm whose controller does not answer, first on PATH."""
    for name in ("sbatch", "squeue"):
        (directory / name).write_text("#!/bin/bash\necho Unable to contact slurm controller >&2\nexit 1\n")
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


class Questions:
    """Commands of Slurm's that are what they were, but are counted."""

    def __init__(self, directory: Path, commands: Sequence[str] = ("squeue", "scontrol", "sinfo")) -> None:
        self.directory, self._asked = directory / "counting", directory / "asked"
        self.directory.mkdir()
        for name in commands:
            program = self.directory / name
            program.write_text(f'#!/bin/bash\necho "{name} $*" >>"{self._asked}"\nexec "{shutil.which(name)}" "$@"\n')
            program.chmod(0o755)

    def asked(self) -> list[str]:
        """The commands so far."""
        return self._asked.read_text().splitlines() if self._asked.exists() else []
