"""RUN/submission: what a job and its requeues work with, whatever changes elsewhere while it waits and runs.

run.yaml           the run file with every key spelt out, and with absolute paths
code/              packages and modules that are not installed; the job finds them first
job.sh             the batch script
changes.diff       how that code differs from the commit in submission.json, if it does
packages.txt       what is installed beside the Python of the job, unless that is in a container
submission.json    what was asked for (hpclr/cluster/record.py)
"""

import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

from hpclr.cluster.record import SUBMISSION, Submission, write_submission
from hpclr.errors import UsageError
from hpclr.files import synchronise, write_whole
from hpclr.training.run_directory import writing

JOB_SCRIPT = "job.sh"
RUN_FILE = "run.yaml"
CODE = "code"
_MOST_CODE = 100 << 20  # bytes; a directory of data among the code is no part of it
_PATIENCE = 60.0  # seconds for git
_no_code = shutil.ignore_patterns("__pycache__", ".*")


@dataclass(frozen=True)
class Snapshot:
    """What goes into RUN/submission.

    Attributes:
        run_file: its text.
        script: the batch script's text.
        code: packages (directories) and modules (files).
        record: what was asked for.
        packages: whether the installed packages are listed.
    """

    run_file: str
    script: str
    code: Sequence[Path]
    record: Submission
    packages: bool


@contextmanager
def placed(run: Path, snapshot: Snapshot) -> Iterator[Path]:
    """RUN/submission as it is to be, for the block and, unless the block fails, for good; yields the batch script.

    If the block fails all is as it was before: an earlier submission is back, a run directory that was made is gone.

    Args:
        run: the run directory.
        snapshot: what goes into it.

    Raises:
        UsageError: if the run directory may not be written to, or the code cannot be copied.
        RetryableError: if it cannot be written to now.
    """
    place = run / SUBMISSION
    with ExitStack() as undo:
        with writing(run):
            undo.callback(_remove_if_empty, run)
            run.mkdir(parents=True, exist_ok=True)
            new, old = (run / f".tmp-submission-{secrets.token_hex(4)}" for _ in range(2))
            undo.callback(shutil.rmtree, new, ignore_errors=True)
            _write(new, snapshot)
            if place.exists():
                place.rename(old)
                undo.callback(old.rename, place)
            new.rename(place)
            undo.callback(place.rename, new)
            synchronise(run)
        yield place / JOB_SCRIPT
        undo.pop_all()
    shutil.rmtree(old, ignore_errors=True)


def code_size(code: Sequence[Path]) -> int:
    """Bytes of packages and modules.

    Raises:
        UsageError: if one has too many for a snapshot.
    """
    return sum(_size(piece) for piece in code)


def _size(piece: Path) -> int:
    size = 0
    for file in _files(piece):
        size += file.stat().st_size
        if size > _MOST_CODE:
            raise UsageError(
                f"{piece} would be copied for the job, and has more than {_MOST_CODE >> 20} MiB: up to {file}. Keep "
                "data elsewhere than among the code that model.target needs."
            )
    return size


def _files(piece: Path) -> Iterator[Path]:
    """What is copied of a package or module; directories that links lead to belong to it."""
    if piece.is_file():
        yield piece
    seen: set[str] = set()
    for directory, names, files in os.walk(piece, followlinks=True):
        ignored = _no_code(directory, names + files)
        circle = (real := os.path.realpath(directory)) in seen
        seen.add(real)
        names[:] = [] if circle else sorted(set(names) - ignored)
        found = [] if circle else [Path(directory, name) for name in sorted(set(files) - ignored)]
        yield from (file for file in found if file.is_file())


def repositories(code: Sequence[Path]) -> dict[str, str]:
    """The git repositories that packages and modules are in, each with its commit."""
    found: dict[str, str] = {}
    for piece in code:
        top = (_git(piece.parent, "rev-parse", "--show-toplevel") or b"").decode(errors="replace").strip()
        commit = (_git(piece.parent, "rev-parse", "HEAD") or b"").decode().strip()
        if top and commit:
            found[top] = commit
    return found


def _write(directory: Path, snapshot: Snapshot) -> None:
    directory.mkdir()
    _copy(snapshot.code, directory / CODE)
    changes = [_git(Path(top), "diff", "--no-ext-diff", "--binary", "HEAD") or b"" for top in snapshot.record.commits]
    texts = {RUN_FILE: snapshot.run_file.encode(), JOB_SCRIPT: snapshot.script.encode()}
    texts |= {"changes.diff": b"".join(changes)} if any(changes) else {}
    texts |= {"packages.txt": _packages().encode()} if snapshot.packages else {}
    for name, content in texts.items():
        write_whole(directory / name, content)
    write_submission(directory, snapshot.record)


def _copy(code: Sequence[Path], target: Path) -> None:
    target.mkdir()
    for piece in code:
        for file in _files(piece):
            place = target / file.relative_to(piece.parent)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, place)


def _git(directory: Path, *words: str) -> bytes | None:
    """What git prints; None if it cannot answer, as where there is no repository."""
    try:
        command = ["git", "-C", str(directory), *words]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _packages() -> str:
    """What is installed for this Python, a line each, as `pip freeze` lists it."""
    return "".join(f"{line}\n" for line in sorted({_package(found) for found in distributions()}, key=str.lower))


def _package(found: Distribution) -> str:
    name = found.metadata["Name"]
    try:
        return f"{name} @ {json.loads(found.read_text('direct_url.json') or '')['url']}"
    except (ValueError, KeyError, TypeError):  # it came from a package index
        return f"{name}=={found.version}"


def _remove_if_empty(run: Path) -> None:
    with suppress(OSError):
        (run / "logs").rmdir()
    with suppress(OSError):
        run.rmdir()
