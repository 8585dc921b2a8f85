"""This machine's place in the network: its names, its interfaces and their IPv4 addresses."""

import fcntl
import os
import socket
import struct
from pathlib import Path

from hpclr.errors import UsageError

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_LOOPBACK = "127."


def interfaces() -> dict[str, str | None]:
    """All network interfaces and their IPv4 addresses; None for one without."""
    return {name: _address(name) for _, name in socket.if_nameindex()}


def address_of(interface: str) -> str:
    """The IPv4 address of an interface.

    Raises:
        UsageError: if there is no such interface, or it has no address.
    """
    known = interfaces()
    address = known.get(interface)
    if address is not None:
        return address
    there = ", ".join(f"{name} ({other})" for name, other in known.items() if other is not None) or "none"
    problem = "has no IPv4 address" if interface in known else "does not exist"
    raise UsageError(
        f"parallel.interface is {interface}, which {problem} on {socket.gethostname()}. Interfaces with an address "
        f"there: {there}. Name one of them that all nodes have, or set parallel.interface=null."
    )


def interface_with(address: str) -> str | None:
    """The interface that has an IPv4 address; None if there is none."""
    return next((name for name, other in interfaces().items() if other == address), None)


def own_addresses(interface: str | None, host_suffix: str) -> list[str]:
    """Names and addresses by which other machines may reach this one, the most likely first.

    Args:
        interface: only the address of this one.
        host_suffix: only the names of this machine with this added, before the domain.

    Raises:
        UsageError: if there is no such interface, or the names with the suffix are unknown.
    """
    if interface is not None:
        return [address_of(interface)]
    name, full_name = socket.gethostname(), socket.getfqdn()
    if host_suffix:
        return _known_names([_with_suffix(name, host_suffix), _with_suffix(full_name, host_suffix)])
    addresses = [address for address in interfaces().values() if address and not address.startswith(_LOOPBACK)]
    return list(dict.fromkeys([name, full_name, *addresses]))


def network_namespace() -> str:
    """The same text in processes that reach one another over the loopback interface, and in no others."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    identity = boot.read_text().strip() if boot.exists() else "unknown"
    network = Path("/proc/self/ns/net")
    namespace = os.readlink(network) if network.exists() else "unknown"
    return f"{socket.gethostname()} {identity} {namespace}"


def _with_suffix(name: str, suffix: str) -> str:
    host, dot, domain = name.partition(".")
    return f"{host}{suffix}{dot}{domain}"


def _known_names(names: list[str]) -> list[str]:
    names = list(dict.fromkeys(names))
    known = [name for name in names if _is_known(name)]
    if not known:
        raise UsageError(
            f"No address is known for {' or '.join(names)}: the name of this node with parallel.host_suffix added. "
            "Set it to what your site adds to names of nodes for its fast network (such as i, or -ib), or to an empty "
            "text, or name the interface instead (parallel.interface=ib0)."
        )
    return known


def _is_known(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return True


def _address(interface: str) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        try:
            return socket.inet_ntoa(fcntl.ioctl(connection.fileno(), _SIOCGIFADDR, request)[20:24])
        except OSError:  # the interface has none
            return None
