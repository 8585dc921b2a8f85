"""How fast the processes of a job compute and send, measured so that a slow one shows.

A collective is as slow as the slowest, and does not say who that is. So pairs exchange data as well: all nodes at
once, each with another partner in each round. A slow node is slow with every partner, a good one with slow ones only.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.distributed as dist

from hpclr.cluster.doctor.finding import Finding, failure
from hpclr.parallel.group import Group

_SMALL = 2  # numbers of 4 bytes
_LARGE = 1 << 24  # likewise: 64 MB
_PROBE = 1 << 18
_LONGEST = 4.0  # seconds that one large message may take; on slow networks it is made smaller
_LATENCIES, _REPEATS = 50, 3
_ROUNDS = 7  # of exchanges; with up to eight nodes each meets each
_COMPUTING = 0.7  # seconds of matrix products
_SIDE = {"cpu": 512, "cuda": 8192}
_PINGS = 5


def measure(group: Group, device: torch.device, hosts: Sequence[str]) -> tuple[dict[str, float], list[Finding]]:
    """All measurements; collective.

    Args:
        group: the processes.
        device: where this one computes.
        hosts: the node of each, by rank.

    Returns:
        product: of this process, in GFLOP/s; pair: its best exchange, in MB/s; clock: seconds that its node's clock is
        ahead of the first one's, and clock error: how wrong that may be; latency: of an all-reduce of 8 B, in µs;
        bandwidth: of one of 64 MB, in MB/s of a ring's links. Some are missing for one process. Besides, faults.
    """
    group.barrier()
    found, faults = _product(device)
    if group.size > 1:
        found["clock"], found["clock error"] = _clock(group, hosts)
        elements = _affordable(group, device)
        found["latency"] = 1e6 * median(_times(_Reduce(_SMALL, device), _LATENCIES))
        found["bandwidth"], wrong = _bandwidth(group, device, elements)
        faults += wrong
        found |= _exchange(group, device, max(_SMALL, elements // 4), hosts)
    return found, faults


def _product(device: torch.device) -> tuple[dict[str, float], list[Finding]]:
    """Speed of matrix products, while all processes compute; and whether they always come out the same."""
    side = _SIDE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, dtype=dtype, device=device, generator=generator) for _ in range(2))
    first = a @ b
    _synchronise(device)
    began, count = time.monotonic(), 0
    while time.monotonic() - began < _COMPUTING:
        again = a @ b
        _synchronise(device)
        count += 1
    speed = 2e-9 * side**3 * count / (time.monotonic() - began)
    if torch.equal(first, again):
        return {"product": speed}, []
    return {"product": speed}, [failure("product", "the same product differs from time to time", "Leave the node out.")]


class _Reduce:
    """An all-reduce, to be called again and again."""

    def __init__(self, elements: int, device: torch.device) -> None:
        self._tensor = torch.zeros(elements, device=device)

    def __call__(self) -> None:
        dist.all_reduce(self._tensor)
        _synchronise(self._tensor.device)


def _times(action: Callable[[], None], count: int) -> list[float]:
    """Seconds of each call, after one that does not count."""
    action()
    times = []
    for _ in range(count):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return times


def _affordable(group: Group, device: torch.device) -> int:
    """How many numbers a large message has, so that it does not take too long; the same for all."""
    took = max(group.gather(max(_times(_Reduce(_PROBE, device), 1))))
    size = _LARGE
    while size > _PROBE and took * size / _PROBE > _LONGEST:
        size //= 2
    return size


def _bandwidth(group: Group, device: torch.device, elements: int) -> tuple[float, list[Finding]]:
    """MB/s that each link of a ring carries: 2(n-1)/n of the data, as the tests of NCCL count it; and faults."""
    tensor = torch.full((elements,), group.rank + 1.0, device=device)
    dist.all_reduce(tensor)
    right = bool((tensor == group.size * (group.size + 1) / 2).all())
    took = min(_times(_Reduce(elements, device), _REPEATS))
    speed = 4e-6 * elements / took * 2 * (group.size - 1) / group.size
    return speed, [] if right else [
        failure("all-reduce", "the sum is wrong", "Leave the node out; try without its GPU.")
    ]


def _exchange(group: Group, device: torch.device, elements: int, hosts: Sequence[str]) -> dict[str, float]:
    """The best speed with any partner, in MB/s; nothing for a process that has none.

    Process i of a node exchanges with process i of another; on one node processes with processes.
    """
    nodes = _members(hosts)
    units = list(nodes.values()) if len(nodes) > 1 else [[rank] for rank in range(group.size)]
    best = 0.0
    for pairs in tournament(len(units))[:_ROUNDS]:
        partner = _partner(group.rank, units, pairs)
        group.barrier()
        if partner is not None:
            best = max(best, _speed_with(partner, group.rank, device, elements))
    return {"pair": best} if best else {}


def _members(hosts: Sequence[str]) -> dict[str, list[int]]:
    members: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        members.setdefault(host, []).append(rank)
    return members


def _partner(rank: int, units: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]]) -> int | None:
    for pair in pairs:
        for mine, other in (pair, pair[::-1]):
            if rank in units[mine]:
                place = units[mine].index(rank)
                return units[other][place] if place < len(units[other]) else None
    return None


def _speed_with(partner: int, rank: int, device: torch.device, elements: int) -> float:
    tensor = torch.zeros(elements, device=device)

    def there_and_back() -> None:
        first, second = (dist.send, dist.recv) if rank < partner else (dist.recv, dist.send)
        first(tensor, partner)
        second(tensor, partner)
        _synchronise(device)

    took = torch.tensor([min(_times(there_and_back, _REPEATS))], device=device)
    if rank < partner:  # the other may be done before all has arrived here
        dist.send(took, partner)
    else:
        dist.recv(took, partner)
    return 2 * 4e-6 * elements / float(took)


def tournament(count: int) -> list[list[tuple[int, int]]]:
    """Rounds in which each of `count` meets each other once, all at the same time (the circle method)."""
    ring = list(range(count + count % 2))
    rounds = []
    for _ in range(len(ring) - 1):
        pairs = [(ring[i], ring[-1 - i]) for i in range(len(ring) // 2)]
        rounds.append([pair for pair in pairs if max(pair) < count])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return rounds


def _clock(group: Group, hosts: Sequence[str]) -> tuple[float, float]:
    """Seconds that this node's clock is ahead of the first one's, and how wrong that may be: half a round trip."""
    group.barrier()
    mine = 0.0, 0.0
    for other in [ranks[0] for ranks in _members(hosts).values()][1:]:
        offset, error = min((_ping(group, other) for _ in range(_PINGS)), key=lambda one: one[1])
        offsets, _ = group.broadcast([offset, error])
        if hosts[group.rank] == hosts[other]:
            mine = offsets[0], offsets[1]
    return mine


def _ping(group: Group, other: int) -> tuple[float, float]:
    """The first process asks another for the time, as NTP does (RFC 5905); (0, 0) on the others."""
    began = time.time()
    clock = torch.tensor([began], dtype=torch.float64, device=group.device)
    if group.rank == 0:
        dist.send(clock, other)
        dist.recv(clock, other)
        ended = time.time()
        return float(clock) - (began + ended) / 2, (ended - began) / 2
    if group.rank == other:
        dist.recv(clock, 0)
        clock.fill_(time.time())
        dist.send(clock, 0)
    return 0.0, 0.0


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
