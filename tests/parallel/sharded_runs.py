"""A user's own loop with OIALR on a model that is sharded, or on replicas of it, in several real processes."""

import functools
import gc
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from hpclr import OIALR, densify
from hpclr.lowrank import load_state_dict
from hpclr.parallel import Replica, Sharded
from hpclr.parallel.digest import digest

STEPS, SAVED_AT, BATCH = 16, 11, 16


class Block(nn.Module):
    def __init__(self, norm, width):
        super().__init__()
        self.norm = norm(width)
        # without biases: that of the keys has only noise for a gradient, which Adam would blow up
        self.attention = nn.MultiheadAttention(width, 2, bias=False, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width, bias=False))

    def forward(self, x):
        h = self.norm(x.mT).mT if isinstance(self.norm, nn.BatchNorm1d) else self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(x)


class Net(nn.Module):
    def __init__(self, norm=nn.LayerNorm, width=12, depth=2):
        super().__init__()
        self.conv = nn.Conv1d(6, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(norm, width) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.conv(x).mT
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


AT_DELAY = {"delay": 4, "every": 4, "cutoff": 0.6, "layer_fraction": 0.5}
WHEN_IT_PAYS = AT_DELAY | {"convert": "when_it_pays", "min_rank": 0.1, "sigma_lr": 0.8}
SCENARIOS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], dict[str, Any]]] = {
    "adamw": (Net, adamw, AT_DELAY, {}),
    "sgd": (Net, sgd, WHEN_IT_PAYS, {"svd": "rank0"}),
    "kept": (Net, adamw, AT_DELAY | {"delay": 0, "keep_last": False}, {"reshard_after_forward": False, "units": []}),
    "norms": (lambda: Net(nn.BatchNorm1d), adamw, AT_DELAY, {}),
    "bf16": (Net, adamw, AT_DELAY, {"mixed_precision": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}),
    "large": (lambda: Net(width=96, depth=4), adamw, AT_DELAY | {"cutoff": 0.8}, {}),
}


def together(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` gives in each of so many processes, by rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hpclr.parallel.sharded", "hpclr.methods"])
    results = context.Queue()
    with tempfile.TemporaryDirectory() as meeting:
        processes = [
            context.Process(target=_process, args=(rank, size, meeting, results, work, arguments), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            found = dict(results.get(timeout=100) for _ in processes)
        finally:
            for process in processes:
                process.join(5)
                process.kill()
    failed = [text for text in found.values() if isinstance(text, Failure)]
    assert not failed, "\n".join(failed)
    return [found[rank] for rank in range(size)]


class Failure(str):
    """A traceback."""


def _process(rank: int, size: int, meeting: str, results: Any, work: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=size)
        results.put((rank, work(*arguments)))
        dist.barrier()
    except BaseException:
        results.put((rank, Failure(f"rank {rank}: {traceback.format_exc()}")))
        raise
    dist.destroy_process_group()


@functools.cache
def trained(size: int, way: str, scenario: str, save: Path | None = None, load: Path | None = None) -> list[Any]:
    """What each of so many processes has to tell of a run; `way` is "sharded" or "replica"."""
    return together(size, train, way, scenario, save, load)


def train(way: str, scenario: str, save: Path | None, load: Path | None) -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    make, make_optimizer, settings, options = SCENARIOS[scenario]
    torch.manual_seed(rank)  # all must begin with the first one's weights all the same
    with torch.device("meta" if (way, scenario) == ("sharded", "adamw") and rank > 0 else "cpu"):
        model = make()
    seen: list[nn.Module] = []
    for layer in (model.blocks[0].mlp[0], model.blocks[1]):  # hooks of other people
        layer.register_forward_hook(lambda module, args, output: seen.append(module))
    wrapped = Sharded(model, **options) if way == "sharded" else Replica(model)
    optimizer = make_optimizer(wrapped.parameters())
    weight = model.blocks[0].mlp[0].weight
    weight.note = "of a user"
    oialr = OIALR(wrapped, optimizer, **settings)
    first = load_all(load, wrapped, optimizer, oialr) if load else 0

    told: dict[str, Any] = {"losses": [], "norms": [], "ranks": [], "converted": [], "held": []}
    for step in range(STEPS):
        data = torch.Generator().manual_seed(step)
        x, y = torch.randn(BATCH, 6, 7, generator=data), torch.randint(0, 5, (BATCH,), generator=data)
        if step < first:
            continue
        part = slice(BATCH * rank // size, BATCH * (rank + 1) // size)
        with oialr.probing():
            loss = F.cross_entropy(wrapped(x[part]).float(), y[part])
            loss.backward()
        norm = nn.utils.clip_grad_norm_(wrapped.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            with torch.no_grad():
                wrapped(x)
        checks = oialr.checks
        oialr.step()
        if oialr.checks > checks:
            told["ranks"].append(oialr.ranks)
            told["converted"].append(sum(oialr.frozen.values()))
        dist.all_reduce(total := loss.detach().clone())
        told["losses"].append(float(total) / size)
        told["norms"].append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        told["held"].append(bytes_held(wrapped, optimizer))
        if save and step + 1 == SAVED_AT:
            save_all(save, wrapped, optimizer, oialr)
    del loss, x, y

    gc.collect()
    alive = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in living_tensors()}
    wrapped.module.load_state_dict(wrapped.module.state_dict())  # of the rows held here, as torch does it
    state = dict(wrapped.pieces(optimizer)) if way == "sharded" else {}
    return told | {
        "alive": sum(alive.values()),
        "weights": dense_weights(make, wrapped),
        "bits": digest(piece.local for piece in state.values()),
        "types": {str(p.dtype) for p in wrapped.parameters()},
        "stability": oialr.stability,
        "outside": oialr.outside,
        "buffers": [float(buffer.sum()) for buffer in wrapped.buffers()],
        "hooks": len(seen),
        "is_weight": any(p is weight for p in model.blocks[0].mlp[0].parameters()) and weight.note == "of a user",
        "trained": wrapped.gradient_bytes,
    }


def living_tensors() -> list[Tensor]:
    """All that this process has in memory, whoever holds them."""
    found = [one for one in gc.get_objects() if issubclass(type(one), Tensor)]
    return [one._local_tensor if isinstance(one, DTensor) else one for one in found if not one.is_meta]


def bytes_held(wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Of parameters and of the optimiser's state: here, and whole."""
    state = [value for of_one in optimizer.state.values() for value in of_one.values() if value is not None]
    tensors = [*wrapped.parameters(), *(tensor for tensor in state if tensor.ndim)]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.nbytes for tensor in local), sum(t.numel() * t.element_size() for t in tensors)


def dense_weights(make: Callable[[], nn.Module], wrapped: Replica | Sharded) -> dict[str, Any]:
    """The products of the factors, of which these themselves may differ in sign; on the first process."""
    state = wrapped.full_state_dict() if isinstance(wrapped, Sharded) else wrapped.module.state_dict()
    if not state:
        return {}
    plain = make()
    load_state_dict(plain, state)
    return {name: tensor.numpy() for name, tensor in densify(plain).state_dict().items()}


def save_all(where: Path, sharded: Sharded, optimizer: torch.optim.Optimizer, oialr: OIALR) -> None:
    method = oialr.state_dict()  # collective
    if dist.get_rank() == 0:
        torch.save([method, optimizer.state_dict()["param_groups"]], where / "rest.pt")
    pieces = {name: (piece.shape, piece.offset, piece.local.clone()) for name, piece in sharded.pieces(optimizer)}
    torch.save(pieces, where / f"{dist.get_rank()}.pt")


def load_all(where: Path, sharded: Sharded, optimizer: torch.optim.Optimizer, oialr: OIALR) -> int:
    """Takes back what any number of processes have saved; returns the steps done."""
    method, groups = torch.load(where / "rest.pt")
    parts = [torch.load(path) for path in sorted(where.glob("[0-9].pt"))]
    shapes = {name: shape for part in parts for name, (shape, _, _) in part.items()}

    def read(name: str, offset: int, shape: tuple[int, ...]) -> Tensor:
        rows = [part[name] for part in parts if name in part]
        if not shape:
            return rows[0][2]
        assert [start for _, start, _ in rows] == [sum(len(part) for *_, part in rows[:i]) for i in range(len(rows))]
        return torch.cat([local for *_, local in rows])[offset : offset + shape[0]]

    oialr.load_state_dict(method)
    sharded.load_pieces(shapes, read, optimizer)
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
    return oialr.steps
