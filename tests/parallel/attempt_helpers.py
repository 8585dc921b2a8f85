"""Processes that take part in an attempt and come to grief; started as plain subprocesses."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from hpclr.cli import _report
from hpclr.errors import HpclrError, StopRequestedError, UsageError
from hpclr.parallel.watch.participation import take_part
from hpclr.parallel.watch.watchdog import beat_interval

directory, rank, size, timeout, fault, meeting = sys.argv[1:]
directory, rank, size, timeout = Path(directory), int(rank), int(size), float(timeout)

if meeting == "gloo":
    from datetime import timedelta
    import torch.distributed as dist
    store = dist.FileStore(str(directory / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=100))

def meet(step):
    if meeting == "gloo":
        return dist.barrier()
    (directory / f"{step}-{rank}").touch()
    while not all((directory / f"{step}-{r}").exists() for r in range(size)):
        time.sleep(0.01)

def trouble(beat):
    print("rank", rank, "was here", flush=True)
    if fault in ("kill", "stop"):
        time.sleep(1.5 * beat_interval(timeout))  # so that a beat tells what it was doing
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "crash":
        import ctypes
        ctypes.string_at(0)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "hang":
        time.sleep(1000)
    if fault == "bug":
        raise ValueError("a bug")
    if fault == "input":
        raise OSError(5, "Input/output error")
    if fault == "usage":
        raise UsageError("no such thing")

try:
    with take_part(directory, rank=rank, world_size=size, host="here", timeout=timeout) as beat:
        for step in range(5):
            beat.phase("reading data", step)
            if step == 3 and rank == size - 1:
                trouble(beat)
            beat.phase("reducing gradients", waiting=True)
            meet(step)
        if fault == "asked":
            raise StopRequestedError("saved at step 5")
except HpclrError as error:
    _report(error, error.exit_code, False)
"""


class Team:
    """The processes of an attempt."""

    def __init__(self, directory: Path, size: int, fault: str, *, timeout: float, meeting: str) -> None:
        arguments = [str(timeout), fault, meeting]
        self.directory = directory
        self.began = time.monotonic()
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(directory), str(rank), str(size), *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank in range(size)
        ]

    def codes(self, *ranks: int) -> list[int]:
        """The exit codes of some ranks, or of all."""
        chosen = [self.processes[rank] for rank in ranks] if ranks else self.processes
        return [process.wait(timeout=40) for process in chosen]

    def console(self, rank: int) -> str:
        """What a rank, when it has ended, has written to its standard output and error."""
        out, err = self.processes[rank].communicate(timeout=10)
        return str(out + err)

    def log(self, rank: int) -> str:
        """A rank's log."""
        return (self.directory / f"rank-{rank:04d}.log").read_text()

    def exit_file(self) -> dict[str, object]:
        """The record of the end."""
        return dict(json.loads((self.directory / "exit.json").read_text()))


@contextlib.contextmanager
def team(run: Path, size: int, fault: str, *, timeout: float = 3.0, meeting: str = "files") -> Iterator[Team]:
    """Starts processes of which the last gets into trouble at step 3; none is left afterwards."""
    directory = run / "logs" / "attempt-01"
    directory.mkdir(parents=True)
    members = Team(directory, size, fault, timeout=timeout, meeting=meeting)
    try:
        yield members
    finally:
        for process in members.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()
