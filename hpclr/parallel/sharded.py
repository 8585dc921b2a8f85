"""Fully sharded data parallelism: torch's own `fully_shard` (FSDP2) around a model whose parameters change shape."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils import swap_tensors

from hpclr.lowrank.accounting import meta_copy
from hpclr.lowrank.layers import LowRankModule, is_sharded
from hpclr.lowrank.sites import select
from hpclr.methods.placement import Here, Placement
from hpclr.parallel.group import Group
from hpclr.parallel.placement import Doing
from hpclr.parallel.replica import Replica
from hpclr.parallel.shard_placement import OfShards
from hpclr.parallel.shards import Shards, from_rows, rows_here

Read = Callable[[str, int, tuple[int, ...]], Tensor]
_CONTAINERS = (nn.ModuleList, nn.Sequential)
_WRAPPERS = (DistributedDataParallel, DataParallel, Replica, FSDPModule)


def _unheard(what: str, *, waiting: bool) -> None:
    """Nobody asks what this process does."""


class Piece(NamedTuple):
    """What a process holds of a tensor.

    Attributes:
        shape: of the whole tensor.
        offset: the first of the rows held here.
        local: the rows, maybe none.
        is_shared: whether the others hold the rest; else the first process gives it, and it is the same on all.
    """

    shape: tuple[int, ...]
    offset: int
    local: Tensor
    is_shared: bool = True


class Sharded(nn.Module):
    """A model of which every process holds a part, for models that do not fit one device.

        sharded = Sharded(model)
        optimizer = AdamW(sharded.parameters())
        oialr = OIALR(sharded, optimizer, delay=1000, every=500)
        ...
        loss = criterion(sharded(x), y)
        loss.backward()
        optimizer.step()

    Parameters, gradients and the optimiser's state are shared out by rows; so are U and V. A unit's parameters are
    gathered for its forward and its backward pass, and gradients are averaged over all processes. Where OIALR
    examines or changes a layer, that layer alone is gathered. Without a process group this is the model itself.

    Args:
        module: the model, on any device: units go to the processes' devices one at a time. All processes begin with
            the parameters and buffers of the first; on the others it may be on the meta device.
        units: patterns (`*`, `?`) of the names of modules that are gathered as one, of nested ones the outermost; None:
            the elements of each nn.ModuleList and nn.Sequential. What is in none of them is gathered all the time.
        device_type: "cuda" or "cpu"; None: where the first process has the parameters.
        svd: who decomposes the layers at a check: "spread", all processes, each its share by cost; "rank0", the first.
        reshard_after_forward: let go of a unit's parameters after its forward pass, and gather them again in the
            backward pass; False takes the memory of the whole model from there on.
        mixed_precision: torch's MixedPrecisionPolicy: the types in which parameters are gathered and gradients reduced.
        broadcast_buffers: whether buffers, such as running statistics, are those of the first process in each forward.
        doing: told at checks what this process does, and whether that takes the others.

    Attributes:
        module: the model.
        units: the names of the units.
        placement: what a method needs to know of the other processes.

    Raises:
        TypeError: for a model that is wrapped, sharded or compiled already.
        ValueError: for patterns that match nothing, a model without units, parameters that two units share or that are
            lazy, a unit that is itself a factored layer.
        UsageError: if this torch keeps sharded parameters in another way than those known.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        units: Sequence[str] | None = None,
        device_type: str | None = None,
        svd: Literal["rank0", "spread"] = "spread",
        reshard_after_forward: bool = True,
        mixed_precision: MixedPrecisionPolicy | None = None,
        broadcast_buffers: bool = True,
        doing: Doing = _unheard,
    ) -> None:
        super().__init__()
        _refuse(module, svd)
        chosen = dict(_units_found(module) if units is None else _units_named(module, units))
        _refuse_units(module, chosen, found=units is None)
        self.module = module
        self.units = list(chosen)
        self.group = Group()
        self.placement: Placement = Here()
        self._broadcast_buffers = broadcast_buffers
        self._policy = mixed_precision or MixedPrecisionPolicy()
        self._outline = (meta_copy(module),)  # in a tuple: no submodule of this one
        if self.group.size > 1:
            self._shard([*chosen.values(), module], device_type, reshard_after_forward)
            self.placement = OfShards(self.group, doing, module, self._shards, spread=svd == "spread")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass; all processes must call it, also under `torch.no_grad()`, equally often.

        Raises:
            RuntimeError: if the processes were joined only after this object was made, or under torch.compile.
        """
        if self.group.size == 1:
            _refuse_late_group()
            return self.module(*args, **kwargs)
        if torch.compiler.is_compiling():
            _refuse_compiling()
        if torch.is_grad_enabled():
            if self._broadcast_buffers:
                self.synchronise_buffers()
            return self.module(*args, **kwargs)
        output = self.module(*args, **kwargs)
        self._shards.close()  # the root would stay gathered, and an optimiser step now would not reach it
        return output

    def no_sync(self) -> AbstractContextManager[None]:
        """For passes that only add up gradients: nothing is different, since gradients not yet shared out are large."""
        return nullcontext()

    def prepare(self) -> None:
        """There is nothing to prepare, as there is with `Replica`."""

    def renew(self) -> None:
        """Nor to let go of."""

    def outline(self) -> nn.Module:
        """The model without data, on the meta device, its layers in the form that they have now; for counting."""
        state = self.module.state_dict()
        [outline] = self._outline
        for site in select(outline).candidates:
            core = state.get(site.key(site.slot.names[1]))
            if core is not None:
                site.set_rank(core.shape[0])
        return outline

    @torch.no_grad()
    def synchronise_buffers(self) -> None:
        """Gives all processes the first one's buffers, such as running statistics, in one message for each type."""
        if self.group.size == 1:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self.module.buffers():
            by_type.setdefault(buffer.dtype, []).append(buffer)
        for buffers in by_type.values():
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            dist.broadcast(flat, 0)
            for buffer, content in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
                buffer.copy_(content.view_as(buffer))

    @property
    def gradient_bytes(self) -> int:
        """Bytes of gradients that every step reduces over the processes."""
        kind = self._policy.reduce_dtype or self._policy.param_dtype
        trained = [p for p in self.module.parameters() if p.requires_grad]
        return sum(p.numel() * (kind or p.dtype).itemsize for p in trained)

    def pieces(self, optimizer: Optimizer | None = None) -> Iterator[tuple[str, Piece]]:
        """What this process holds of the model's state dict, and of an optimiser's state, in a fixed order.

        Names are model/NAME and optimizer/NAME/KEY for the NAME of a parameter. What is not sharded, such as buffers
        and step counters, is given by the first process alone.

        Raises:
            TypeError: for state that is not a tensor.
        """
        for name, value in self._tensors(optimizer):
            if is_sharded(value):
                local = cast(DTensor, value).to_local()
                yield name, Piece(tuple(value.shape), rows_here(cast(DTensor, value)).start, local)
            elif self.group.is_first:
                yield name, Piece(tuple(value.shape), 0, value, is_shared=False)

    @torch.no_grad()
    def load_pieces(self, shapes: Mapping[str, Sequence[int]], read: Read, optimizer: Optimizer | None = None) -> None:
        """Takes back what `pieces` gave on any number of processes; each reads only what it will hold.

        Layers must have the form and the ranks that they were saved with: load the method's state first. Learning
        rates and the like are in the optimiser's `state_dict()["param_groups"]`, and not part of this.

        Args:
            shapes: the name of every tensor that is stored, and its whole shape.
            read: of (name, offset, shape) gives that many rows of a tensor from row `offset` on, on any device.
            optimizer: the one whose state to load.

        Raises:
            ValueError: if names or shapes are not those of this model.
        """
        mine = dict(self._tensors(None))
        stored = {name: tuple(shape) for name, shape in shapes.items() if name.startswith("model/")}
        _refuse_difference(stored, {name: tuple(tensor.shape) for name, tensor in mine.items()})
        for name, tensor in mine.items():
            tensor.copy_(_read_rows(name, tuple(tensor.shape), tensor, read))
        if optimizer is not None:
            self._load_optimizer(shapes, read, optimizer)

    def full_state_dict(self) -> dict[str, Tensor]:
        """The model's state dict for export, in host memory of the first process; empty elsewhere. Collective."""
        state = {}
        for name, tensor in self._tensors(None):
            whole = cast(DTensor, tensor).full_tensor() if is_sharded(tensor) else tensor
            if self.group.is_first:
                state[name.removeprefix("model/")] = whole.to("cpu", copy=True)
        return state

    def _tensors(self, optimizer: Optimizer | None) -> Iterator[tuple[str, Tensor]]:
        """Everything there is to save, by name."""
        for name, value in self.module.state_dict().items():
            yield f"model/{name}", _tensor(f"model/{name}", value)
        for name, parameter in self._held_by(optimizer):
            for key, value in optimizer.state.get(parameter, {}).items():  # type: ignore[union-attr]
                if value is not None:  # SGD has an empty momentum
                    yield f"optimizer/{name}/{key}", _tensor(f"optimizer/{name}/{key}", value)

    def _held_by(self, optimizer: Optimizer | None) -> list[tuple[str, nn.Parameter]]:
        """The parameters that an optimiser holds, in its order, with their names in the model."""
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        groups = optimizer.param_groups if optimizer is not None else []
        return [(names[parameter], parameter) for group in groups for parameter in group["params"]]

    def _load_optimizer(self, shapes: Mapping[str, Sequence[int]], read: Read, optimizer: Optimizer) -> None:
        held = dict(self._held_by(optimizer))
        stored = {name: tuple(shape) for name, shape in shapes.items() if name.startswith("optimizer/")}
        places = {name: name.removeprefix("optimizer/").rsplit("/", 1) for name in stored}
        mine = {name: tuple(held[of].shape) if stored[name] else () for name, (of, _) in places.items() if of in held}
        _refuse_difference(stored, mine)
        state: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(held))}
        for name, (of, key) in places.items():
            like = held[of] if stored[name] else torch.empty(())
            state[list(held).index(of)][key] = _read_rows(name, stored[name], like, read)
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def _shard(self, units: Sequence[nn.Module], device_type: str | None, after_forward: bool) -> None:
        """Applies `fully_shard` from the inside out, one unit at a time on the device, all with the first's weights."""
        tensors = list(self.module.state_dict(keep_vars=True).values())
        first = [device_type or tensors[0].device.type, any(tensor.is_meta for tensor in tensors)]
        (kind, on_meta), _ = self.group.broadcast(first)
        if on_meta:
            raise ValueError(
                "the first process's model is on the meta device, without weights to begin with; make it on the CPU "
                "there (the other processes may have theirs on the meta device)"
            )
        mesh = init_device_mesh(kind, (self.group.size,))
        self._begin_alike(self.module.buffers())
        for unit in units:
            self._begin_alike(parameter for parameter in unit.parameters() if not is_sharded(parameter))
            fully_shard(unit, mesh=mesh, mp_policy=self._policy, reshard_after_forward=None if after_forward else False)
        self._shards = Shards(cast(Any, units))

    @torch.no_grad()
    def _begin_alike(self, tensors: Iterable[Tensor]) -> None:
        """Gives all processes the first one's contents, one tensor at a time."""
        for tensor in tensors:
            _, [content] = self.group.broadcast(None, [tensor])
            if not tensor.is_meta:
                tensor.copy_(content)
            elif isinstance(tensor, nn.Parameter):
                swap_tensors(tensor, nn.Parameter(content, tensor.requires_grad))
            else:
                swap_tensors(tensor, content)


def _read_rows(name: str, shape: tuple[int, ...], like: Tensor, read: Read) -> Tensor:
    """A stored tensor, on this process's device: sharded as another is, of which only the rows held here are read."""
    if not is_sharded(like):
        return read(name, 0, shape).to(like.device)
    start, stop = rows_here(cast(DTensor, like))
    mine = (stop - start, *shape[1:])
    rows = read(name, start, mine).to(like.device) if stop > start else torch.empty(mine, device=like.device)
    return from_rows(rows.to(like.dtype).contiguous(), shape, cast(DTensor, like))


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; of a sharded model only tensors can be taken apart")
    return value


def _units_found(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The elements of containers that hold parameters, with their names; not what is inside of them."""
    for name, child in module.named_children():
        if not isinstance(module, _CONTAINERS) or type(child) in _CONTAINERS:
            yield from _units_found(child, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            yield prefix + name, child


def _units_named(module: nn.Module, patterns: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose names match, but for those within others that do."""
    if isinstance(patterns, str):
        raise TypeError("units takes a list of patterns; for a single one write ['…']")
    inside: tuple[str, ...] = ()
    matched = set()
    for name, child in module.named_modules():
        matching = {pattern for pattern in patterns if name and fnmatchcase(name, pattern)}
        matched |= matching
        if matching and not name.startswith(inside):
            inside = (*inside, f"{name}.")
            yield name, child
    if unmatched := [pattern for pattern in patterns if pattern not in matched]:
        names = ", ".join([name for name, _ in module.named_modules() if name][:8])
        raise ValueError(
            f"the pattern '{unmatched[0]}' (units) matches no module of the model; its modules are {names} …"
        )


def _refuse(module: nn.Module, svd: str) -> None:
    """Raises an error for what cannot be sharded so that its layers can still change."""
    if svd not in ("rank0", "spread"):
        raise ValueError(f"svd must be 'rank0' or 'spread' for a sharded model, found {svd!r}")
    for name, child in module.named_modules():
        if isinstance(child, _WRAPPERS) or (name == "" and isinstance(child, Sharded)):
            raise TypeError(
                f"'{name or 'the model'}' is already wrapped in {type(child).__name__}; Sharded(model) takes its "
                "place: pass the module inside, as it was before"
            )
        if hasattr(child, "_orig_mod") or child._compiled_call_impl is not None:
            raise TypeError(
                f"'{name or 'the model'}' is compiled, and a compiled model cannot follow parameters that are gathered "
                "and change shape: give Sharded the model as it is"
            )
    lazy = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ValueError(f"the shape of '{lazy[0]}' is not known yet; run one batch through the model first")


def _refuse_units(module: nn.Module, units: Mapping[str, nn.Module], *, found: bool) -> None:
    """Raises ValueError for units between which a model cannot be shared out."""
    if found and not units:
        raise ValueError(
            "the model has no nn.ModuleList or nn.Sequential whose elements could be gathered one at a time; name the "
            "modules with units=[…], or give units=[] if the whole model may be gathered at once"
        )
    for name, unit in units.items():
        if isinstance(unit, LowRankModule):
            raise ValueError(f"the unit '{name}' is itself a factored layer; choose units that contain such layers")
    seen: dict[int, tuple[str, str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        unit_name = next((unit for unit in units if name.startswith(f"{unit}.")), "")
        first, first_unit = seen.setdefault(id(parameter), (name, unit_name))
        if first_unit != unit_name:
            raise ValueError(
                f"'{first}' and '{name}' are one parameter in two units, '{first_unit or 'the rest'}' and "
                f"'{unit_name or 'the rest'}', which are gathered apart; choose units so that both are in one"
            )


def _refuse_difference(stored: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raises ValueError if what is stored has other names or shapes than what is here."""
    differing = sorted(name for name in stored.keys() | mine.keys() if stored.get(name) != mine.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"{len(differing)} of the tensors stored are not those of this model in the form it has: {name} is "
            f"{stored.get(name, 'missing')} there and {mine.get(name, 'missing')} here. Load the state of the method "
            "first, which gives the layers their ranks"
        )


def _refuse_late_group() -> None:
    size = Group().size
    if size > 1:
        raise RuntimeError(
            f"this Sharded was made before init_process_group joined {size} processes, so it would train alone; make "
            "it after that"
        )


# not traced, else nothing would be raised: the compiler gives up on what raises, and calls it as it is
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse_compiling() -> None:
    raise RuntimeError(
        "a sharded model cannot be compiled: its parameters are gathered and change shape; call it as it is"
    )
