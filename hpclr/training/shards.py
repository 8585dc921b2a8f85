"""The state of a run whose weights are shared out over its processes: into one checkpoint, and back on any number."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from hpclr.checkpoint import CheckpointStore, Loaded, OpenCheckpoint
from hpclr.checkpoint import Piece as StoredPiece
from hpclr.checkpoint.tree import Tree, TreeLike
from hpclr.errors import UsageError
from hpclr.parallel.group import Group
from hpclr.parallel.sharded import Piece, Sharded

_SHARED_OUT = ("model", "optimizer")  # what is large is read by rows, and not with the rest


def sharded_state(sharded: Sharded, optimizer: Optimizer) -> tuple[TreeLike, TreeLike]:
    """What a checkpoint's `model` and `optimizer/state` hold: of tensors that are shared out, this process's rows."""
    trees: dict[str, Any] = {"model": {}, "optimizer": {}}
    for name, piece in sharded.pieces(optimizer):
        *groups, key = name.split("/")
        group = trees
        for one in groups:
            group = group.setdefault(one, {})
        group[key] = _leaf(piece)
    return trees["model"], trees["optimizer"]


def _leaf(piece: Piece) -> Tensor | StoredPiece:
    return StoredPiece(piece.local, piece.offset, piece.shape) if piece.is_shared else piece.local


def without_shares(opened: OpenCheckpoint) -> Loaded:
    """A checkpoint without what is large in it."""
    tree: Tree = {key: opened.read(key) for key in opened.keys if key not in _SHARED_OUT}
    return Loaded(opened.step, opened.path, tree)


def damage(store: CheckpointStore, step: int, group: Group) -> str | None:
    """What is wrong with this process's share of a checkpoint's parts, whichever processes wrote them; None if good."""
    try:
        with store.open(step, whole=True) as opened:
            opened.check_parts(group.rank, group.size)
    except UsageError as error:
        return str(error)
    return None


def restore_shares(sharded: Sharded, optimizer: Optimizer, opened: OpenCheckpoint) -> None:
    """Gives the model and the optimiser what is stored; each process reads the rows that it will hold.

    The method's state comes first, which gives the layers their ranks.
    """
    names = {_name(keys): keys for keys in opened.tensors if keys[0] in _SHARED_OUT}

    def read(name: str, offset: int, shape: tuple[int, ...]) -> Tensor:
        keys = names[name]
        content = opened.read_rows(keys, offset, shape[0]) if shape else opened.read(*keys)
        assert isinstance(content, Tensor)
        return content

    shapes = {name: opened.tensors[keys].shape for name, keys in names.items()}
    sharded.load_pieces(shapes, read, optimizer)


def _name(keys: tuple[str, ...]) -> str:
    """As `Sharded.pieces` calls it; in a checkpoint an optimiser's tensors are under `optimizer/state`."""
    return "/".join(keys if keys[0] == "model" else ("optimizer", *keys[2:]))
