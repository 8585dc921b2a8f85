"""The places in a model where a weight matrix lives, and which of them may become low-rank."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from hpclr.lowrank.embedding import EmbeddingWeight, why_not_with_head
from hpclr.lowrank.factors import SVD, svd
from hpclr.lowrank.kinds import EMBEDDINGS, KINDS, Kinds, kind_of, lowrank_class, slots_of
from hpclr.lowrank.layers import LowRankModule, Slot, holds, install, is_sharded, share, uninstall
from hpclr.lowrank.product import Factors


@dataclass(eq=False)
class WeightSite:
    """One weight matrix of a model, dense or factored."""

    name: str  # what users call it: the module's name; `.in_proj` and the like added for attention
    path: str  # the module's name in the model, "" for the model itself
    module: nn.Module
    slot: Slot
    kinds: Kinds = KINDS  # the form it takes if it is dense and becomes factored
    owner: nn.Module | None = None  # of an attention layer's output projection: that layer
    embeddings: tuple[nn.Module, ...] = ()  # of a head: those whose weight is the same Parameter

    def key(self, parameter: str) -> str:
        """The name in the model's state dict of one of the module's parameters."""
        return f"{self.path}.{parameter}" if self.path else parameter

    @property
    def is_lowrank(self) -> bool:
        """Whether the weight is held as factors."""
        return isinstance(self.module, LowRankModule) and self.module.is_lowrank(self.slot)

    @property
    def parameter(self) -> nn.Parameter:
        """The dense weight, or Σ: one and the same object through all conversions."""
        key = self.slot.names[1] if self.is_lowrank else self.slot.weight
        parameter = self.module._parameters[key]
        assert parameter is not None
        return parameter

    @property
    def factors(self) -> Factors:
        """U, Σ, Vᵀ of a converted weight."""
        return cast(LowRankModule, self.module).factors(self.slot)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the weight seen as a matrix."""
        if self.is_lowrank:
            return cast(LowRankModule, self.module).matrix_shape(self.slot)
        m, n = self.to_matrix(self.parameter).shape
        return m, n

    @property
    def groups(self) -> int:
        """Groups of a convolution, else 1."""
        return int(getattr(self.module, "groups", 1))

    @property
    def positions(self) -> int | None:
        """Positions of a convolution's kernel, 9 for 3×3; None for anything else."""
        size = getattr(self.module, "kernel_size", None)
        return None if size is None else prod(size)

    @property
    def rank(self) -> int:
        """k of a converted weight, min(m, n) of a dense one."""
        return self.parameter.shape[0] if self.is_lowrank else min(self.shape)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The m×n view of the dense weight or of anything shaped like it (moments, gradients)."""
        if isinstance(self.module, LowRankModule):
            return self.module.to_matrix(weight)
        kind = kind_of(type(self.module), self.kinds)
        assert kind is not None
        return kind.plain.to_matrix(cast(LowRankModule, self.module), weight)

    def core(self) -> Tensor:
        """Σ (k×k, or its diagonal) of a converted weight, W (m×n) of a dense one."""
        return self.parameter.detach() if self.is_lowrank else self.to_matrix(self.parameter.detach())

    def convert(self, u: Tensor, sigma: Tensor, vh: Tensor) -> None:
        """Dense to factored, or to other factors, in the parameter's own type."""
        like = self.parameter
        factors = (_compact(t.to(device=like.device, dtype=like.dtype)) for t in (u, sigma, vh))
        layer = self._specialised()
        install(layer, self.slot, *factors)
        self._share(layer)

    def set_rank(self, rank: int) -> None:
        """Gives it factors of this rank, with contents still to come (from a state dict)."""
        if not self.is_lowrank or self.rank != rank:
            layer = self._specialised()
            layer.resize(self.slot, rank)
            self._share(layer)

    def _specialised(self) -> LowRankModule:
        """The module, of a class that can hold factors.

        torch's attention reads the weight of its output projection, which would be rebuilt; a class of ours calls it.
        """
        for module in (self.module, self.owner):
            if module is not None and not isinstance(module, LowRankModule):
                module.__class__ = cast(Any, lowrank_class(type(module), self.kinds))
        for embedding in self.followers():
            if not isinstance(embedding, LowRankModule):
                embedding.__class__ = cast(Any, lowrank_class(type(embedding), EMBEDDINGS))
        return cast(LowRankModule, self.module)

    def followers(self) -> list[nn.Module]:
        """The embeddings that hold the Parameter still: whoever gives one another weight has untied it."""
        return [e for e in self.embeddings if any(held is self.parameter for held in e._parameters.values())]

    def _share(self, layer: LowRankModule) -> None:
        followers = self.followers()
        for embedding in followers:
            share(embedding, layer, self.slot)
        layer.followers = max(layer.followers, len(followers)) if self.is_lowrank else 0

    def factorize(self, rank: int | None = None, parts: SVD | None = None) -> None:
        """Dense to the leading `rank` directions of its decomposition (all of them if None)."""
        u, s, vh = parts or svd(self.core())
        k = s.numel() if rank is None else rank
        self.convert(u[:, :k], self._specialised().core_of(s[:k]), vh[:k])

    def densify(self) -> None:
        """Factored to dense, and the module to its own class once nothing in it is factored."""
        layer = cast(LowRankModule, self.module)
        uninstall(layer, self.slot)
        self._share(layer)
        for module in (self.module, self.owner, *self.followers()):
            release(module)

    def take_form(self, kinds: Kinds) -> None:
        """Makes these the kinds by which it is, or will be, factored; a module of other kinds becomes dense first."""
        kind, module = kind_of(type(self.module), kinds), self.module
        assert kind is not None
        if isinstance(module, LowRankModule) and module.mixin not in (kind.quick, kind.plain):
            for slot in [slot for slot in module.slots if module.is_lowrank(slot)]:
                uninstall(module, slot)
            module.__class__ = cast(Any, module.dense_class)
        self.kinds = kinds
        self.slot = next(slot for slot in slots_of(module, kinds) if slot.weight == self.slot.weight)


def release(module: nn.Module | None) -> None:
    """Gives a module its own class back if nothing in it, nor the output projection of attention, is factored."""
    if not isinstance(module, LowRankModule) or isinstance(getattr(module, "out_proj", None), LowRankModule):
        return
    if not any(module.is_lowrank(slot) for slot in module.slots):
        module.__class__ = cast(Any, module.dense_class)


def _compact(part: Tensor) -> Tensor:
    """Contiguous, in memory of its own: not within a larger matrix, all of which it would keep alive."""
    part = part.contiguous()
    return part.clone() if part.untyped_storage().nbytes() > part.nbytes else part


@dataclass
class Selection:
    """Which weights of a model may be converted, and why the others may not."""

    candidates: list[WeightSite] = field(default_factory=list)  # every weight of a kind that has a low-rank form
    eligible: list[WeightSite] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)  # layer name → reason, in registration order
    order: list[str] = field(default_factory=list)  # every layer that holds parameters


def select(
    model: nn.Module,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    max_aspect: float = float("inf"),
    keep_first: bool = False,
    keep_last: bool = False,
    kinds: Kinds | None = None,
    tied: bool = False,
) -> Selection:
    """Finds the weights that may become low-rank, in registration order.

    Args:
        model: any module; weights already factored count as eligible.
        include: patterns of layer names (`*` and `?`); None means all.
        exclude: patterns of layer names to leave alone.
        max_aspect: leave weights alone whose max(m, n)/min(m, n) is this or more.
        keep_first: leave the first layer of an eligible type alone, whatever its shape.
        keep_last: leave the last layer of an eligible type alone (the head), whatever its shape.
        kinds: the form of factors that is wanted, and weights in the other form are left alone; None: that with frozen
            bases for dense weights, and any for those already factored.
        tied: take a head, too, whose weight is that of embeddings: one nn.Linear and one or more nn.Embedding hold the
            same Parameter, and become factors together. It is then asked for, and `max_aspect`, `keep_first` and
            `keep_last` do not concern it; to exclude one of them excludes both. Frozen bases only.

    Raises:
        ValueError: if a pattern matches no layer; with `tied`, if the model has no such head, or none may be converted.
        TypeError: if a string is given where a list of patterns belongs; with `tied`, for a sharded model.
    """
    if isinstance(include, str) or isinstance(exclude, str):
        raise TypeError("include and exclude take a list of patterns; for a single one write ['…']")
    selection = Selection()
    shared = _shared_storage(model)
    selection.candidates = candidates = list(_sites(model, selection, kinds or KINDS))
    if tied:
        _check_tied(model, candidates)
    edges = {
        site.name for keep, site in zip((keep_first, keep_last), candidates[:1] + candidates[-1:], strict=False) if keep
    }
    _check_patterns([*(include or ()), *exclude], selection.order)
    names = _names_of_embeddings(model)
    for site in candidates:
        together = tied and bool(site.embeddings)
        others = [names[embedding] for embedding in site.embeddings if together]
        reason = _named_against(site, include, exclude, others) or (_other_form(site) if kinds else None)
        if reason is None and not site.is_lowrank:
            limit = float("inf") if together else max_aspect
            reason = _unsuitable(site, site.parameter) or _why_tied(site, shared, together)
            reason = reason or _unwanted(site, site.parameter, limit)
        if reason is None and site.name in edges and not together:
            reason = "kept dense as the first or last layer (keep_first, keep_last)"
        if reason is None:
            selection.eligible.append(site)
        else:
            selection.left_alone[site.name] = reason
    _explain_embeddings(names, selection)
    if tied:
        _check_any_tied(selection)
    return selection


def _sites(model: nn.Module, selection: Selection, kinds: Kinds) -> Iterator[WeightSite]:
    """Every weight of an eligible kind; other layers with parameters go into the selection with the reason."""
    owners: dict[nn.Module, nn.Module] = {}
    embeddings = _embeddings(model)
    for name, module in model.named_modules():
        found = [slot for slot in slots_of(module, kinds) if holds(module, slot)]
        if found and isinstance(module, nn.MultiheadAttention):
            owners[module.out_proj] = module
        for slot in found:
            stem = slot.stem.rstrip("_")
            site_name = ".".join(filter(None, (name, stem))) or _class_name(module)
            selection.order.append(site_name)
            site = WeightSite(site_name, name, module, slot, kinds, owners.get(module))
            if isinstance(module, nn.Linear):
                site.embeddings = embeddings.get(site.parameter, ())
            yield site
        if not found and module._parameters:
            selection.order.append(name or _class_name(module))
            selection.left_alone[selection.order[-1]] = _why_no_site(module)


def _embeddings(model: nn.Module) -> dict[nn.Parameter, tuple[nn.Module, ...]]:
    """Which embeddings hold a Parameter, as their weight or as the Σ of the factors that they share with a head."""
    found: dict[nn.Parameter, tuple[nn.Module, ...]] = {}
    for module in model.modules():
        parameter = module._parameters.get("sigma" if isinstance(module, LowRankModule) else "weight")
        if isinstance(module, nn.Embedding) and parameter is not None:
            found[parameter] = (*found.get(parameter, ()), module)
    return found


def _check_tied(model: nn.Module, candidates: Sequence[WeightSite]) -> None:
    if any(map(is_sharded, model.parameters())):
        raise TypeError(
            "tied=True has a head and its embedding change together, which they cannot do on a sharded model, of which "
            "each process holds a part; leave it out, or use hpclr.parallel.Replica where the whole model fits on one "
            "device"
        )
    if not any(site.embeddings for site in candidates):
        raise ValueError("tied=True, but no nn.Linear of the model has the weight of an nn.Embedding; leave it out")


def _check_any_tied(selection: Selection) -> None:
    heads = [site for site in selection.candidates if site.embeddings]
    if not any(head in selection.eligible for head in heads):
        reasons = "; ".join(f"{head.name}: {selection.left_alone[head.name]}" for head in heads)
        raise ValueError(f"tied=True, but no head with the weight of an embedding can be converted ({reasons})")


def _names_of_embeddings(model: nn.Module) -> dict[nn.Module, str]:
    modules = model.named_modules()
    return {module: name or _class_name(module) for name, module in modules if isinstance(module, nn.Embedding)}


def _explain_embeddings(names: Mapping[nn.Module, str], selection: Selection) -> None:
    """Embeddings that have, or would get, the factors of a head are no layers of their own."""
    for site in selection.candidates:
        for embedding in site.embeddings if site.is_lowrank or site in selection.eligible else ():
            what = "its factors are those" if site.is_lowrank else "its weight is that"
            selection.left_alone[names[embedding]] = f"{what} of the head '{site.name}', and it changes with that"


def _class_name(module: nn.Module) -> str:
    cls = module.dense_class if isinstance(module, LowRankModule) else type(module)
    return cls.__name__


def _why_no_site(module: nn.Module) -> str:
    if isinstance(module, EmbeddingWeight):
        return "its factors are those of a head that is not here, or has others by now"
    if slots_of(module):
        return "its weight is computed from other parameters (parametrised, weight or spectral norm, pruning)"
    return f"{type(module).__name__} has no low-rank form"


def _named_against(
    site: WeightSite, include: Sequence[str] | None, exclude: Sequence[str], others: Sequence[str]
) -> str | None:
    """Why the names given, of a layer and others that change with it, say that a weight is left alone; None if not."""
    if include is not None and not _matches(site.name, include):
        return "not among the names to include"
    return "excluded by name" if any(_matches(name, exclude) for name in (site.name, *others)) else None


def _other_form(site: WeightSite) -> str | None:
    """The two forms do not mix in one module."""
    if not isinstance(site.module, LowRankModule) or site.module.trains_bases == site.kinds[0].plain.trains_bases:
        return None
    bases = "trained" if site.module.trains_bases else "frozen"
    return f"its module holds factors with {bases} bases, of another method; densify it first"


def _unsuitable(site: WeightSite, weight: Any) -> str | None:
    if parametrize.is_parametrized(site.module):
        return "parametrised: its weight is computed from other parameters"
    taken = [name for name in site.slot.names if hasattr(site.module, name)]
    if taken:
        return f"it has an attribute '{taken[0]}' of its own, the name of a factor"
    if is_lazy(weight):
        return "lazy: its shape is not known yet; run one batch through the model first"
    if type(weight) is not nn.Parameter and not is_sharded(weight):
        return f"its weight is a {type(weight).__name__}, not a plain Parameter"
    if weight.is_meta:
        return "its weight is on the meta device and has no values"
    if not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not real floating point"
    return None


def _why_tied(site: WeightSite, shared: Counter[int], together: bool) -> str | None:
    """Why others have its weight and it cannot change with all of them; None if nobody has, or it can."""
    others = shared[_place(site.parameter)] - 1
    if others == len(site.embeddings) and together:
        if site.kinds is not KINDS:
            return "tied: a head and its embedding become factors with frozen bases alone"
        return why_not_with_head(site.embeddings, site.slot.names)
    return "tied: its weight is shared with another layer" if others > 0 else None


def _unwanted(site: WeightSite, weight: nn.Parameter, max_aspect: float) -> str | None:
    if not weight.requires_grad:
        return "frozen: its weight does not require gradients"
    m, n = site.shape
    if min(m, n) == 0:
        return f"empty: its weight is {m}×{n}"
    if max(m, n) >= max_aspect * min(m, n):
        return f"its weight is {m}×{n}, of aspect ratio {max(m, n) / min(m, n):.3g} ≥ {max_aspect:g} (max_aspect)"
    return None


def _shared_storage(model: nn.Module) -> Counter[int]:
    """How many parameter names point to the same memory; modules that appear under two names count once."""
    counts: Counter[int] = Counter()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not is_lazy(parameter) and parameter.numel() and not parameter.is_meta:
                counts[_place(parameter)] += 1
    return counts


def _place(parameter: nn.Parameter) -> int:
    """Where its memory begins; of a sharded one, parts of which may be empty, the object itself tells."""
    return id(parameter) if is_sharded(parameter) else parameter.data_ptr()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
            raise ValueError(
                f"the pattern '{pattern}' (include or exclude) matches no layer of the model; its layers are {known}"
            )
