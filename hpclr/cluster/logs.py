"""What the processes of a run, or its jobs, have written; followed while they go on."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpclr.cluster.progress import LOCAL_LOG, job_logs
from hpclr.cluster.queued import job_numbers, owner_of
from hpclr.cluster.status import Status, statuses
from hpclr.errors import UsageError
from hpclr.files import open_regular
from hpclr.output import printable, say
from hpclr.parallel.watch.attempt import attempt_directory, attempts, heartbeat_path, log_path
from hpclr.parallel.watch.heartbeat import read_heartbeat
from hpclr.parallel.watch.outcome import Outcome, read_outcome

_PAUSE = 1.0  # seconds from one look at the files to the next
_SLURM_PAUSE = 30.0  # seconds from one question to Slurm to the next
_OWN_PAUSE = 5.0  # likewise, of runs that have no job
_CHUNK = 1 << 20  # bytes read at once; a line that is longer is broken

Show = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """Which logs.

    Attributes:
        rank: of the process.
        attempt: this one only; None: the newest, and those that follow it.
        job: what the batch scripts and launchers of jobs have written, instead of a process: from the newest job on.
    """

    rank: int = 0
    attempt: int | None = None
    job: bool = False


def show_logs(run: Path, choice: Choice, show: Show) -> None:
    """Shows what has been written so far.

    Args:
        run: the run directory.
        choice: which logs.
        show: is given text, whole lines, that cannot drive a terminal.

    Raises:
        UsageError: if there are none.
    """
    reader = _Reader(run, choice, show)
    if not reader.sources():
        raise UsageError(f"{run}: there are no such logs yet: the run is {_now(run).summary}{_hint(run, choice)}")
    reader.read(to_the_end=True)


def follow_logs(run: Path, choice: Choice, show: Show, pause: float = _PAUSE) -> None:
    """Shows what has been written, and what comes, until nothing more can come.

    Args:
        run: the run directory.
        choice: which logs.
        show: as for `show_logs`.
        pause: seconds between two looks at the files.

    Raises:
        UsageError: if there are none, and nothing is about to write any.
    """
    reader, watch = _Reader(run, choice, show), _Watch(run)
    if not reader.sources() and watch.now().live is False:
        known = f"{watch.now().summary}{_hint(run, choice)}"
        raise UsageError(f"{run}: there are no such logs, and nothing writes any: the run is {known}")
    while not _is_over(run, choice, watch):
        reader.read()
        time.sleep(pause)
    time.sleep(pause)  # for what the processes of other ranks say last
    reader.read(to_the_end=True)
    known = watch.now().summary if choice.job else _last_words(run, choice.attempt) or watch.now().summary
    say(printable(f"--- {run}: {known}{_hint(run, choice)}"))


def _last_words(run: Path, attempt: int | None) -> str | None:
    """What an attempt said of its end."""
    outcome = _outcome(run, attempt)
    return None if outcome is None else outcome.message


def _hint(run: Path, choice: Choice) -> str:
    """Where more is said of a job that has ended before its processes had logs."""
    return "" if choice.job or attempts(run) or not job_logs(run) else "; --job shows what its job has written"


def _is_over(run: Path, choice: Choice, watch: "_Watch") -> bool:
    """Whether nothing more can come, as far as one knows; that a run is done shows before Slurm or the lock tells."""
    if choice.attempt is not None and not choice.job:
        ended = _outcome(run, choice.attempt) is not None or max(attempts(run)) > choice.attempt
        return ended or watch.now().live is False
    return (watch.is_done() and not choice.job) or watch.now().live is False


def _outcome(run: Path, attempt: int | None) -> Outcome | None:
    """How an attempt has ended, None: the newest."""
    number = attempt or max(attempts(run), default=None)
    return None if number is None else read_outcome(attempt_directory(run, number))


class _Reader:
    """All files that were chosen, each from its beginning."""

    def __init__(self, run: Path, choice: Choice, show: Show) -> None:
        self._run, self._choice, self._show = run, choice, show
        self._first = _first_attempt(run, choice)
        self._first_job = max((number for number, _ in job_logs(run)), default=0)
        self._files: dict[Path, _File] = {}
        self._last: Path | None = None

    def sources(self) -> list[Path]:
        """The files, those that are there, the oldest first."""
        if self._choice.job:
            return [path for number, path in job_logs(self._run) if number >= self._first_job]
        if self._choice.attempt is None and not attempts(self._run):
            return [path for path in [self._run / LOCAL_LOG] if path.is_file()]
        later = [number for number in attempts(self._run) if number >= self._first]
        wanted = later if self._choice.attempt is None else [self._first]
        paths = [log_path(attempt_directory(self._run, number), self._choice.rank) for number in wanted]
        return [path for path in paths if path.is_file()]

    def read(self, *, to_the_end: bool = False) -> None:
        """Shows what is new; the last line, too, if it is to be the last.

        Which file it is from goes to standard error, so that standard output is what the processes wrote.
        """
        for path in self.sources():
            file = self._files.setdefault(path, _File(path))
            while text := file.read(to_the_end=to_the_end):
                if path != self._last:
                    say(printable(f"--- {path}"))
                    self._last = path
                self._show(printable(text.expandtabs()))


class _File:
    """A log that grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0

    def read(self, *, to_the_end: bool) -> str:
        """The next whole lines, at most _CHUNK bytes of them; "" if there are none yet."""
        with suppress(OSError), open_regular(self._path) as file:
            if file.seek(0, os.SEEK_END) < self._at:
                self._at = 0  # it is another one
            file.seek(self._at)
            return self._lines(file.read(_CHUNK), to_the_end)
        return ""

    def _lines(self, content: bytes, to_the_end: bool) -> str:
        end = content.rfind(b"\n") + 1
        if end == 0 and (to_the_end or len(content) == _CHUNK):
            end = len(content)
        self._at += end
        text = content[:end].decode(errors="replace")
        return text if not text or text.endswith("\n") else f"{text}\n"


class _Watch:
    """How the run is; Slurm is asked twice a minute at most."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._known: Status | None = None
        self._until = 0.0
        self._warned = ""
        self._was_done = self._newest_done()

    def now(self) -> Status:
        """How it is, or was a little while ago; what has changed is said."""
        if self._known is None or time.monotonic() >= self._until:
            before, self._known = self._known, _now(self._run, self._warn)
            jobs = job_numbers(self._run, owner_of(self._run))
            self._until = time.monotonic() + (_SLURM_PAUSE if jobs else _OWN_PAUSE)
            if self._known.live is not False and (before is None or before.summary != self._known.summary):
                say(printable(f"--- {self._run}: {self._known.summary}"))
        return self._known

    def _warn(self, text: str) -> None:
        """Once for all questions that get the same answer."""
        if text != self._warned:
            say(text)
        self._warned = text

    def is_done(self) -> bool:
        """Whether the run has come to its end since this was made."""
        newest = self._newest_done()
        return newest is not None and newest != self._was_done

    def _newest_done(self) -> int | None:
        """The number of the newest attempt, if that has finished the run."""
        number, outcome = max(attempts(self._run), default=None), _outcome(self._run, None)
        return number if outcome is not None and outcome.code == 0 else None


def _now(run: Path, warn: Callable[[str], None] = say) -> Status:
    (status,) = statuses([run], warn)
    return status


def _first_attempt(run: Path, choice: Choice) -> int:
    """The attempt whose log is shown first.

    Raises:
        UsageError: if there is no such attempt, or no such process in it.
    """
    numbers = attempts(run)
    if choice.attempt is not None and choice.attempt not in numbers:
        known = f"it has {', '.join(map(str, numbers))}" if numbers else "it has none yet"
        raise UsageError(f"{run}: there is no attempt {choice.attempt}; {known}")
    number = choice.attempt or max(numbers, default=1)
    first = read_heartbeat(heartbeat_path(attempt_directory(run, number), 0))
    if first is not None and choice.rank >= first.world_size and not choice.job:
        raise UsageError(
            f"{run}: attempt {number} has no rank {choice.rank}; it has {first.world_size} processes, from rank 0 on"
        )
    return number
