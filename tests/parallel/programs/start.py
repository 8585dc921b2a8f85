"""A replica is made where each process begins with weights of its own; leaves what was sent for it."""

import torch
import torch.distributed as dist
from leaving import leave
from torch import nn

from hpclr.parallel import Replica, replica
from hpclr.parallel.digest import digest

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)
model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(10)), nn.Linear(64, 1024), nn.BatchNorm1d(1024))
model[-1].running_mean.normal_()
before = digest(model.state_dict().values())

replica._PARCEL = 40_000  # bytes: two of the first layers
sent: list[int] = []
broadcast = dist.broadcast


def noted(tensor, source):
    sent.append(tensor.numel() * tensor.element_size())
    broadcast(tensor, source)


dist.broadcast = noted
Replica(model)
result = {"before": before, "after": digest(model.state_dict().values()), "sent": sent}
leave(result)
