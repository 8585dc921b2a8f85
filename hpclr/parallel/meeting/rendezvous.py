"""How the processes of a job find one another: in the end all share one store, through which torch connects them.

Rank 0 opens a store on a free port; where it is, the others learn over MPI, or from a file in a directory that all
see. torchrun, and who exports MASTER_ADDR and MASTER_PORT, says it beforehand. Only plain text (JSON) is exchanged.
"""

import hashlib
import json
import os
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hpclr.errors import RetryableError, UsageError
from hpclr.files import write_whole
from hpclr.parallel import mpi
from hpclr.parallel.meeting import network
from hpclr.parallel.meeting.consultation import consult, first_line, sweep
from hpclr.parallel.meeting.layout import Layout

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_TOKEN = "hpclr/token"  # noqa: S105 - the key under which a store says whose it is
_ONE_TRY = 3.0  # seconds for a connection, which takes milliseconds where it succeeds
_ALL_TRIES = 30.0  # seconds of trying to reach one rank 0 whose store is open
_PAUSE = 0.05
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class _Contact(NamedTuple):
    """Where rank 0 can be reached, or why not."""

    addresses: list[str]
    port: int
    token: str
    machine: str
    error: str | None = None


class _Connection(NamedTuple):
    """A store, and between which addresses it is reached; None on rank 0's own side."""

    store: "Store"
    local: str | None = None
    peer: str | None = None


class _UnreachableError(Exception):
    """No way to the store; the text lists what was tried."""


def meet(
    layout: Layout,
    *,
    directory: Path,
    timeout: float,
    interface: str | None = None,
    host_suffix: str = "",
    keep_mpi: bool = False,
) -> "Store":
    """Brings all processes of the job together, and tells gloo and NCCL which network to use.

    All processes call it. GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME are set unless they are there.

    Args:
        layout: which process this is.
        directory: seen by all processes; holds a small file until all have met, where there is no MPI.
        timeout: seconds to wait for the others.
        interface: network interface to use; None: the one that reaches rank 0.
        host_suffix: what turns the name of rank 0's node into that of its fast network.
        keep_mpi: MPI is needed later; else it is ended, after all have met.

    Returns:
        A store that all processes share. It lives in rank 0, or in torchrun.

    Raises:
        UsageError: if settings do not fit the network, or MPI sees other processes than the environment.
        RetryableError: if some process does not come, or does not reach rank 0.
    """
    if layout.world_size == 1:
        from torch.distributed import HashStore  # type: ignore[attr-defined]

        return HashStore()
    comm = _mpi_world(layout) if keep_mpi or _meets_over_mpi(layout) else None
    if layout.store_address is not None:
        connection = _given_store(layout, layout.store_address, timeout)
    elif layout.rank == 0:
        connection = _open(layout, comm, directory, timeout, interface, host_suffix)
    else:
        connection = _find(layout, comm, directory, timeout)
    try:
        _call_the_roll(layout, connection, timeout, interface)
    finally:
        if layout.rank == 0 and layout.key is not None:
            _meeting_file(directory, layout.key).unlink(missing_ok=True)
    if comm is not None and not keep_mpi:
        mpi.leave()
    return connection.store


def _meets_over_mpi(layout: Layout) -> bool:
    return layout.launcher == "mpi" and mpi.is_installed()


def _mpi_world(layout: Layout) -> Any:
    comm = mpi.world_until_leave("Meeting over MPI")
    if (comm.Get_rank(), comm.Get_size()) == (layout.rank, layout.world_size):
        return comm
    raise UsageError(
        f"By the environment this is rank {layout.rank} of {layout.world_size} ({layout.launcher}), but mpi4py's MPI "
        f"sees rank {comm.Get_rank()} of {comm.Get_size()}: the launcher and mpi4py's MPI library do not belong "
        "together. Use the mpirun of the MPI that mpi4py was built with (in a container: the same MPI inside and "
        "outside), under srun give --mpi=pmix or --mpi=pmi2; or do without MPI."
    )


# ---- rank 0 opens a store, and says where


def _open(
    layout: Layout, comm: Any, directory: Path, timeout: float, interface: str | None, host_suffix: str
) -> _Connection:
    try:
        addresses = network.own_addresses(interface, host_suffix)
    except UsageError as error:  # the others wait for an answer
        _publish(layout, comm, directory, timeout, _Contact([], 0, "", "", str(error)))
        raise
    store = _serve("127.0.0.1", 0, timeout)
    contact = _Contact(addresses, store.port, secrets.token_hex(16), network.network_namespace())
    store.set(_TOKEN, contact.token)
    _publish(layout, comm, directory, timeout, contact)
    return _Connection(store)


def _publish(layout: Layout, comm: Any, directory: Path, timeout: float, contact: _Contact) -> None:
    content = json.dumps(contact._asdict()).encode()
    if comm is not None:
        mpi.broadcast(comm, content, timeout)
        return
    sweep(directory, ".meeting-*")
    try:
        write_whole(_meeting_file(directory, _key(layout)), content, mode=0o600)
    except OSError as error:
        raise RetryableError(f"Rank 0 cannot write into {directory}, where the processes meet: {error}.") from error


def _meeting_file(directory: Path, key: str) -> Path:
    return directory / f".meeting-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _key(layout: Layout) -> str:
    if layout.key is None:
        raise UsageError(
            f"The processes that {layout.launcher} started cannot find one another: mpi4py is not installed, and this "
            "MPI gives a start no name of its own. Install it with `pip install 'hpclr[mpi]'`, or use torchrun."
        )
    return layout.key


# ---- the others find it


def _find(layout: Layout, comm: Any, directory: Path, timeout: float) -> _Connection:
    if comm is None:
        return _find_by_file(layout, _meeting_file(directory, _key(layout)), timeout)
    contact = _parse(mpi.broadcast(comm, b"", timeout))
    if contact is None:
        raise RetryableError("What rank 0 said over MPI is no address.")
    return _reach(contact, timeout)


def _find_by_file(layout: Layout, path: Path, timeout: float) -> _Connection:
    """Reads the file until it leads to rank 0: one that an earlier start left behind leads nowhere."""
    deadline = time.monotonic() + timeout
    tried, since, last = "", deadline, ""
    while time.monotonic() < min(deadline, since + _ALL_TRIES):
        contact = _read_contact(path)
        if contact is not None:
            if contact.token != tried:
                tried, since = contact.token, time.monotonic()
            try:
                return _connect(contact, timeout)
            except _UnreachableError as error:
                last = str(error)
        time.sleep(_PAUSE)
    if last:
        raise RetryableError(_unreachable(last))
    raise RetryableError(
        f"Rank 0 did not come: rank {layout.rank} waited {timeout:g} s (parallel.timeout) for {path}. Look in rank 0's "
        "log for an error, and whether its node sees the same directory."
    )


def _read_contact(path: Path) -> _Contact | None:
    try:
        # Listing the directory makes a network file system look again.
        return _parse(path.read_bytes()) if path.name in os.listdir(path.parent) else None
    except OSError:
        return None


def _parse(content: bytes) -> _Contact | None:
    try:
        contact = _Contact(**json.loads(content))
    except (ValueError, TypeError):
        return None
    return contact


def _reach(contact: _Contact, timeout: float) -> _Connection:
    deadline = time.monotonic() + min(timeout, _ALL_TRIES)
    while True:
        try:
            return _connect(contact, timeout)
        except _UnreachableError as error:
            if time.monotonic() > deadline:
                raise RetryableError(_unreachable(str(error))) from error
        time.sleep(_PAUSE)


def _connect(contact: _Contact, timeout: float) -> _Connection:
    """Tries all addresses of rank 0 once."""
    if contact.error is not None:
        raise UsageError(contact.error)
    addresses = contact.addresses
    if contact.machine == network.network_namespace():
        addresses = ["127.0.0.1", *addresses]
    tried = []
    for address in addresses:
        try:
            connection = _client(address, contact.port, timeout)
            if _token(connection.store) == contact.token:
                return connection
            tried.append(f"{address}:{contact.port} (another job's store)")
        except (OSError, UnicodeError, RuntimeError) as error:
            tried.append(f"{address}:{contact.port} ({first_line(error)})")
    raise _UnreachableError(", ".join(tried))


def _token(store: "Store") -> str:
    store.wait([_TOKEN], timedelta(seconds=_ONE_TRY))
    return store.get(_TOKEN).decode(errors="replace")


def _unreachable(tried: str) -> str:
    return (
        f"{socket.gethostname()} cannot reach rank 0; tried {tried}. If the nodes have a network that they reach one "
        "another by, set parallel.interface to its interface (such as ib0) or parallel.host_suffix to what it adds to "
        "names of nodes (such as i); a firewall between the nodes must let their own ports through."
    )


# ---- a store whose address was given


def _given_store(layout: Layout, address: tuple[str, int], timeout: float) -> _Connection:
    """torchrun's own store, or the one that rank 0 opens where MASTER_ADDR and MASTER_PORT say."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    in_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if layout.rank == 0 and not in_torchrun:
        try:
            connection = _Connection(_serve(address[0], address[1], timeout))
        except RuntimeError as error:
            raise UsageError(
                f"Rank 0 cannot open MASTER_PORT={address[1]} on {socket.gethostname()}: {first_line(error)} Choose "
                "another port, or start with torchrun, mpirun or srun, which need none."
            ) from error
    else:
        connection = _await_given(address, timeout)
    return connection._replace(store=PrefixStore(f"hpclr/attempt-{attempt}", connection.store))


def _await_given(address: tuple[str, int], timeout: float) -> _Connection:
    deadline = time.monotonic() + timeout
    while True:
        try:
            return _client(*address, timeout)
        except (OSError, UnicodeError, RuntimeError) as error:
            if time.monotonic() > deadline:
                raise RetryableError(
                    f"{socket.gethostname()} cannot reach the store at {address[0]}:{address[1]} (MASTER_ADDR, "
                    f"MASTER_PORT) within {timeout:g} s (parallel.timeout): {first_line(error)}. If the name is that "
                    "of a slower or closed network, give torchrun --local-addr with the node's name on the other one."
                ) from error
        time.sleep(_PAUSE)


# ---- stores


def _serve(address: str, port: int, timeout: float) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))


def _client(address: str, port: int, timeout: float) -> _Connection:
    """Connects to a store; what is on the port must answer like one.

    Raises:
        OSError: if nothing is reached.
        RuntimeError: if it is no store.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    with socket.create_connection((address, port), timeout=_ONE_TRY) as probe:
        local, peer = probe.getsockname()[0], probe.getpeername()[0]
    store = _within(2 * _ONE_TRY, lambda: TCPStore(peer, port, is_master=False, timeout=timedelta(seconds=timeout)))
    return _Connection(store, local, peer)


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of a call that may never return: torch waits without limit for the greeting of a store."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not results:
        raise TimeoutError("what listens there is no store")
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


# ---- all are there


def _call_the_roll(layout: Layout, connection: _Connection, timeout: float, interface: str | None) -> None:
    card = {"machine": network.network_namespace(), "peer": connection.peer, "error": None}
    try:
        if interface is not None:
            network.address_of(interface)
    except UsageError as error:
        card["error"] = str(error)
    answer = consult(connection.store, layout, "meeting", card, _judge_roll, timeout)
    name = interface or _interface(answer, connection)
    if name is not None:
        for variable in _INTERFACE_VARIABLES:
            os.environ.setdefault(variable, name)


def _judge_roll(cards: list[dict[str, Any]]) -> dict[str, Any]:
    for card in cards:
        if card["error"] is not None:
            raise UsageError(card["error"])
    first = cards[0]["machine"]
    peers = Counter(card["peer"] for card in cards if card["machine"] != first)
    return {"machine": first, "address": peers.most_common(1)[0][0] if peers else None}


def _interface(answer: dict[str, Any], connection: _Connection) -> str | None:
    """The loopback interface on one machine; else the one between the others and rank 0's machine."""
    if answer["address"] is None:
        return network.interface_with("127.0.0.1")
    near = network.network_namespace() == answer["machine"]
    address = answer["address"] if near else connection.local
    return network.interface_with(address) if address else None
