"""What the tests of batch scripts share: a script to begin with, and a place where it runs without Slurm."""

import os
import signal
import subprocess
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from hpclr.parallel.watch.outcome import Outcome, record_outcome
from hpclr.slurm.script import BatchScript

PROGRAM = ("hpclr", "train", "--runs-dir", "/scratch/runs", "/scratch/runs/digits/submission/run.yaml")
PLAIN = BatchScript("digits", Path("/scratch/runs/digits"), PROGRAM, "srun", nodes=2, processes=2)
JOB = "7"

# What the processes of a start do: `ends` is given by the test.
PROCESSES = """
attempt() { # CODE: they come as far as an attempt, and record how it ended
  directory="$RUN/logs/attempt-0$((${SLURM_RESTART_COUNT:-0} + 1))"
  mkdir -p "$directory"
  printf %s "$directory" >"$HPCLR_LAUNCH/attempt"
  [ -z "$1" ] || cp "$OUTCOMES/$1/exit.json" "$directory"
}
checkpoint() { # STEP
  touch "$(printf "$RUN/checkpoints/step-%08d.h5" "$1")" "$(printf "$RUN/checkpoints/step-%08d.h5.sha256" "$1")"
}
until_stop() { touch "$RUN/running"; until [ -e "$RUN/STOP" ]; do /bin/sleep 0.01; done; }
"""


@dataclass
class End:
    """How a start of the script ended."""

    code: int
    said: str
    requeues: int


@dataclass
class Place:
    """Where scripts run: Slurm's commands are scripts, everything else is real.

    Attributes:
        path: a directory for all of it.
        script: what is run,
        file: unless another one is, in the directory above its own.
    """

    path: Path
    script: BatchScript
    file: Path | None = None
    squeue: str = "exit 1"
    scontrol: str = "true"
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.script = replace(self.script, run=self.path / "a run's $(directory)")
        for directory in (*(self.run / name for name in ("logs", "checkpoints", "submission")), self.path / "bin"):
            directory.mkdir(parents=True)
        for code in (0, 1, 2, 75, 85):
            (self.path / "outcomes" / str(code)).mkdir(parents=True)
            record_outcome(self.path / "outcomes" / str(code), Outcome(code, 'says\n  "code": 3,\n'))
        self.program("sleep", "exec /bin/sleep 0.01")

    @property
    def run(self) -> Path:
        return self.script.run

    def stop_file(self) -> str | None:
        return (self.run / "STOP").read_text() if (self.run / "STOP").exists() else None

    def launch(self, ends: str, *, restart: int = 0, **variables: str) -> "subprocess.Popen[str]":
        """Starts the script; its processes do what `ends` says."""
        self.program("srun", f"{PROCESSES}\n{ends}")
        self.program("squeue", self.squeue)
        self.program("scontrol", f'echo "$@" >>"{self.path}/asked"\n{self.scontrol}')
        (self.path / "asked").write_text("")
        file = self.file or self.run / "submission" / "job.sh"
        if self.file is None:
            file.write_text(self.script.text())
        environment = {
            "PATH": os.pathsep.join([str(self.path / "bin"), os.environ["PATH"]]),
            "RUN": str(self.run),
            "OUTCOMES": str(self.path / "outcomes"),
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NODELIST": "n[1-2]",
            **({"SLURM_RESTART_COUNT": str(restart)} if restart else {}),
        }
        return subprocess.Popen(
            ["bash", file],
            cwd=file.parents[1],
            env=environment | self.variables | variables,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # as of a node, whose processes may all be signalled, or lost, at once
        )

    def ended(self, process: "subprocess.Popen[str]") -> End:
        _, said = process.communicate(timeout=30)
        asked = (self.path / "asked").read_text().splitlines()
        return End(process.returncode, said, asked.count(f"requeue {JOB}"))

    def start(self, ends: str, *, restart: int = 0, **variables: str) -> End:
        """Runs the script to its end."""
        return self.ended(self.launch(ends, restart=restart, **variables))

    def signalled(self, ends: str, *numbers: signal.Signals) -> End:
        """Sends signals to the script, and to nothing else, once its processes wait for STOP."""
        process = self.launch(ends)
        while not (self.run / "running").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        for number in numbers:
            process.send_signal(number)
        return self.ended(process)

    def program(self, name: str, text: str) -> None:
        """Puts a program on PATH."""
        file = self.path / "bin" / name
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)
