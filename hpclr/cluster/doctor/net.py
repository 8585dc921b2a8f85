"""The network: names, interfaces, which of them gloo and NCCL would take, InfiniBand."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from hpclr.cluster.doctor.circumstances import Circumstances
from hpclr.cluster.doctor.finding import Finding, failure, ok, warning
from hpclr.errors import UsageError
from hpclr.parallel.meeting import network

_PORTS = Path("/sys/class/infiniband")
_SLOW = 2.0  # seconds for an answer of the name service
_GLOO, _NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def examine(here: Circumstances) -> Iterator[Finding]:
    """Looks; asks the name service for this host's own name only."""
    known = {name: address for name, address in network.interfaces().items() if address}
    yield ok("interfaces", ", ".join(f"{name} {address}" for name, address in known.items()) or "none")
    address, took = _resolve(socket.gethostname())
    yield _name(address, took, here.spans_nodes)
    for variable in (_GLOO, _NCCL):
        yield from _chosen(variable, known)
    yield from _of_run_file(here)
    yield _taken(known, address)
    yield from _infiniband()


def _resolve(name: str) -> tuple[str | None, float]:
    """The address of a name, if any, and the seconds that it took."""
    began = time.monotonic()
    try:
        found: str | None = socket.gethostbyname(name)
    except OSError:
        found = None
    return found, time.monotonic() - began


def _name(address: str | None, took: float, spans_nodes: bool) -> Finding:
    host = socket.gethostname()
    advice = (
        "hpclr finds its way by addresses, but torchrun with this name for --rdzv-endpoint, and Open MPI, may not: put "
        "the name and its address into the name service or /etc/hosts."
    )
    if address is None:
        return warning("host name", f"{host} has no address", advice)
    if took > _SLOW:
        return warning("host name", f"{host} is {address}, which took {took:.0f} s to find out", _SLOW_NAMES)
    if spans_nodes and address.startswith("127."):
        return warning("host name", f"{host} is {address}, which other nodes cannot reach", advice)
    return ok("host name", f"{host} is {address}")


_SLOW_NAMES = (
    "A name server in /etc/resolv.conf does not answer, and every start waits for it: tell the administrators."
)


def _chosen(variable: str, known: dict[str, str]) -> Iterator[Finding]:
    """An interface that is named in the environment must be there."""
    chosen = os.environ.get(variable, "")
    if variable == _NCCL and chosen[:1] in ("^", "="):  # NCCL's: all but these; exactly these
        return
    if chosen and not any(_fits(name, chosen, variable) for name in known):
        yield failure(
            "network",
            f"{variable}={chosen}, but no such interface has an address here",
            f"Name one of {', '.join(known)}, or unset it: hpclr takes the interface that reaches the first process.",
        )


def _fits(name: str, chosen: str, variable: str) -> bool:
    """gloo takes full names; NCCL beginnings of names, with commas."""
    return name == chosen if variable == _GLOO else any(name.startswith(part) for part in chosen.split(","))


def _of_run_file(here: Circumstances) -> Iterator[Finding]:
    """`parallel.interface` and `parallel.host_suffix` of the run's file must work on this node."""
    if here.settings.interface is None and not here.settings.host_suffix:
        return
    try:
        found = network.own_addresses(here.settings.interface, here.settings.host_suffix)
    except UsageError as error:
        yield failure("network", str(error), "Change the run file, or leave this node out.")
    else:
        yield ok("network", f"the run's file chooses {', '.join(found)}")


def _taken(known: dict[str, str], address: str | None) -> Finding:
    """What hpclr leaves alone it sets when the processes meet; this is what others get."""
    gloo = os.environ.get(_GLOO) or next((name for name, other in known.items() if other == address), "the loopback")
    nccl = os.environ.get(_NCCL) or _by_nccl(list(known))
    return ok(
        "network", f"by themselves gloo would take {gloo}, NCCL {nccl}; hpclr takes what reaches the first process"
    )


def _by_nccl(names: list[str]) -> str:
    """NCCL's own order: InfiniBand, then any other, containers' and the loopback last (its manual, on the variable)."""
    ranks = {"ib": 0, "docker": 2, "lo": 3}
    order = sorted(names, key=lambda name: next((ranks[start] for start in ranks if name.startswith(start)), 1))
    return order[0] if order else "none"


def _infiniband() -> Iterator[Finding]:
    ports = sorted(_PORTS.glob("*/ports/*"))
    if not ports:
        return
    states = {f"{port.parts[-3]}/{port.name}": _line(port / "state").partition(": ")[2] for port in ports}
    rates = {name: _line(port / "rate") for name, port in zip(states, ports, strict=True)}
    active = [name for name, state in states.items() if state == "ACTIVE"]
    if not active:
        yield warning("infiniband", f"none of {len(ports)} ports is active", "Tell the administrators.")
        return
    text = ", ".join(f"{name} {rates[name]}" for name in active)
    yield ok("infiniband", f"{len(active)} of {len(ports)} ports active: {text}", same=text)


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
