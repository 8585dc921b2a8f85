"""One job at a time in a run directory, also where many hosts share it.

Locks of the file system do not do: on network file systems some are local to a host, some are missing, and none says
who holds it. Instead every job that takes the directory leaves a record of itself (`Owner`) in `.locks`, under a
number; that with the highest number owns the directory, unless its record says that it has let go.

Two never own it at once, for these reasons:

* Number n + 1 is made by link(2), which succeeds once, and no record is ever removed or renamed. So a number has one
  maker for all time, however old the list of numbers was that it looked at: if that was out of date, n + 1 exists.
* Who makes n + 1 has seen before that n has let go, or is gone. Neither is ever undone. So each owner's time ended
  before that of the next began.
* `--fresh` renames the run directory, and only its owner does so. A job that was about to lock the old one works with
  a descriptor, so that it cannot make a number of the old one in the new one; and having made it, it looks whether the
  directory that it has is still the one at the path. From then on it is the owner, and nobody moves it.

An owner is gone if this machine sees that its process has ended. If only Slurm says so, or the user (`--break-lock`),
its heartbeat must stand still as well: a node that Slurm has lost may go on computing, and so may what was started in
the shell of a job that has ended. No clock of another machine matters: one watches, by one's own clock.
Where such a process comes to again after all, as one that was suspended, it finds that it is no longer the owner.
"""

import errno
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from hpclr.errors import HpclrError, RetryableError, UsageError
from hpclr.output import say
from hpclr.parallel.watch.record import read_record
from hpclr.training.owner import Fate, Owner, decode, fate_of, this_process
from hpclr.training.run_directory import RUNS_VARIABLE, writing

WATCH = 30.0  # seconds for which a heartbeat must stand still; it beats three times as often
_RECORDS = ".locks"
_NUMBER = re.compile(r"[0-9]{6}|[1-9][0-9]{6,17}")  # just what _name makes
_LAST = 10**18 - 1
_TEMPORARY = ".tmp-"
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
_WAIT = "Wait for it to end, or give this run another name (name=…)."


class RunLock:
    """A run directory that this process owns.

    Args:
        path: the run directory.
        number: of the record.
        file: its descriptor, which this closes in the end.
        owner: what is in it.

    Attributes:
        lost: who owns the directory now, if somebody has taken it; else "".
    """

    def __init__(self, path: Path, number: int, file: int, owner: Owner) -> None:
        self.lost = ""
        self._path, self._number, self._file, self._owner = path, number, file, owner
        self._looked = time.monotonic()

    @contextmanager
    def held(self, beat: float) -> Iterator["RunLock"]:
        """Shows, every `beat` seconds, that this process lives, until the block ends; then lets go."""
        ended = threading.Event()
        thread = threading.Thread(target=self._keep, args=(ended, beat), name="run lock", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            ended.set()
            thread.join()
            self.let_go()

    def let_go(self) -> None:
        """Says in the record that the directory is free."""
        self._owner.state = "free"
        self._write()
        os.close(self._file)

    def require_held(self) -> None:
        """To be called as often as one likes; looks at the disk only if the heartbeat has not for a while.

        Raises:
            HpclrError: if another job has taken the directory; names it.
        """
        if time.monotonic() - self._looked > WATCH / 2:  # this process was stopped
            self._look()
        if self.lost:
            raise HpclrError(
                f"{self._path} is no longer this job's: it has been taken over by {self.lost}, since this one did not "
                "move. What this one has not saved is lost to the run."
            )

    def _keep(self, ended: threading.Event, beat: float) -> None:
        while not self.lost and not ended.wait(beat):
            self._look()
            self._write()

    def _look(self) -> None:
        """Takes note of another owner, by the path: the directory may have been removed and made anew."""
        with suppress(OSError):
            records = self._path / _RECORDS
            newest = _newest(records)
            found = decode(read_record(records / _name(newest))) if newest else None
            if found is not None and (newest, found.identity) != (self._number, self._owner.identity):
                self.lost = str(found)
        self._looked = time.monotonic()

    def _write(self) -> None:
        """A disk that cannot take it does not matter: whoever wants the directory finds out in another way."""
        self._owner.beat = self._owner.check = self._owner.beat + 1
        with suppress(OSError):
            _put(self._file, self._owner.encode())


@contextmanager
def locked(path: Path, *, break_lock: bool = False, watch: float = WATCH) -> Iterator[RunLock]:
    """Holds a run directory, which is made if it is not there, against every other process.

    Args:
        path: the run directory.
        break_lock: take it from an owner of which nothing is known, if its heartbeat stands still.
        watch: seconds to watch that for; the same for all who might want the directory.

    Raises:
        UsageError: if somebody else has it; names the owner. Likewise if it may not be written to.
        RetryableError: if it cannot be written to now.
    """
    with writing(path):
        lock = _take(path, break_lock, watch)
    with lock.held(watch / 3):
        yield lock


def holder(path: Path) -> Owner | None:
    """Whose a run directory is by the records, dead or alive; None if it is free. Changes nothing.

    Raises:
        RetryableError: if that cannot be read now.
        UsageError: if it may not be read.
    """
    if not (path / _RECORDS).is_dir():
        return None
    with writing(path), _opened(path / _RECORDS) as place:
        number = place.newest()
        owner = decode(place.read(number)) if number else None
    if number and owner is None:
        raise RetryableError(f"{path / _RECORDS / _name(number)} says who uses {path}, but is not whole; try again")
    return None if _is_free(owner) else owner


def _take(path: Path, break_lock: bool, watch: float) -> RunLock:
    while True:
        with _opened(path / _RECORDS) as place:
            number, me = place.newest(), this_process()
            over = _require_over(path, place, number, me, break_lock, watch) if number else ""
            file = place.make(number + 1, me.encode())
            if file is None:
                continue  # somebody was quicker; how things are now is another question
            lock = RunLock(path, number + 1, file, me)
            if place.is_there():
                if over:
                    say(f"{path}: taken over from {over}")
                place.sweep()
                return lock
            lock.let_go()


def _require_over(path: Path, place: "_Place", number: int, me: Owner, break_lock: bool, watch: float) -> str:
    """Whose the directory was, and how one knows that they are gone; "" if they have let go.

    Raises:
        UsageError: if they have it still.
    """
    content = place.read(number)
    owner = decode(content)
    if _is_free(owner):
        return ""
    what = str(owner or f"an owner whose record, {path / _RECORDS / _name(number)}, cannot be read")
    fate = fate_of(owner, me) if owner is not None else Fate(None, "")
    if not fate.gone and not (fate.gone is None and break_lock):
        raise _in_use(path, what, fate)
    if fate.seen:
        return f"{what}: {fate.why}"
    say(f"{path} was in use by {what}; watching for {watch:g} s whether it is alive")
    now = place.read_changed(number, content, watch)
    if _is_free(decode(now)):
        return ""
    if now != content:
        raise _in_use(path, what, Fate(False, "it is alive"))
    return f"{what}: {fate.why or f'it has not moved for {watch:g} s'}"


def _is_free(owner: Owner | None) -> bool:
    return owner is not None and owner.state == "free"


def _in_use(path: Path, what: str, fate: Fate) -> UsageError:
    if fate.gone is None:
        advice = f"{_WAIT} If you know that it is gone, add --break-lock."
    else:
        advice = f"{fate.why[0].upper()}{fate.why[1:]}. {_WAIT}"
    return UsageError(f"{path} is in use by {what}. {advice}")


class _Place:
    """The records, in one directory wherever it may be moved."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._directory = path, descriptor

    def is_there(self) -> bool:
        """Whether the directory is still that at the path."""
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._directory))
        except FileNotFoundError:
            return False

    def newest(self) -> int:
        """The highest number; 0 if there is none.

        Raises:
            UsageError: if none can follow it.
        """
        number = _newest(self._directory)
        if number >= _LAST:
            raise UsageError(
                f"{self._path / _name(number)} has the last number that a record can have, expected one below {_LAST}; "
                "counting does not get there. Remove that file once you know that no job uses the run directory"
            )
        return number

    def read(self, number: int) -> bytes:
        """A record; after a moment once more if it was caught half-written."""
        for _ in range(3):
            content = read_record(_name(number), self._directory)
            if decode(content) is not None:
                break
            time.sleep(0.002)
        return content

    def read_changed(self, number: int, content: bytes, seconds: float) -> bytes:
        """A record once it is no longer `content`; after these seconds, as it is."""
        end = time.monotonic() + seconds
        while (now := self.read(number)) == content and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, seconds / 30))
        return now

    def make(self, number: int, content: bytes) -> int | None:
        """Makes a record, whole or not at all; returns its descriptor, or None if it is there already."""
        temporary = f"{_TEMPORARY}{secrets.token_hex(8)}"
        with ExitStack() as undo:
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=self._directory)
            undo.callback(os.close, file)
            with self._passing(temporary):
                _put(file, content)
                if not self._link(temporary, number, file):
                    return None
            undo.pop_all()
        return file

    def sweep(self) -> None:
        """Removes what others who were killed have left; those who are at it find that the directory is taken."""
        for name in os.listdir(self._directory):
            if name.startswith(_TEMPORARY):
                self._remove(name)

    def _link(self, temporary: str, number: int, file: int) -> bool:
        try:
            os.link(temporary, _name(number), src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except (FileExistsError, FileNotFoundError):  # FileNotFoundError: the new owner has swept
            # NFS may have lost the answer of a link that was made, and have asked again: then there are two names
            return os.fstat(file).st_nlink > 1
        except OSError as error:
            if error.errno in _NO_LINKS:
                raise UsageError(
                    f"the file system of {self._path.parent} has no hard links ({error.strerror}), which the lock of a "
                    f"run directory needs; let runs live on another one, with --runs-dir or {RUNS_VARIABLE}"
                ) from error
            raise
        return True

    @contextmanager
    def _passing(self, name: str) -> Iterator[None]:
        """A file that is gone after the block."""
        try:
            yield
        finally:
            self._remove(name)

    def _remove(self, name: str) -> None:
        with suppress(OSError):
            os.unlink(name, dir_fd=self._directory)


@contextmanager
def _opened(path: Path) -> Iterator[_Place]:
    descriptor = _open_directory(path)
    try:
        yield _Place(path, descriptor)
    finally:
        os.close(descriptor)


def _open_directory(path: Path, tries: int = 10) -> int:
    try:
        path.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:  # its owner has just renamed it
        if tries == 1:
            raise
        return _open_directory(path, tries - 1)


def _newest(directory: Path | int) -> int:
    numbers = [int(name) for name in os.listdir(directory) if _NUMBER.fullmatch(name)]
    return max(numbers, default=0)


def _name(number: int) -> str:
    return f"{number:06d}"


def _put(file: int, content: bytes) -> None:
    """Writes a record in place; synchronised, since that is what shows it to other hosts while the file stays open."""
    if os.pwrite(file, content, 0) < len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(file)
