"""How torch's `fully_shard` keeps parameters, and how some of them are replaced by others of other shapes.

`fully_shard` has no public way to do that to a module it has been applied to. Inside it, each parameter of a unit is
an FSDPParam in the list of the unit's group. Here a weight is taken out of that list, stands whole in its layer while
it changes its form, and what has become of it goes back into the list, sharded, at the same place. Hooks, streams and
all else stay as `fully_shard` made them. The DTensor that was the weight stays too, as Σ: an optimiser or a list kept
for clipping that holds it holds the right thing before and after.

This is the only file that uses private names of torch; `check` says which of them another version lacks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer
from torch.utils import swap_tensors

from hpclr.errors import UsageError
from hpclr.lowrank.layers import is_sharded
from hpclr.lowrank.sites import WeightSite
from hpclr.parallel.digest import digest

_FROM_GROUP = ("mesh_info", "post_forward_mesh_info", "device", "mp_policy", "offload_policy")  # an FSDPParam has these
_OF_GROUP = (*_FROM_GROUP, "fsdp_params", "lazy_init")
_OF_PARAM = ("sharded_param", "_module_info", "_post_load_hook_handle", "_param_fqn")
_ARGUMENTS = {"self", "param", "module_info", "shard_placement_fn", *_FROM_GROUP}

try:
    from torch.distributed.fsdp._fully_shard import _fsdp_param
except ImportError:
    _fsdp_param = ModuleType("_fsdp_param")


def check(units: Sequence[FSDPModule]) -> None:
    """Looks whether this torch has what is used here of it.

    Args:
        units: modules to which `fully_shard` has been applied.

    Raises:
        UsageError: if not; names what is missing.
    """
    missing = sorted(set(_missing(units)))
    if missing:
        raise UsageError(
            f"Sharded replaces parameters inside torch's fully_shard, which torch {torch.__version__} keeps in another "
            f"way: it lacks {', '.join(missing)}. Use a torch that has these names, as 2.6 and 2.13 do; or Replica, "
            "where the whole model fits on one device"
        )


def _missing(units: Sequence[FSDPModule]) -> Iterator[str]:
    for name in ("FSDPParam", "ParamModuleInfo"):
        if not hasattr(_fsdp_param, name):
            yield name
    if hasattr(_fsdp_param, "FSDPParam") and {*signature(_fsdp_param.FSDPParam.__init__).parameters} != _ARGUMENTS:
        yield f"FSDPParam({', '.join(sorted(_ARGUMENTS - {'self'}))})"
    for unit in units:
        state = getattr(unit, "_get_fsdp_state", object)()
        if not hasattr(state, "_fsdp_param_group"):
            yield "FSDPModule._get_fsdp_state()._fsdp_param_group"
        elif state._fsdp_param_group is not None:
            yield from _missing_of(state._fsdp_param_group)


def _missing_of(group: Any) -> Iterator[str]:
    yield from (f"FSDPParamGroup.{name}" for name in _OF_GROUP if not hasattr(group, name))
    for held in getattr(group, "fsdp_params", ()):
        yield from (f"FSDPParam.{name}" for name in _OF_PARAM if not hasattr(held, name))


class Rows(NamedTuple):
    """The rows of a tensor that a process holds, from `start` to before `stop`; maybe none."""

    start: int
    stop: int


def rows_of(length: int, rank: int, size: int) -> Rows:
    """The rows of process `rank` of `size`, dealt out as `fully_shard` and `torch.chunk` do: the last may have none."""
    most = -(-length // size)
    return Rows(min(rank * most, length), min((rank + 1) * most, length))


def rows_here(sharded: DTensor) -> Rows:
    """The rows that this process holds."""
    mesh = sharded.device_mesh
    return rows_of(sharded.shape[0], mesh.get_local_rank(), mesh.size())


def from_rows(rows: Tensor, shape: Sequence[int], like: DTensor) -> DTensor:
    """This process's rows of a contiguous tensor of a shape, as a part of it; it is sharded where another is."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        rows, like.device_mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
    )


def _cut(whole: Tensor, like: DTensor) -> DTensor:
    """A tensor that all processes have whole, of which each keeps its rows."""
    mesh = like.device_mesh
    start, stop = rows_of(whole.shape[0], mesh.get_local_rank(), mesh.size())
    return from_rows(whole[start:stop].contiguous().clone(), whole.shape, like)


class Shards:
    """The sharded parameters of a model.

    Args:
        units: the modules to which `fully_shard` has been applied.
    """

    def __init__(self, units: Sequence[FSDPModule]) -> None:
        check(units)
        self._units = units
        groups = [unit._get_fsdp_state()._fsdp_param_group for unit in units]
        self._groups: dict[nn.Module, Any] = {
            held._module_info.module: group for group in groups if group is not None for held in group.fsdp_params
        }
        self._changed = 0

    def close(self) -> None:
        """Lets go of the parameters that are gathered, as those of the root are after a forward pass."""
        for unit in self._units:
            unit.reshard()

    def take_digest(self) -> int:
        """Of what all layers opened since the last time have become, before they were cut: the same everywhere."""
        changed, self._changed = self._changed, 0
        return changed

    @contextmanager
    def shown(self, site: WeightSite, *, keep: bool) -> Iterator[bool]:
        """In the block a layer's weight, or its Σ, is whole where this process wants to keep it; not to be changed.

        Collective; gives `keep` back.
        """
        parameters, name = site.module._parameters, site.slot.names[1] if site.is_lowrank else site.slot.weight
        sharded = parameters[name]
        whole = _whole(site.parameter.detach())
        if keep:
            parameters[name] = nn.Parameter(whole, requires_grad=False)
        del whole
        try:
            yield keep
        finally:
            parameters[name] = sharded

    @contextmanager
    def opened(self, site: WeightSite, optimizer: Optimizer) -> Iterator[None]:
        """In the block a layer's weight or factors, their gradients and the optimiser's state of them are whole.

        There they may change their form, on all processes in the same way; then each keeps its rows. Collective.
        """
        self.close()
        group, parameters = self._groups[site.module], site.module._parameters
        place, taken = _take_out(group, site)
        stands_for = {}
        for name, sharded in taken.items():
            whole = parameters[name] = _gathered(sharded, optimizer)
            stands_for[whole] = sharded
        try:
            yield
        finally:
            for name in reversed(_names(site)):
                whole = cast(nn.Parameter, parameters[name])
                state = optimizer.state.pop(whole, {})
                self._note([whole, *filter(torch.is_tensor, state.values())])
                sharded = _put_in(group, place, site, name, stands_for.get(whole))
                _give_back(whole, state, sharded, optimizer)
            group.lazy_init()  # settles the types of mixed precision for the new ones

    def _note(self, tensors: Sequence[Tensor]) -> None:
        self._changed = (self._changed * 0x9E3779B97F4A7C15 + digest(tensors)) % 2**64


def _names(site: WeightSite) -> list[str]:
    """The parameters that make up a weight now, as their module calls them."""
    return [name for name in (site.slot.weight, *site.slot.names) if name in site.module._parameters]


def _take_out(group: Any, site: WeightSite) -> tuple[int, dict[str, DTensor]]:
    """Takes the parameters of a weight from their group; returns where they were, and them by name."""
    names = _names(site)
    taken = [
        p for p in group.fsdp_params if p._module_info.module is site.module and p._module_info.param_name in names
    ]
    place = group.fsdp_params.index(taken[0])
    for held in taken:
        held._post_load_hook_handle.remove()
        group.fsdp_params.remove(held)
    return place, {held._module_info.param_name: held.sharded_param for held in taken}


def _put_in(group: Any, place: int, site: WeightSite, name: str, former: DTensor | None) -> DTensor:
    """Shards a parameter and puts it into the group; returns the DTensor, which is `former` with other contents."""
    whole = cast(nn.Parameter, site.module._parameters[name])
    info = _fsdp_param.ParamModuleInfo(site.module, name)
    as_all = {of: getattr(group, of) for of in _FROM_GROUP}
    held = _fsdp_param.FSDPParam(param=whole, module_info=info, shard_placement_fn=None, **as_all)
    held._param_fqn = site.key(name)
    group.fsdp_params.insert(place, held)
    if former is not None:
        held.sharded_param.__dict__.update(former.__dict__)  # what others have noted on it
        swap_tensors(former, held.sharded_param)
        held.sharded_param = site.module._parameters[name] = cast(Any, former)
    return cast(DTensor, held.sharded_param)


def _gathered(sharded: DTensor, optimizer: Optimizer) -> nn.Parameter:
    """A parameter that stands in for a sharded one: whole, with its gradient and the optimiser's state of it."""
    whole = nn.Parameter(_whole(sharded.detach()), sharded.requires_grad)
    whole.grad = _whole(sharded.grad)
    if sharded in optimizer.state:
        optimizer.state[whole] = {key: _whole(value) for key, value in optimizer.state.pop(sharded).items()}
    return whole


def _give_back(whole: nn.Parameter, state: Mapping[str, Any], sharded: DTensor, optimizer: Optimizer) -> None:
    """The inverse for gradient and state, when the parameter itself has been sharded."""
    sharded.grad = None if whole.grad is None else _cut(whole.grad, sharded)
    if state:
        optimizer.state[sharded] = {
            key: _cut(value, sharded) if torch.is_tensor(value) and value.ndim > 0 else value
            for key, value in state.items()
        }


def _whole(value: Any) -> Any:
    return value.full_tensor() if is_sharded(value) else value
