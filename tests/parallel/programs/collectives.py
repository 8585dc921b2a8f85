"""Every collective of a Group, on what torchrun starts; leaves what each process got."""

import torch
import torch.distributed as dist
from leaving import leave

from hpclr.errors import HpclrError, RetryableError, UsageError
from hpclr.parallel.group import Group
from hpclr.parallel.verify import ReplicasDifferError, require_equal

dist.init_process_group("gloo")
group = Group()
rank, size = group.rank, group.size


def raised(action):
    try:
        action()
    except HpclrError as error:
        return [type(error).__name__, str(error), error.shared]
    return None


def fail_on(*ranks, kind=UsageError):
    def action():
        if rank in ranks:
            raise kind(f"wrong on {rank}")

    return action


value, [tensor] = group.broadcast({"from": rank}, [torch.full((3,), float(rank))], source=size - 1)
moved = group.move("hello", [torch.arange(4)], 1, 0)
drifted = torch.ones(2) + (rank == 1)
result = {
    "sum": group.sum(torch.tensor([1.0, rank])).tolist(),
    "gather": group.gather([rank] * rank),
    "broadcast": [value, tensor.tolist()],
    "exchange": [[who, t.tolist()] for who, [t] in group.exchange(rank, [torch.tensor([rank])])],
    "moved": None if moved is None else [moved[0], moved[1][0].tolist()],
    "on_first": group.on_first(lambda: [rank, "first"]),
    "on_first_fails": raised(lambda: group.on_first(fail_on(0, kind=RetryableError))),
    "together": group.together(lambda: rank),
    "together_fails": raised(lambda: group.together(fail_on(1))),
    "all_fail": raised(lambda: group.together(fail_on(*range(size)))),
    "equal": raised(lambda: require_equal(group, {"weights": "same"})),
    "drifted": raised(lambda: require_equal(group, {"weights": str(drifted.sum())})),
    "kind": ReplicasDifferError.__name__,
}
from torch import nn  # noqa: E402

from hpclr import OIALR  # noqa: E402
from hpclr.parallel import Replica  # noqa: E402


def gradient(prepare):
    """Of a weight, after a backward pass on data of this process's own."""
    torch.manual_seed(0)
    replica = Replica(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))
    prepare(replica)
    replica(torch.full((2, 4), 1.0 + rank)).sum().backward()
    return replica.module[0].weight.grad.tolist()


def went_around():
    """Some gradients are not reduced, though nothing that a check replaces differs."""
    torch.manual_seed(0)
    replica = Replica(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)))
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.1)
    oialr = OIALR(replica, optimizer, delay=1, every=1, layer_fraction=1.0)
    for step in range(3):
        replica.module(torch.full((2, 6), 1.0 + rank + step)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        oialr.step()


result["eval_mode"] = gradient(lambda replica: replica.eval())
result["went_around"] = raised(went_around)
leave(result)
