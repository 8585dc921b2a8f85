"""A user's own loop with a Replica and OIALR, in float64, each process on its part of every batch.

Arguments: svd way, optimiser, order of directions. Leaves ranks at each check, final weights, their
digest, bytes reduced.
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from leaving import leave
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from hpclr import OIALR
from hpclr.parallel import Replica
from hpclr.parallel.digest import digest

STEPS, BATCH = 30, 64

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
way, optimizer_name, order = sys.argv[1:4]
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
torch.manual_seed(rank)  # replicas must start equal all the same
model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 24), nn.Linear(24, 5))
if size == 1:
    torch.manual_seed(0)
replica = Replica(model, svd=way)
kinds = {"sgd": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9), "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2)}
optimizer = kinds[optimizer_name](replica.parameters())
oialr = OIALR(replica, optimizer, delay=8, every=5, cutoff=0.3, layer_fraction=0.5, order=order)
counted: list[int] = []


def counting(state, bucket):
    counted.append(bucket.buffer().numel() * bucket.buffer().element_size())
    return allreduce_hook(state, bucket)


data = torch.Generator().manual_seed(1)
ranks, outside = [], []
for step in range(STEPS):
    x, y = torch.randn(BATCH, 20, generator=data), torch.randint(0, 5, (BATCH,), generator=data)
    part = slice(BATCH * rank // size, BATCH * (rank + 1) // size)
    last = step == STEPS - 1
    if last and size > 1:
        replica.renew()
        replica._current().register_comm_hook(None, counting)
    with oialr.probing():
        F.cross_entropy(replica(x[part]), y[part]).backward()
    optimizer.step()
    optimizer.zero_grad()
    checks = oialr.checks
    oialr.step()
    if oialr.checks > checks:
        ranks.append(oialr.ranks)
        outside.append(oialr.outside)
state = oialr.state_dict()
result = {
    "rank": rank,
    "ranks": ranks,
    "outside": outside,
    "digest": digest(model.state_dict().values()),
    "moments": digest(v for p in optimizer.state.values() for v in p.values() if isinstance(v, torch.Tensor)),
    "stability": oialr.stability,
    "polar": digest(state["stability"]["polar"].values()) if rank == 0 else None,
    "weights": torch.cat([layer.weight.flatten() for layer in model if isinstance(layer, nn.Linear)]).tolist(),
    "trained": replica.gradient_bytes,
    "sigma_and_rest": 8 * sum(p.numel() for p in model.parameters() if p.requires_grad),
    "counted": sum(counted),
}
leave(result)
