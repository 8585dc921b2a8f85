"""The whole state of a run as one tree for a checkpoint, and back: what resuming to the bit takes."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpclr.checkpoint import Json, OpenCheckpoint, Piece, Tree, TreeLike
from hpclr.config import dump
from hpclr.data import Order
from hpclr.lowrank.adapters import adapted_weights
from hpclr.lowrank.interchange import factored_weights, tied_names
from hpclr.parallel.group import Group
from hpclr.training.assembly import Assembly
from hpclr.training.environment import random_states, seed_everything, seed_of, set_random_states
from hpclr.training.lora import LoRA
from hpclr.training.scores import METRICS, Score
from hpclr.training.shards import restore_shares, sharded_state


@dataclass
class Position:
    """Where a run is."""

    step: int = 0  # batches trained on; also the sampler's whole state
    seconds: float = 0.0  # of training so far, over all attempts
    best_scores: dict[str, float] = field(default_factory=dict)  # on the validation split, at best_step
    best_step: int | None = None
    validations_since_best: int = 0
    finished: bool = False
    # what training has cost so far, over all attempts; None where that is not known
    flops: int | None = 0  # operations, of all processes together
    dense_flops: int | None = 0  # what the same steps would have taken with dense weights
    reduced_bytes: int | None = 0  # of gradients
    optimizer_bytes: int | None = 0  # the most at any time
    peak_memory: int | None = 0  # bytes, the most on any process
    peak_memory_of: str | None = None  # as `PeakMemory.of`; None where attempts differ in it

    def best(self, metric: str) -> float | None:
        """This metric of the best score so far; None before there is one."""
        return self.best_scores.get(metric)

    def judge(self, score: Score, metric: str) -> bool:
        """Takes a validation score; returns whether by this metric it is better than all before."""
        best, sign = self.best(metric), 1 if METRICS[metric].higher_is_better else -1
        if not sign * score.values[metric] > (-math.inf if best is None else sign * best):
            self.validations_since_best += 1
            return False
        self.best_scores = {name: value for name, value in score.values.items() if math.isfinite(value)}  # as JSON is
        self.best_step, self.validations_since_best = self.step, 0
        return True

    def ended(self, total_steps: int, patience: int | None) -> bool:
        """Whether a run of this length and with this patience is over here."""
        tired = patience is not None and self.validations_since_best >= patience
        return tired or self.step >= total_steps


_COSTS = ("flops", "dense_flops", "reduced_bytes", "optimizer_bytes", "peak_memory")


def capture(parts: Assembly, position: Position) -> TreeLike:
    """The tree that a checkpoint holds (docs/checkpoint-format.md); of what is shared out, this process's rows."""
    model, moments = _weights_and_moments(parts)
    return {
        "model": model,
        **_interchange(parts),
        "optimizer": {"state": moments, "groups": _groups(parts.model, parts.optimizer)},
        "method": _to_tree({"name": parts.run.method.name, "state": parts.method.state_dict()}),
        "sampler": Json({"step": position.step, "seed": parts.run.train.seed, "order": asdict(_order(parts))}),
        "random": _random_of_all(parts.job.group),
        "ema": _to_tree(parts.ema.state_dict() if parts.ema else {}),
        "scaler": Json(parts.precision.state_dict()),
        "position": Json(asdict(position)),
        "run": Json({"yaml": dump(parts.run)}),
        "data": Json(_data_facts(parts)),
        "environment": Json(parts.environment),
    }


def _weights_and_moments(parts: Assembly) -> tuple[TreeLike, TreeLike]:
    """By parameter name, so that a file can be read without knowing the optimiser's order of parameters."""
    if parts.sharded is not None:
        return sharded_state(parts.sharded, parts.optimizer)
    names: dict[Tensor, str] = {parameter: name for name, parameter in parts.model.named_parameters()}
    state = {names[p]: values for p, values in parts.optimizer.state.items() if p in names}
    return dict(parts.model.state_dict()), _to_tree(state)


def _interchange(parts: Assembly) -> Tree:
    """What it takes to make dense weights of the file alone."""
    described = parts.method.adapted_weights() if isinstance(parts.method, LoRA) else adapted_weights(parts.model)
    layers, adapters = (
        {name: asdict(layer) for name, layer in found.items()} for found in (factored_weights(parts.model), described)
    )
    tree: Tree = {"layers": Json(_plain(layers)), "tied": Json(tied_names(parts.model))}
    return tree | ({"adapters": Json(_plain(adapters))} if adapters else {})


def _random_of_all(group: Group) -> Tree:
    """The states of every process's generators, on the first process; collective."""
    states = _to_tree(random_states())
    gathered = {_process(0): states}
    plain = {name: item.value for name, item in states.items() if isinstance(item, Json)}
    for rank in range(1, group.size):
        received = group.move([plain, list(tensors(states))], list(tensors(states).values()), rank, 0)
        if received is not None:
            (values, names), contents = received
            gathered[_process(rank)] = {name: Json(value) for name, value in values.items()} | dict(
                zip(names, contents, strict=True)
            )
    return gathered


def _process(rank: int) -> str:
    return f"rank-{rank:04d}"


def _restore_random(parts: Assembly, saved: Mapping[str, Any], step: int) -> None:
    """Each process goes on with its own states; where their number has changed, with new ones of seed and step."""
    group = parts.job.group
    if len(saved) == group.size:
        set_random_states(saved[_process(group.rank)])
    else:
        seed_everything(seed_of(parts.run.train.seed, group.rank, step))


def _order(parts: Assembly) -> Order:
    order = parts.loader.order
    assert order is not None  # training samples are always shuffled
    return order


def _data_facts(parts: Assembly) -> dict[str, Any]:
    dataset = parts.dataset
    return {
        "task": dataset.task,
        "digest": dataset.digest,
        "stamp": dict(dataset.stamp),
        "classes": list(dataset.classes),
        "sample_shape": list(dataset.sample_shape),
        "sizes": dict(dataset.sizes),
        "mean": dataset.mean.tolist(),
        "std": dataset.std.tolist(),
    }


def not_finite(tree: TreeLike, prefix: str = "") -> str | None:
    """The path of the first tensor in a tree that holds a NaN or an infinity; None if there is none."""
    for key, item in tree.items():
        held = item.tensor if isinstance(item, Piece) else item
        if isinstance(item, Mapping):
            if found := not_finite(item, f"{prefix}{key}/"):
                return found
        elif isinstance(held, Tensor) and not torch.isfinite(held).all():
            return f"{prefix}{key}"
    return None


def restore(parts: Assembly, tree: Tree, opened: OpenCheckpoint | None = None) -> Position:
    """Takes a checkpoint's tree back into freshly assembled parts: first the shapes, then the contents.

    Args:
        parts: as `assemble` made them.
        tree: what the checkpoint holds, or what `without_shares` gives of it.
        opened: where weights and moments are that are shared out, of which each process reads its rows.
    """
    parts.method.load_state_dict(_copied(from_tree(tree["method"])["state"]))
    if parts.sharded is not None and opened is not None:
        restore_shares(parts.sharded, parts.optimizer, opened)
    else:
        parts.model.load_state_dict(tensors(tree["model"]))
        _restore_optimizer(parts.model, parts.optimizer, from_tree(tree["optimizer"]))
    if parts.ema is not None:
        parts.ema.load_state_dict(from_tree(tree["ema"]))
    parts.precision.load_state_dict(from_tree(tree["scaler"]))
    position = position_of(tree)
    _restore_random(parts, from_tree(tree["random"]), position.step)
    return position


def _copied(state: Any) -> Any:
    """A state with tensors of its own: those of a checkpoint are views of all the file's bytes."""
    if isinstance(state, Mapping):
        return {key: _copied(value) for key, value in state.items()}
    return state.clone() if isinstance(state, Tensor) else state


def position_of(tree: TreeLike) -> Position:
    """Where the run was that a tree comes from.

    The first checkpoints kept the best score in keys of their own, and did not know what training had cost.
    """
    found: dict[str, Any] = {**from_tree(tree["position"])}
    old = {name: found.pop(f"best_{name}", None) for name in ("accuracy", "loss")}
    scores = {name: value for name, value in old.items() if value is not None}
    return Position(**{"best_scores": scores, **dict.fromkeys(_COSTS), **found})


def _groups(model: nn.Module, optimizer: Optimizer) -> Json:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        | {"params": [names[p] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return Json(_plain(groups))


def _restore_optimizer(model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """State only: the groups' settings follow from the run file, and the learning rate from the step."""
    named = dict(model.named_parameters())
    for name, values in saved["state"].items():
        parameter = named[name]
        optimizer.state[parameter] = {key: _placed(value, parameter) for key, value in values.items()}


def _placed(value: Any, parameter: nn.Parameter) -> Any:
    """Moments go where their parameter is; step counts stay on the CPU, as torch keeps them."""
    if isinstance(value, Tensor):
        return value.to(parameter.device if value.ndim > 0 else value.device, copy=True)
    return value


def _to_tree(value: Any) -> Any:
    """Dictionaries that hold tensors become groups; everything without a tensor in it becomes JSON."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping) and _holds_tensor(value):
        return {str(key): _to_tree(item) for key, item in value.items()}
    return Json(_plain(value))


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensor(item) for item in value.values())
    return isinstance(value, Tensor)


def _plain(value: Any) -> Any:
    """Tuples as lists and numbers out of tensors, as JSON has them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, torch.Tensor) else value


def from_tree(tree: Any) -> Any:
    """Plain dictionaries, values and tensors out of a checkpoint's tree."""
    if isinstance(tree, Json):
        return tree.value
    if isinstance(tree, Mapping):
        return {key: from_tree(item) for key, item in tree.items()}
    return tree


def tensors(tree: Any) -> dict[str, Tensor]:
    """The tensors of one group of a tree: a state dict."""
    return {key: value for key, value in tree.items() if isinstance(value, Tensor)}
