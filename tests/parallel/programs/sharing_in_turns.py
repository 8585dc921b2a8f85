"""OIALR converts a model on each process in turns of few layers; leaves what was sent for it and what it held.

Argument: svd way.
"""

import sys

import torch
import torch.distributed as dist
from leaving import leave
from torch import nn

from hpclr import OIALR
from hpclr.parallel import Replica, placement
from hpclr.parallel.digest import digest

LAYERS, WIDTH = 12, 64

dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.manual_seed(0)
placement._TURN = 2 * (2 * WIDTH + 1) * WIDTH * 4  # bytes: the factors of two layers
model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
replica = Replica(model, svd=sys.argv[1])
optimizer = torch.optim.AdamW(replica.parameters())
oialr = OIALR(replica, optimizer, delay=1, every=1, keep_last=False)
replica(torch.randn(8, WIDTH)).square().mean().backward()
optimizer.step()
optimizer.zero_grad()

sent: list[int] = []
dense_at_a_message: list[int] = []
broadcast = dist.broadcast


def noted(tensor, source):
    sent.append(tensor.numel() * tensor.element_size())
    dense_at_a_message.append(sum(not frozen for frozen in oialr.frozen.values()))
    broadcast(tensor, source)


dist.broadcast = noted
oialr.step()
result = {"sent": sent, "dense": dense_at_a_message, "after": digest(model.state_dict().values())}
leave(result)
