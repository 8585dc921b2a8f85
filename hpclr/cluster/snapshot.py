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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import NoReturn

from hpclr.cluster.code import require_readable, unreadable
from hpclr.cluster.record import JOB_SCRIPT, SUBMISSION, Submission, write_submission
from hpclr.cluster.submitting import NEW, OLD, UnknownOutcomeError, submitting
from hpclr.errors import UsageError
from hpclr.files import synchronise, write_whole
from hpclr.training.run_directory import writing

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
        changes: how the code differs from its commits; None if that is not known.
    """

    run_file: str
    script: str
    code: Sequence[Path]
    record: Submission
    packages: bool
    changes: bytes | None = b""


@contextmanager
def placed(run: Path, snapshot: Snapshot, look: Callable[[], object] = lambda: None) -> Iterator[Path]:
    """RUN/submission as it is to be, for the block and, unless the block fails, for good; yields the batch script.

    Nobody else submits the run meanwhile. If the block fails all is as it was before: an earlier submission is back,
    a run directory that was made is gone; but not if what it has come to is not known.

    Args:
        run: the run directory.
        snapshot: what goes into it.
        look: whether it may; called before anything is written, and while nobody else can submit.

    Raises:
        UsageError: if the run directory may not be written to, or the code cannot be copied.
        RetryableError: if it cannot be written to now.
    """
    with submitting(run):
        look()
        with _swapped(run, snapshot) as script:
            yield script


@contextmanager
def _swapped(run: Path, snapshot: Snapshot) -> Iterator[Path]:
    place = run / SUBMISSION
    with ExitStack() as undo:
        with writing(run):
            new, old = (run / f"{kind}{secrets.token_hex(4)}" for kind in (NEW, OLD))
            undo.callback(shutil.rmtree, new, ignore_errors=True)
            _write(new, snapshot)
            if place.exists():
                place.rename(old)
                undo.callback(old.rename, place)
            new.rename(place)
            undo.callback(place.rename, new)
            synchronise(run)
        try:
            yield place / JOB_SCRIPT
        except UnknownOutcomeError:
            undo.pop_all()
            raise
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
        require_readable(file)
        size += file.stat().st_size
        if size > _MOST_CODE:
            raise UsageError(
                f"{piece} would be copied for the job, and has more than {_MOST_CODE >> 20} MiB: up to {file}. Keep "
                "data elsewhere than among the code that model.target needs."
            )
    return size


def _files(piece: Path) -> Iterator[Path]:
    """What is copied of a package or module; directories that links lead to belong to it.

    Raises:
        UsageError: if a directory cannot be read.
    """
    if piece.is_file():
        yield piece
        return
    seen: set[str] = set()
    for directory, names, files in os.walk(piece, onerror=_refuse, followlinks=True):
        ignored = _no_code(directory, names + files)
        circle = (real := os.path.realpath(directory)) in seen
        seen.add(real)
        names[:] = [] if circle else sorted(set(names) - ignored)
        found = [] if circle else [Path(directory, name) for name in sorted(set(files) - ignored)]
        yield from (file for file in found if file.is_file())


def _refuse(error: OSError) -> NoReturn:
    raise unreadable(Path(error.filename), error) from error


def versions(code: Sequence[Path]) -> tuple[dict[str, str], bytes | None]:
    """The git repositories that packages and modules are in, each with its commit, and how they differ from these.

    The difference is None where git cannot tell, or not in time.
    """
    found: dict[str, str] = {}
    unsure = False
    for directory in {piece.parent: None for piece in code}:
        top = (_git(directory, "rev-parse", "--show-toplevel") or b"").decode(errors="replace").strip()
        commit = (_git(directory, "rev-parse", "HEAD") or b"").decode().strip()
        if top and commit:
            found[top] = commit
        unsure = unsure or (not (top and commit) and _is_in_repository(directory))
    changes = [_git(Path(top), "diff", "--no-ext-diff", "--binary", "HEAD") for top in found]
    known = [change for change in changes if change is not None]
    return found, None if unsure or len(known) < len(changes) else b"".join(known)


def _is_in_repository(directory: Path) -> bool:
    return any(os.path.exists(place / ".git") for place in (directory, *directory.parents))


def _write(directory: Path, snapshot: Snapshot) -> None:
    directory.mkdir()
    _copy(snapshot.code, directory / CODE)
    texts = {RUN_FILE: snapshot.run_file.encode(), JOB_SCRIPT: snapshot.script.encode()}
    texts |= {"changes.diff": snapshot.changes} if snapshot.changes else {}
    texts |= {"packages.txt": _packages().encode()} if snapshot.packages else {}
    for name, content in texts.items():
        write_whole(directory / name, content)
    write_submission(directory, snapshot.record)


def _copy(code: Sequence[Path], target: Path) -> None:
    target.mkdir()
    for piece in code:
        for file in _files(piece):
            require_readable(file)
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
