"""What each process of a job knows, for the others to read: in messages, and in files for when there are none.

The files are in the directory where the processes meet. If they do not find one another, or one does not come, hangs
or dies, those that are left read there who came and what became of them.
"""

import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import Literal

import msgspec

from hpclr.cluster.doctor.finding import Finding
from hpclr.cluster.doctor.storage import TEMPORARY
from hpclr.files import write_whole
from hpclr.parallel.meeting.consultation import sweep
from hpclr.parallel.meeting.layout import Layout

_POLL = 0.2  # seconds


class Note(msgspec.Struct, frozen=True):
    """What a process has to say.

    Attributes:
        rank: its rank.
        host: its node.
        local_size: number of processes that were started on the node.
        cores: those it may use.
        findings: of its checks.
        state: checked, then finished if it has measured all, or failed.
        error: why it has failed.
        measured: numbers by name.
    """

    rank: int
    host: str
    local_size: int
    cores: tuple[int, ...]
    findings: tuple[Finding, ...]
    state: Literal["checked", "finished", "failed"] = "checked"
    error: str = ""
    measured: dict[str, float] = {}


class Board:
    """Where the processes of a start leave their notes.

    Args:
        directory: seen by all.
        layout: which of them this is.
    """

    def __init__(self, directory: Path, layout: Layout) -> None:
        start = layout.key or f"{layout.store_address} {os.environ.get('TORCHELASTIC_RUN_ID')}"
        self._pattern = f"{TEMPORARY}{hashlib.sha256(start.encode()).hexdigest()[:12]}-"
        self._directory, self._layout = directory, layout

    def put(self, note: Note) -> None:
        """Leaves or renews this process's note; where it cannot be written the others do without."""
        with contextlib.suppress(OSError):
            sweep(self._directory, f"{TEMPORARY}*-*.json")
            write_whole(self._path(note.rank), msgspec.json.encode(note))

    def notes(self) -> list[Note]:
        """All that are there, by rank."""
        return [note for rank in range(self._layout.world_size) if (note := self._read(rank)) is not None]

    def wait(self, deadline: float) -> list[Note]:
        """All notes, once no more is to be expected of anyone, or at the deadline (of time.monotonic)."""
        while time.monotonic() < deadline:
            notes = self.notes()
            if len(notes) == self._layout.world_size and all(note.state != "checked" for note in notes):
                return notes
            time.sleep(_POLL)
        return self.notes()

    def remove(self, rank: int) -> None:
        """Takes down a note, when all is well; else others may still read it, and it goes after a day."""
        with contextlib.suppress(OSError):
            self._path(rank).unlink(missing_ok=True)

    def _path(self, rank: int) -> Path:
        return self._directory / f"{self._pattern}{rank}.json"

    def _read(self, rank: int) -> Note | None:
        try:
            return msgspec.json.decode(self._path(rank).read_bytes(), type=Note)
        except (OSError, msgspec.MsgspecError):
            return None
