"""A user's own loop with a Replica and OIALR, of a model whose head has the weight of its embedding.

Leaves ranks and what lay outside at each check, final weights, and a digest of all that is held.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from leaving import leave
from torch import nn

from hpclr import OIALR
from hpclr.parallel import Replica
from hpclr.parallel.digest import digest

STEPS, BATCH, TOKENS = 14, 60, 30


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(TOKENS, 12), nn.Linear(12, 12), nn.Linear(12, TOKENS)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.body(self.embedding(ids))))


dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
model = Language()
replica = Replica(model, svd="spread")
optimizer = torch.optim.AdamW(replica.parameters(), lr=1e-2)
oialr = OIALR(replica, optimizer, delay=4, every=3, cutoff=0.4, layer_fraction=1.0, tied=True)
draw, ranks, outside = torch.Generator().manual_seed(1), [], []
for _ in range(STEPS):
    x = torch.randint(TOKENS, (BATCH,), generator=draw)[BATCH * rank // size : BATCH * (rank + 1) // size]
    checks = oialr.checks
    with oialr.probing():
        F.cross_entropy(replica(x), (7 * x + 3) % TOKENS).backward()
    optimizer.step()
    optimizer.zero_grad()
    oialr.step()
    if oialr.checks > checks:
        ranks.append(oialr.ranks)
        outside.append(oialr.outside.get("head"))
leave(
    {
        "ranks": ranks,
        "outside": outside,
        "weight": model.head.weight.flatten().tolist(),
        "table": model.embedding.weight.flatten().tolist(),
        "digest": digest(model.state_dict().values()),
        "reduced": replica.gradient_bytes,
        "sigma_and_rest": 8 * sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
)
