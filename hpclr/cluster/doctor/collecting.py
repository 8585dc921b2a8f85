"""Runs checks so that none can do harm: each in a process of its own, with a time limit, all at once.

A check may hang in the kernel, as on a file system whose server is gone, where no exception and no signal gets it
out; or crash in native code. What it had found until then counts, and the others do not notice.
"""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from hpclr.cluster.doctor.finding import Finding, Level

_POLL = 0.01  # seconds
_LAST_MOMENT = 0.5  # likewise, that a process may take to end when it is killed
_LAST_WORDS = 400  # characters of what a process wrote before it crashed

Examination = Callable[[], Iterable[Finding]]


@dataclass(frozen=True)
class Check:
    """Something to look at.

    Attributes:
        name: in a word or two.
        examine: looks, and yields what it has found as it goes.
        limit: seconds that it may take.
        level: how bad it is if it does not get to its end.
        remedy: what to do then.
    """

    name: str
    examine: Examination
    limit: float
    level: Level = "failure"
    remedy: str = "Run it again; if it stays so, report it with these words."


def collect(checks: Sequence[Check]) -> Iterator[list[Finding]]:
    """What each check finds, in their order, each as soon as it and those before it have ended.

    To be called before threads are started, since the processes are forks of this one.
    """
    children = [_Child(check) for check in checks]
    try:
        for child in children:
            yield child.findings()
    finally:
        for child in children:
            child.end()


class _Child:
    """A check under way. What it says goes to memory, so that a full disk is no hindrance."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._deadline = time.monotonic() + check.limit
        self._answer, self._said = os.memfd_create("answer"), os.memfd_create("said")
        self._status: int | None = None
        self._pid = os.fork()
        if self._pid == 0:
            _examine(check, self._answer, self._said)

    def findings(self) -> list[Finding]:
        """Waits for the end or the limit."""
        self._wait(self._deadline)
        found = [msgspec.json.decode(line, type=Finding) for line in _lines(self._answer)]
        problem = self._problem()
        return [*found, Finding(self._check.level, self._check.name, *problem)] if problem else found

    def end(self) -> None:
        """Ends it with all that it has started. One that hangs in the kernel ends when that lets go of it."""
        if not self._has_ended():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
            self._wait(time.monotonic() + _LAST_MOMENT)
        os.close(self._answer)
        os.close(self._said)

    def _wait(self, deadline: float) -> None:
        while not self._has_ended() and time.monotonic() < deadline:
            time.sleep(_POLL)

    def _has_ended(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status is not None

    def _problem(self) -> tuple[str, str] | None:
        """Why the check is not complete, and what to do."""
        if self._status == 0:
            return None
        if self._status is None:
            return f"no answer within {self._check.limit:g} s", self._check.remedy
        how = f"code {self._status}" if self._status > 0 else signal.Signals(-self._status).name
        words = " ".join(b" ".join(_lines(self._said)).decode(errors="replace").split())[-_LAST_WORDS:]
        return f"the check has crashed ({how}); its last words: {words or 'none'}", self._check.remedy


def _examine(check: Check, answer: int, said: int) -> None:
    """The child process; does not return."""
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(check.limit) + 1)  # if the parent is no longer there to end it
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (said, 1), (said, 2)):
            os.dup2(source, target)
        for finding in check.examine():
            os.write(answer, msgspec.json.encode(finding) + b"\n")
        code = 0
    except BaseException as error:  # whatever it is, it must not go on as if it were the parent
        os.write(said, f"\n{type(error).__name__}: {error}".encode())
    finally:
        os._exit(code)


def _lines(file: int) -> list[bytes]:
    size = os.fstat(file).st_size
    return os.pread(file, size, 0).splitlines()
