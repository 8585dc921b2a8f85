"""A way round a launcher for what processes write: straight to the console of the command that started it."""

import contextlib
import os
import select
import time
from pathlib import Path

_PIECE = 65536  # bytes
_IN_SHELL = 'out=$1 err=$2; shift 2; exec "$@" >>"$out" 2>>"$err"'


class Console:
    """Standard output and standard error of this process, for processes that do not inherit them.

    They open a terminal themselves, so that it stays one for them. For anything else there is a pipe, of which this
    process passes on what comes. A context manager; `prefix` goes in front of a command that is to write here.
    """

    def __init__(self) -> None:
        self._pipes: dict[int, int] = {}  # from the end that is read to the descriptor that it is for
        self._writing: list[int] = []
        self.prefix: list[str] = []
        if Path("/proc/self/fd").is_dir():  # else processes write wherever their launcher lets them
            self.prefix = ["/bin/sh", "-c", _IN_SHELL, "sh", self._door(1), self._door(2)]

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in [*self._pipes, *self._writing]:
            os.close(descriptor)

    def pass_on(self, seconds: float) -> bool:
        """Passes on what has come or comes within some seconds; returns whether anything did."""
        if not self._pipes:
            time.sleep(seconds)
            return False
        ready, _, _ = select.select(list(self._pipes), [], [], seconds)
        for pipe in ready:
            _write(self._pipes[pipe], os.read(pipe, _PIECE))
        return bool(ready)

    def drain(self) -> None:
        """Passes on the rest, when the processes have ended."""
        while self.pass_on(0):
            pass

    def _door(self, descriptor: int) -> str:
        """A path that other processes can open to write to a descriptor of this one."""
        own = f"/proc/{os.getpid()}/fd"
        with contextlib.suppress(OSError):  # after su, a terminal may belong to someone else
            if os.isatty(descriptor):
                os.close(os.open(f"{own}/{descriptor}", os.O_WRONLY | os.O_NOCTTY))
                return f"{own}/{descriptor}"
        reading, writing = os.pipe()
        self._pipes[reading] = descriptor
        self._writing.append(writing)
        return f"{own}/{writing}"


def _write(descriptor: int, content: bytes) -> None:
    """Writes all of it, or drops it if nobody takes it."""
    with contextlib.suppress(OSError):
        while content:
            content = content[os.write(descriptor, content) :]
