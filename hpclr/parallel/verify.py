"""Replicas must be equal to the bit; where they are not, nothing that follows can be trusted."""

from collections import Counter
from collections.abc import Mapping

from hpclr.errors import HpclrError
from hpclr.parallel.group import Group


class ReplicasDifferError(HpclrError):
    """Processes that must hold the same hold different things."""


def require_equal(group: Group, facts: Mapping[str, str]) -> None:
    """Compares facts, such as digests, over all processes; collective.

    Args:
        group: the processes.
        facts: what is compared → this process's value.

    Raises:
        ReplicasDifferError: on every process; names what differs and the ranks that are in the minority.
    """
    if group.size == 1:
        return
    found = group.gather(dict(facts))
    for what in facts:
        values = [one[what] for one in found]
        if len(set(values)) > 1:
            error = ReplicasDifferError(_difference(what, values))
            error.shared = not group.is_first
            raise error


def _difference(what: str, values: list[str]) -> str:
    usual, count = Counter(values).most_common(1)[0]
    odd = [str(rank) for rank, value in enumerate(values) if value != usual]
    who = f"ranks {', '.join(odd)} differ from the other {count}" if count > len(odd) else "no majority agrees"
    return (
        f"the {what} are not the same on all {len(values)} processes ({who}), though they must be, to the bit. "
        "A forward pass that went around the replica, so that its gradients were not reduced, can cause this; so can "
        "CPUs of different kinds, different numbers of threads, code that draws random numbers of its own, or a "
        "faulty machine. Mend that and continue from the last checkpoint."
    )
