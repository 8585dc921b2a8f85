"""Every process proves that it belongs to this run and this attempt, and that it works on the same things.

The secret is a file in the run directory that its owner alone can read. It is new for each attempt and gone as soon
as all have read it; what a process states is signed with it (HMAC-SHA256).
"""

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hpclr.errors import HpclrError, RetryableError, UsageError, error_of
from hpclr.files import write_whole
from hpclr.parallel.meeting.consultation import consult, ranks_text, sweep
from hpclr.parallel.meeting.layout import Layout

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_LENGTH = 32  # bytes
_VISIBLE = 5.0  # seconds until a new file is seen through a network file system
_SHORT = 12  # characters of a value in a message, more where they begin alike
_NAME = re.compile(r"\.nonce-[0-9a-f]{16}")
_NAME_KEY = "hpclr/nonce/name"


class Statement(NamedTuple):
    """What one process said of itself."""

    rank: int
    host: str
    facts: dict[str, str]  # the same on all
    own: dict[str, str]  # its own


def share_secret(store: "Store", layout: Layout, directory: Path, timeout: float) -> bytes:
    """The secret of this attempt, which rank 0 makes and everyone reads from the run directory. All call it, once.

    Raises:
        UsageError: if a process does not see the file, or not as its owner's alone; on all processes.
        RetryableError: if a process does not come, or the file cannot be written.
    """
    secret, path, error = b"", None, None
    try:
        if layout.rank == 0:
            path = _write_secret(directory)
            store.set(_NAME_KEY, path.name)
        secret = _read_secret(directory / _name(store, timeout))
    except HpclrError as problem:
        error = problem
        if layout.rank == 0 and path is None:
            store.set(_NAME_KEY, "")
    card = {"error": str(error) if error else None, "code": error.exit_code if error else 0}
    try:
        consult(store, layout, "nonce", card, _all_have_read, timeout)
    finally:
        if path is not None:
            path.unlink(missing_ok=True)
    return secret


def agree(
    store: "Store",
    layout: Layout,
    secret: bytes,
    round: str,
    facts: Mapping[str, str],
    timeout: float,
    *,
    own: Mapping[str, str] | None = None,
) -> list[Statement]:
    """Compares facts over all processes, each of which proves that it belongs to the run. All call it.

    Args:
        store: shared by all.
        layout: which process this is.
        secret: from `share_secret`.
        round: names the attempt and the occasion; used once.
        facts: must be the same everywhere; the names are those for messages, such as "data digest".
        timeout: seconds to wait for the others.
        own: further things that others are to know of this process; not compared.

    Returns:
        What all processes stated, by rank.

    Raises:
        UsageError: on all processes, if one cannot prove that it belongs to this run, or facts differ; names them.
        RetryableError: on all processes, if one does not come; names it.
    """
    host = socket.gethostname()
    payload = json.dumps({"rank": layout.rank, "host": host, "facts": dict(facts), "own": dict(own or {})})
    card = {"host": host, "payload": payload, "proof": _sign(secret, round, layout.rank, layout.world_size, payload)}

    def judge(cards: list[dict[str, Any]]) -> dict[str, str]:
        statements = _verified(cards, secret, round)
        _compare(statements)
        answer = json.dumps(statements)
        return {"payload": answer, "proof": _sign(secret, round, "verdict", layout.world_size, answer)}

    verdict = consult(store, layout, round, card, judge, timeout)
    expected = _sign(secret, round, "verdict", layout.world_size, verdict["payload"])
    if not hmac.compare_digest(expected, verdict["proof"]):
        raise UsageError(f"Rank 0's verdict on {round} is not signed with the secret of this run. Start the run anew.")
    return [Statement(*statement) for statement in json.loads(verdict["payload"])]


def _write_secret(directory: Path) -> Path:
    sweep(directory, ".nonce-*")
    path = directory / f".nonce-{secrets.token_hex(8)}"
    try:
        write_whole(path, secrets.token_bytes(_LENGTH), mode=0o600)
    except OSError as error:
        raise RetryableError(f"Rank 0 cannot write into the run directory {directory}: {error}.") from error
    return path


def _name(store: "Store", timeout: float) -> str:
    from torch.distributed import DistError

    try:
        name = store.get(_NAME_KEY).decode()
    except DistError as error:
        raise RetryableError(f"Rank 0 did not name the secret of this attempt within {timeout:g} s.") from error
    if not _NAME.fullmatch(name):
        raise RetryableError("Rank 0 could not write the secret of this attempt.")
    return name


def _read_secret(path: Path) -> bytes:
    descriptor = _open_when_visible(path)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        mode = stat.S_IMODE(status.st_mode)
        if status.st_uid != os.geteuid() or mode & 0o077 or not stat.S_ISREG(status.st_mode):
            raise UsageError(
                f"{path} belongs to user {status.st_uid} with mode {mode:04o}, but must belong to user {os.geteuid()} "
                "with mode 0600, so that nobody else can join this run. All processes must run as one user, in a "
                "directory whose file system keeps owners and modes."
            )
        secret = file.read(_LENGTH + 1)
    if len(secret) != _LENGTH:
        raise UsageError(
            f"{path} has {len(secret)} bytes, not {_LENGTH}: something else writes into the run directory."
        )
    return secret


def _open_when_visible(path: Path) -> int:
    deadline = time.monotonic() + _VISIBLE
    while True:
        try:
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError as error:
            if time.monotonic() > deadline:
                raise UsageError(
                    f"{socket.gethostname()} does not see {path}, which rank 0 wrote: the run directory must be on a "
                    "file system that all nodes share (and be bound into the container). Set --runs-dir to one that is."
                ) from error
        except OSError as error:
            raise UsageError(f"{socket.gethostname()} cannot read {path}, which rank 0 wrote: {error}.") from error
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # makes a network file system look again
        time.sleep(0.05)


def _all_have_read(cards: list[dict[str, Any]]) -> None:
    for card in cards:
        if card["error"] is not None:
            raise error_of(card["code"], card["error"])


def _sign(secret: bytes, round: str, who: int | str, world_size: int, payload: str) -> str:
    message = json.dumps([round, who, world_size, payload]).encode()
    return hmac.new(secret, message, hashlib.sha256).hexdigest()


def _verified(cards: list[dict[str, Any]], secret: bytes, round: str) -> list[Statement]:
    def is_true(rank: int, card: dict[str, Any]) -> bool:
        return hmac.compare_digest(_sign(secret, round, rank, len(cards), str(card["payload"])), str(card["proof"]))

    wrong = [rank for rank, card in enumerate(cards) if not is_true(rank, card)]
    if wrong:
        hosts = {rank: str(card["host"]) for rank, card in enumerate(cards)}
        raise UsageError(
            f"{_who(wrong, hosts)} cannot prove to belong to this run and attempt: it was left over from another one, "
            "or something else joined. End what is still running of earlier attempts, and start again."
        )
    return [Statement(**json.loads(card["payload"])) for card in cards]


def _compare(statements: Sequence[Statement]) -> None:
    """Raises a UsageError that names every fact that is not the same everywhere, and who has what."""
    names = dict.fromkeys(name for statement in statements for name in statement.facts)
    hosts = {statement.rank: statement.host for statement in statements}
    differences = []
    for name in names:
        having: dict[str, list[int]] = {}
        for statement in statements:
            having.setdefault(statement.facts.get(name, "none"), []).append(statement.rank)
        if len(having) > 1:
            differences.append(f"{name}: {_groups(having, hosts)}")
    if differences:
        raise UsageError(
            f"The processes of this job do not work on the same things. {'; '.join(differences)}. All nodes must see "
            "the same run file, code and data: look for copies on single nodes, and for files that changed meanwhile."
        )


def _groups(having: dict[str, list[int]], hosts: dict[int, str]) -> str:
    """Who has which value, the fewest first."""
    short = _shortened(list(having))
    groups = sorted(having.items(), key=lambda group: (len(group[1]), group[1][::-1]))
    return ", ".join(
        f"{_who(ranks, hosts)} {'has' if len(ranks) == 1 else 'have'} {short[value]}" for value, ranks in groups
    )


def _shortened(values: list[str]) -> dict[str, str]:
    """Values cut as short as keeps them apart."""
    length = _SHORT
    while len({value[:length] for value in values}) < len(values):
        length *= 2
    return {value: value if len(value) <= length else value[:length] + "…" for value in values}


def _who(ranks: list[int], hosts: dict[int, str]) -> str:
    names = sorted({hosts[rank] for rank in ranks})
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{ranks_text(ranks)} ({listed})"
