"""What processes gather for a check in ways of their own: one of them alone, and a layer that only one of them uses."""

import torch
import torch.distributed as dist
from leaving import leave
from torch import nn

from hpclr import OIALR
from hpclr.parallel.group import Group
from hpclr.parallel.placement import Rank0

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_default_dtype(torch.float64)


def share(*gathered: tuple[int, ...]) -> dict[str, float]:
    """The shares at the check after one step, for the parts of the batch that each of this process's passes takes."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(6, 8), nn.Linear(6, 8)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    placement = Rank0(Group(), lambda what, *, waiting: None)
    oialr = OIALR(model, optimizer, delay=0, every=1, cutoff=0.6, keep_last=False, max_cut=1.0, placement=placement)
    optimizer.step()
    oialr.step()
    x = torch.randn(2, 3, 6)
    for parts in gathered:
        with oialr.probing():
            for part in parts:  # each of the layers has its part of the batch
                model[part](x[part]).square().sum().backward()
    optimizer.step()
    oialr.step()
    return oialr.outside


leave(
    {
        "one process gathers": share((0, 1)) if rank == 0 else share(),
        "half of the batch": share((rank,)),
        "whole batch": share((0, 1)),
    }
)
