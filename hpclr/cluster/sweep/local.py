"""The runs of a sweep on this machine, a few at a time, each a process of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from hpclr.cluster.progress import LOCAL_LOG, last_words
from hpclr.cluster.sweep.files import Point
from hpclr.cluster.sweep.standing import Standing, standings
from hpclr.config import dump
from hpclr.errors import EXIT_ERROR, EXIT_REQUEUE, EXIT_RETRY, EXIT_USAGE, UsageError
from hpclr.files import write_whole
from hpclr.output import printable, say
from hpclr.parallel.launch import SIGNALS, visible_gpus
from hpclr.training.run_directory import writing

_POLL = 0.1  # seconds
_BETTER_FIRST = (0, EXIT_REQUEUE, EXIT_RETRY, EXIT_USAGE, EXIT_ERROR)


def train_here(
    points: Sequence[Point],
    runs: Path,
    directory: Path,
    at_once: int,
    show: Callable[[int, int], None],
    then: Callable[[], Sequence[Point]] = lambda: (),
) -> int:
    """Trains runs, or continues them; one that fails does not hold up the others.

    Runs at which somebody else is when their turn comes are left to them. The signals INT, TERM, HUP, USR1 and USR2 let
    those that are under way save and end, and no other is started; a second Ctrl-C ends them at once.

    Args:
        points: the runs.
        runs: the directory that holds them.
        directory: takes their run files, as they are now.
        at_once: how many train at the same time.
        show: is told how many have ended, of how many.
        then: is asked, whenever runs have ended, which others can begin only now.

    Returns:
        The worst of their exit codes; 85 if some were not started or only saved, and none has failed.
    """
    waiting = _with_files(points, directory)
    count = len(waiting)
    show(0, count)
    with _Processes(runs, at_once).listening() as processes:
        while waiting or processes.running:
            before = len(processes.codes)
            while waiting and processes.has_room:
                processes.start(*waiting.pop(0))
            if processes.stopping:
                waiting.clear()
            time.sleep(_POLL)
            processes.reap()
            if len(processes.codes) > before:
                more = [] if processes.stopping else _with_files(then(), directory)
                waiting, count = waiting + more, count + len(more)
                show(len(processes.codes), count)
    codes = processes.codes + [EXIT_REQUEUE] * (count - len(processes.codes))
    return max(codes, key=_BETTER_FIRST.index, default=0)


def _with_files(points: Sequence[Point], directory: Path) -> list[tuple[Point, Path]]:
    """Written down, so that the last run to start is of the same sweep as the first."""
    found = [(point, directory / f"{point.name}.yaml") for point in points]
    with writing(directory):
        for point, file in found:
            write_whole(file, dump(point.run).encode())
    return found


def _elsewhere(point: Point, runs: Path) -> Standing | None:
    """How a run is that needs nobody here: another process has it, or has finished it; None if it does."""
    try:
        found = standings([point], runs)[point.name]
    except UsageError:  # the run says it itself
        return None
    return None if found.waits else found


class _Started(NamedTuple):
    """A run whose process is under way; what it says is in its log from the byte `began` on."""

    point: Point
    process: subprocess.Popen[bytes]
    began: int


class _Processes:
    """The processes of runs.

    Attributes:
        codes: exit codes of those that have ended.
        stopping: whether somebody has asked to stop.
    """

    def __init__(self, runs: Path, at_once: int) -> None:
        self.codes: list[int] = []
        self.stopping = False
        self._hurries = False
        self._runs, self._at_once = runs, at_once
        self._running: dict[int, _Started] = {}  # by the place that each has

    @property
    def running(self) -> bool:
        return bool(self._running)

    @property
    def has_room(self) -> bool:
        return not self.stopping and len(self._running) < self._at_once

    def start(self, point: Point, file: Path) -> None:
        """Starts a run in the first place that is free, unless somebody else has started it meanwhile."""
        if (found := _elsewhere(point, self._runs)) is not None:
            self._leave(point, found)
            return
        place = next(place for place in range(self._at_once) if place not in self._running)
        with writing(self._runs / point.name):
            (self._runs / point.name / LOCAL_LOG).parent.mkdir(parents=True, exist_ok=True)
            log = (self._runs / point.name / LOCAL_LOG).open("ab")
        with log:
            began = log.seek(0, os.SEEK_END)
            process = subprocess.Popen(  # noqa: S603
                [*_command(self._runs, file), *self._overrides(point)],
                env=os.environ | _gpu(place),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches this process only, which asks the others to save
            )
        self._running[place] = _Started(point, process, began)
        if self.stopping:  # asked meanwhile
            process.send_signal(signal.SIGTERM)

    def _overrides(self, point: Point) -> list[str]:
        """Each process is alone, also in an allocation of many; those side by side share the cores."""
        if point.run.train.threads != "auto" or self._at_once == 1:
            return ["parallel.launcher=single"]
        return ["parallel.launcher=single", f"train.threads={max(1, len(os.sched_getaffinity(0)) // self._at_once)}"]

    def reap(self) -> None:
        """Takes note of those that have ended."""
        for place, started in list(self._running.items()):
            if started.process.poll() is not None:
                del self._running[place]
                self._end(started, started.process.returncode)

    def _end(self, started: "_Started", code: int) -> None:
        """One that has ended, or that could not begin since somebody else was quicker."""
        found = _elsewhere(started.point, self._runs) if code == EXIT_USAGE else None
        if found is None:
            self.codes.append(self._ended(started, code))
        else:
            self._leave(started.point, found)

    def _leave(self, point: Point, found: Standing) -> None:
        say(printable(f"{point.name}: is left alone, as it is trained elsewhere: {found.words}"))
        self.codes.append(EXIT_RETRY if found.unknown else 0)

    def _ended(self, started: "_Started", code: int) -> int:
        point = started.point
        if code == -signal.SIGTERM and self.stopping:
            code = EXIT_REQUEUE  # before it began to train
        if code in (0, EXIT_REQUEUE):
            say(f"{point.name}: {'finished' if code == 0 else 'stopped'}")
            return code
        how = f"failed (exit code {code})" if code > 0 else f"ended by {signal.Signals(-code).name}"
        log = self._runs / point.name / LOCAL_LOG
        say(printable(f"{point.name}: {how}: {last_words(log, started.began) or 'it has said nothing'} [{log}]"))
        code = EXIT_RETRY if code < 0 else code
        return code if code in _BETTER_FIRST else EXIT_ERROR

    @contextmanager
    def listening(self) -> Iterator["_Processes"]:
        """Passes requests to stop on to the processes; leaves none behind."""
        previous = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            for number, handler in previous.items():
                if handler != signal.SIG_IGN:  # nohup
                    signal.signal(number, self._take)
            yield self
        finally:
            for started in self._running.values():
                started.process.send_signal(signal.SIGKILL if self._hurries else signal.SIGTERM)
            for started in self._running.values():
                started.process.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.stopping and number == signal.SIGINT:
            self._hurries = True
            raise KeyboardInterrupt
        self.stopping = True
        for started in list(self._running.values()):
            with contextlib.suppress(ProcessLookupError):
                started.process.send_signal(signal.SIGTERM)


def _command(runs: Path, file: Path) -> list[str]:
    return [sys.executable, "-m", "hpclr", "train", "--runs-dir", str(runs), "--", str(file)]


def _gpu(place: int) -> dict[str, str]:
    """The GPUs are dealt out to the places."""
    count = visible_gpus()
    if not count:
        return {}
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = map(str, range(count)) if named is None else map(str.strip, named.split(","))
    return {"CUDA_VISIBLE_DEVICES": [device for device in devices if device not in ("", "-1")][place % count]}
