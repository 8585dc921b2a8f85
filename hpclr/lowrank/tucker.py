"""Convolutions as three: 1×1 down, a small core of the kernel's size, 1×1 up (Tucker-2).

Of a weight C (out, in, kh, kw) the first two modes are cut and those of the kernel are left: C = S ×₁ U_out ×₂ U_in
with S (r_out, r_in, kh, kw), by truncated MLSVD and HOOI (`hpclr.lowrank.multilinear`). The ranks come from the weight
alone, by what stands out of the noise in its two unfoldings, or are given.

The layer becomes another module, `Tucker2Conv`, all of whose parts are trained: unlike `factorize` this is for models
that are trained, and to be made smaller or tuned further.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from hpclr.lowrank.factors import FactorizationError
from hpclr.lowrank.multilinear import Tucker, hooi, mlsvd, multilinear_rank
from hpclr.lowrank.ranks import MarchenkoPastur, RankRule
from hpclr.lowrank.sites import Selection, WeightSite, select

Ranks = RankRule | float | tuple[int, int]
_NOISE_EDGE = MarchenkoPastur()
_OUT, _IN = 0, 1  # modes of a convolution's weight
_NOTHING = "by this rule nothing in its weight is worth keeping"


class Tucker2Conv(nn.Sequential):
    """A two-dimensional convolution in three steps: `reduce` (in → r_in), `core` (r_in → r_out), `expand` (→ out)."""

    reduce: nn.Conv2d
    core: nn.Conv2d
    expand: nn.Conv2d

    @property
    def ranks(self) -> tuple[int, int]:
        """(r_out, r_in)."""
        return self.core.out_channels, self.core.in_channels

    def dense_weight(self) -> Tensor:
        """The weight (out, in, kh, kw) of the one convolution that does the same."""
        factors = {_OUT: self.expand.weight[:, :, 0, 0], _IN: self.reduce.weight[:, :, 0, 0].mT}
        return Tucker(self.core.weight, factors).dense()


class TuckerReport(NamedTuple):
    """What became of one layer."""

    name: str
    shape: tuple[int, ...] | None  # (out, in, kh, kw), if it is decomposed now
    ranks: tuple[int, int] | None  # (r_out, r_in), if it is decomposed now
    parameters: tuple[int, int] | None  # of the layer, bias included, before and now, if it is decomposed now
    converted: bool
    reason: str  # why it was left alone; empty if it was not


@torch.no_grad()
def tucker2(conv: nn.Conv2d, ranks: Ranks = _NOISE_EDGE, sweeps: int = 1) -> Tucker2Conv:
    """Decomposes a convolution.

    Args:
        conv: with groups=1; it is not changed. Stride, padding and dilation go to the core, the bias to the last step.
        ranks: a rank rule judges each of the two unfoldings, out × (in·kh·kw) and in × (out·kh·kw); a number between 0
            and 1 is a share of their full ranks; a pair is (r_out, r_in), each at most the full rank. Full ranks
            preserve the function.
        sweeps: of HOOI, after the truncated MLSVD.

    Returns:
        A new module with new parameters, in the type and on the device of the old ones.

    Raises:
        ValueError: for a convolution with groups, ranks out of range, or if the rule finds nothing but noise.
        FactorizationError: if the weight has infinite or NaN entries.
    """
    if conv.groups != 1:
        raise ValueError(f"a Tucker-2 convolution has one group; found {conv.groups}")
    wanted = _ranks_wanted(ranks, conv.weight.detach())
    if not all(wanted.values()):
        raise ValueError(f"a Tucker-2 convolution needs a rank in both modes: {_NOTHING}")
    return _decomposed(conv, wanted, sweeps)


def _ranks_wanted(ranks: Ranks, weight: Tensor) -> dict[int, int]:
    """Rank of the first two modes."""
    if callable(ranks):
        return multilinear_rank(weight, (_OUT, _IN), ranks)
    (out, into), kernel = weight.shape[:2], weight[0, 0].numel()
    full = {_OUT: min(out, into * kernel), _IN: min(into, out * kernel)}
    if isinstance(ranks, tuple):
        _check_pair(ranks)
        return {mode: min(rank, full[mode]) for mode, rank in zip((_OUT, _IN), ranks, strict=True)}
    if not 0 < ranks <= 1:
        raise ValueError(
            f"ranks must be a rank rule, a share above 0 and at most 1.0, or a pair (r_out, r_in); found {ranks!r}"
        )
    share = Fraction(str(ranks))  # exactly what was written
    return {mode: math.ceil(share * rank) for mode, rank in full.items()}


def _check_pair(ranks: tuple[int, ...]) -> None:
    if len(ranks) != 2 or min(ranks) < 1:
        raise ValueError(f"a pair of ranks is (r_out, r_in), whole numbers from 1; found {ranks!r}")


def _decomposed(conv: nn.Conv2d, ranks: dict[int, int], sweeps: int) -> Tucker2Conv:
    """The three steps, with what the convolution had besides its weight."""
    weight = conv.weight.detach()
    parts = hooi(weight, mlsvd(weight, ranks), sweeps)
    up, down = parts.factors[_OUT], parts.factors[_IN]
    r_out, r_in = up.shape[1], down.shape[1]
    reduce = _empty(weight, conv.in_channels, r_in, 1, bias=False)
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    core = _empty(weight, r_in, r_out, *geometry, bias=False, padding_mode=conv.padding_mode)
    expand = _empty(weight, r_out, conv.out_channels, 1, bias=conv.bias is not None)
    for step, values in ((reduce, down.mT[:, :, None, None]), (core, parts.core), (expand, up[:, :, None, None])):
        step.weight.copy_(values)
        step.weight.requires_grad_(conv.weight.requires_grad)
    if conv.bias is not None and expand.bias is not None:
        expand.bias.copy_(conv.bias)
        expand.bias.requires_grad_(conv.bias.requires_grad)
    steps: OrderedDict[str, nn.Module] = OrderedDict(reduce=reduce, core=core, expand=expand)
    return Tucker2Conv(steps).train(conv.training)


def _empty(like: Tensor, *sizes: Any, **options: Any) -> nn.Conv2d:
    """A convolution whose values are yet to come: none are drawn."""
    return cast(nn.Conv2d, skip_init(nn.Conv2d, *sizes, device=like.device, dtype=like.dtype, **options))


@torch.no_grad()
def tucker_decompose(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    ranks: Ranks | Mapping[str, tuple[int, int]] = _NOISE_EDGE,
    *,
    sweeps: int = 1,
    only_if_it_pays: bool = True,
) -> list[TuckerReport]:
    """Replaces convolutions of a model by `Tucker2Conv`, in place.

    Each one is another module with other parameters: make optimisers, hooks and lists of parameters afterwards; the
    keys of the state dict change too (`name.reduce.weight`, `name.core.weight`, `name.expand.weight`). To `summarize`
    the three are layers like others: what they came from is in the reports.

    Args:
        model: any module that holds convolutions; one that is a convolution itself cannot be replaced: `tucker2`.
        include: patterns of layer names; None means all.
        exclude: patterns of layer names to leave alone.
        ranks: as in `tucker2`, for all; a mapping gives the pair (r_out, r_in) of each layer by name.
        sweeps: of HOOI.
        only_if_it_pays: leave alone what would take as many operations, or more, in three steps as in one; what takes
            fewer has fewer parameters too.

    Returns:
        One entry for every layer that holds parameters: decomposed, or left alone and why.

    Raises:
        ValueError: for a pattern or a name that matches no layer, or ranks out of range.
    """
    selection = select(model, include=include, exclude=exclude)
    if isinstance(ranks, Mapping):
        _check_mapping(ranks, selection)
    inside = {step for module in model.modules() if isinstance(module, Tucker2Conv) for step in module}
    outcomes = {name: _left_alone(name, reason) for name, reason in selection.left_alone.items()}
    for site in selection.eligible:
        wanted = ranks.get(site.name) if isinstance(ranks, Mapping) else ranks
        reason = _unsuitable(site, inside) or ("" if wanted else "no ranks are given for it")
        outcomes[site.name] = (
            _left_alone(site.name, reason)
            if reason or not wanted
            else _replaced(model, site, wanted, sweeps, only_if_it_pays)
        )
    return [outcomes[name] for name in selection.order]


def _check_mapping(ranks: Mapping[str, tuple[int, int]], selection: Selection) -> None:
    """Refuses what is wrong before anything is changed."""
    for name, pair in ranks.items():
        _check_pair(pair)
        if name not in {site.name for site in selection.eligible}:
            reason = selection.left_alone.get(name, "the model has no such layer")
            raise ValueError(f"ranks are given for layer '{name}', which cannot be decomposed: {reason}")


def _replaced(model: nn.Module, site: WeightSite, ranks: Ranks, sweeps: int, only_if_it_pays: bool) -> TuckerReport:
    """Puts a decomposed convolution in the place, or the places, of one."""
    conv = cast(nn.Conv2d, site.module)
    try:
        wanted = _ranks_wanted(ranks, conv.weight.detach())
    except FactorizationError as error:
        return _left_alone(site.name, str(error))
    reason = _not_worth_it(conv, wanted, only_if_it_pays)
    if reason:
        return _left_alone(site.name, reason)
    new = _decomposed(conv, wanted, sweeps)
    for parent in list(model.modules()):
        for key in [key for key, child in parent._modules.items() if child is conv]:
            parent._modules[key] = new
    return TuckerReport(site.name, tuple(conv.weight.shape), new.ranks, (_size(conv), _size(new)), True, "")


def _unsuitable(site: WeightSite, inside: set[nn.Module]) -> str:
    """Why a layer is not one that can be decomposed; empty if it is."""
    module = site.module
    if site.is_lowrank:
        return "factored already; densify it first"
    if type(module) is not nn.Conv2d:
        return f"a {type(module).__name__}, not a two-dimensional convolution"
    if module in inside:
        return "a step of a Tucker-2 convolution"
    if module.groups != 1:
        return f"it has {module.groups} groups"
    if module.kernel_size == (1, 1):
        return "1×1: a matrix, which hpclr.lowrank.factorize takes"
    if not site.path:
        return "it is the model itself, which cannot be replaced in place; hpclr.lowrank.tucker.tucker2 returns another"
    return "it has hooks, which would be lost" if _has_hooks(module) else ""


def _has_hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _not_worth_it(conv: nn.Conv2d, ranks: dict[int, int], only_if_it_pays: bool) -> str:
    """Why a convolution stays as it is at these ranks; empty if it does not."""
    if not all(ranks.values()):
        return _NOTHING
    share = _operations(conv, ranks) / conv.weight.numel()
    if only_if_it_pays and share >= 1:
        return f"at ranks {ranks[_OUT]} and {ranks[_IN]} three steps would take {share:.2f} times the operations of one"
    return ""


def _operations(conv: nn.Conv2d, ranks: dict[int, int]) -> int:
    """Multiplications of the three steps for each position of the output; of the one there are weight.numel()."""
    r_out, r_in = ranks[_OUT], ranks[_IN]
    before_the_stride = conv.in_channels * r_in * math.prod(conv.stride)
    return before_the_stride + r_in * r_out * math.prod(conv.kernel_size) + r_out * conv.out_channels


def _left_alone(name: str, reason: str) -> TuckerReport:
    return TuckerReport(name, None, None, None, False, reason)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
