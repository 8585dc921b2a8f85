"""Looking at a file of a stranger without meeting it: a child process reads it, within limits.

HDF5 is a large library in C, and files that were made to do harm have crashed it, hung it and worse. What the child
says is not trusted either: it is read within limits and by type, and it is of names, shapes and numbers only.
"""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import msgspec

from hpclr.checkpoint.examination import Item, Message, Progress, Refused, Survey, cpu_seconds
from hpclr.checkpoint.parts import bytes_of_parts
from hpclr.checkpoint.source import FileSource
from hpclr.errors import UsageError

__all__ = ["Item", "Survey", "examine"]

WALL_SECONDS = 60.0
"""What an examination may take, beyond the time to read the file at 10 MB/s."""

MAX_REPORT = 128 << 20
"""Bytes that the child may print."""

_BLOCK = 1 << 16
_DECODER = msgspec.json.Decoder(Message)
_PROGRAM = """import sys
sys.path[:] = {path!r}
from hpclr.checkpoint.examination import main
main()
"""
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HDF5_PLUGIN_PRELOAD": "::"}  # and no plugins


def examine(path: Path, *, without_digest: bool = False, progress: Callable[[int, int], None] | None = None) -> Survey:
    """Reads all of a checkpoint and its parts in a child process with little time and memory, and says what it holds.

    Its digest is compared with its sidecar before HDF5 sees a byte; every checksum is compared, every JSON value
    decoded, every number looked at. Memory does not depend on the file's size.

    Args:
        path: the file.
        without_digest: do not ask for a sidecar.
        progress: called now and then with the number of bytes done and in all.

    Raises:
        UsageError: the file is not good, and why; among that, that it crashed, or held up, the child.
    """
    try:
        with FileSource(path) as source:
            size, of_parts = source.size, bytes_of_parts(path)
    except OSError as error:
        raise UsageError(f"{path}: the file cannot be read: {error.strerror or error}. Check the file.") from error
    seconds = WALL_SECONDS + (size + of_parts) / 10e6
    deadline = time.monotonic() + seconds
    with _started(path, without_digest) as child:
        try:
            end = _listen(child, deadline, progress)
            if isinstance(end, str):
                end = _end_of(child.wait(deadline - time.monotonic()), cpu_seconds(size, of_parts), end)
        except (TimeoutError, subprocess.TimeoutExpired):
            end = f"reading it took longer than {seconds:.0f} s"
        except BufferError:
            end = f"the process that looks at it said more than {MAX_REPORT} bytes"
    if isinstance(end, Survey):
        return end
    raise UsageError(end.reason if isinstance(end, Refused) else f"{path}: {end}. Use another checkpoint.")


@contextlib.contextmanager
def _started(path: Path, without_digest: bool) -> Iterator[subprocess.Popen[bytes]]:
    """The child, in a process group of its own, which ends with the block."""
    program = _PROGRAM.format(path=[os.path.abspath(place) for place in sys.path])
    with subprocess.Popen(  # noqa: S603 - this program itself
        [sys.executable, "-I", "-c", program, path, *["without digest"] * without_digest],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | _ENVIRONMENT,
        start_new_session=True,
    ) as child:
        try:
            yield child
        finally:
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)


def _listen(
    child: subprocess.Popen[bytes], deadline: float, progress: Callable[[int, int], None] | None
) -> Survey | Refused | str:
    """The result; or, if there is none, the last thing the child said that is no message.

    Raises:
        TimeoutError: there is no result at the deadline.
        BufferError: the child says too much.
    """
    assert child.stdout is not None
    other = ""
    for line in _lines(child.stdout, deadline):
        try:
            message: Message = _DECODER.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            other = line[:200].decode(errors="replace")
            continue
        if not isinstance(message, Progress):
            return message
        if progress is not None:
            progress(message.done, message.total)
    return other


def _lines(stream: IO[bytes], deadline: float) -> Iterator[bytes]:
    """Lines as they come."""
    parts: list[bytes] = []
    left = MAX_REPORT
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while left > 0:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            chunk = os.read(stream.fileno(), _BLOCK)
            if not chunk:
                return
            left -= len(chunk)
            first, *more = chunk.split(b"\n")
            parts.append(first)
            for part in more:
                yield b"".join(parts)
                parts = [part]
    raise BufferError


def _end_of(code: int, cpu: float, said: str) -> str:
    """What became of a child that gave no result."""
    if code >= 0:
        return f"the process that looks at it ended with exit code {code} and without a result; it said {said!r}"
    name = signal.Signals(-code).name
    if name in ("SIGXCPU", "SIGKILL"):
        return f"reading it took more than {cpu:.0f} s of processor time, or the system ended it ({name})"
    return f"HDF5 crashed on it ({name})"
