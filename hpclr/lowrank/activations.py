"""What goes into the layers of a model: the second moments of their inputs, over data.

Of a layer with the matrix W (m×n) they are C = E[x xᵀ] (n×n), over all rows x that W is multiplied with: those of a
batch, of sequences, of images × output positions × groups. What an error ΔW of the weight does to the outputs is
E‖ΔW x‖² = tr(ΔW C ΔWᵀ), so a singular value decomposition of W C^½ orders directions by what they do to outputs, where
that of W alone orders them by their size (`hpclr.lowrank.regression.decompose_in`).

The mean of x xᵀ over fewer than 4 n rows is a poor estimate of C: directions that these rows happen not to have would
count for nothing, and be cut. It is then shrunk towards a multiple of the identity, under which directions count by
their size (`shrunk`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpclr.lowrank.kinds import KINDS, lowrank_class
from hpclr.lowrank.layers import LowRankModule
from hpclr.lowrank.sites import WeightSite, release
from hpclr.lowrank.svd_layers import SpatialWeight

ENOUGH = 4  # rows for each input, from which on C is taken as it is (docs/results.md, outputs of few rows)
_BLOCK = 16 << 20  # bytes of the rows in float64 that are multiplied at a time
_ATTENTION = {"in_proj_weight": (0, 1, 2), "q_proj_weight": (0,), "k_proj_weight": (1,), "v_proj_weight": (2,)}
_ARGUMENTS = ("query", "key", "value")


class _Sum:
    """Σ x xᵀ in float64, where the layer computes."""

    def __init__(self) -> None:
        self.rows = 0
        self.paused = False
        self.total: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Takes rows (r×n)."""
        if self.paused:
            return
        n = rows.shape[1]
        for block in rows.detach().split(max(1, _BLOCK // (8 * n))):
            wide = block.double()
            if self.total is None:
                self.total = torch.zeros(n, n, dtype=torch.float64, device=rows.device)
            self.total.addmm_(wide.mT, wide)
        self.rows += len(rows)


@torch.no_grad()
def input_moments(
    model: nn.Module,
    sites: Sequence[WeightSite],
    batches: Iterable[Any],
    *,
    forward: Callable[[Any], object] | None = None,
) -> dict[str, Tensor]:
    """The second moments of what layers take in, summed up batch by batch in float64.

    The model is evaluated (no dropout, stored batch statistics) and is as it was afterwards. Memory: one n×n matrix in
    float64 for each layer, on the layer's device, and a few times 16 MiB.

    Args:
        model: holds the sites.
        sites: dense or factored weights, as `hpclr.lowrank.select` finds them.
        batches: inputs of the model.
        forward: how a batch goes through the model; None: `model(batch)`.

    Returns:
        Name of a site → C (n×n), float64, symmetric, `shrunk` if the rows are few; for the groups of a convolution, and
        for the queries, keys and values of one packed projection, the mean over them. Sites without an input are
        missing: those that no batch reaches, and spatial-wise factors of convolutions, whose matrix is not multiplied
        with rows of the input.
    """
    sums = {site.name: _Sum() for site in sites}
    through = model if forward is None else forward
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        for site in sites:
            stack.enter_context(_seen(site, sums[site.name]))
        for batch in batches:
            through(batch)
    return {name: shrunk(one.total / one.rows, one.rows) for name, one in sums.items() if one.total is not None}


def shrunk(moment: Tensor, rows: float, enough: float = ENOUGH) -> Tensor:
    """The estimate (1 − ρ) C + ρ (tr C / n) I of a second moment of which few rows have been seen.

    ρ is the oracle approximating shrinkage, the best for Gaussian rows as far as C itself can tell:

        ρ = min(1, ((1 − 2/n) tr C² + tr² C) / ((r + 1 − 2/n) (tr C² − tr² C / n)))

    C of a single row counts for nothing. Source: Chen, Wiesel, Eldar and Hero, arXiv 0907.4698, equation 23.

    Args:
        moment: C (n×n), the mean of x xᵀ.
        rows: r, of how many x.
        enough: from how many rows on, as a multiple of n, C is returned as it is.
    """
    n = len(moment)
    if rows > enough * n - 0.5:  # the mean over processes is rounded
        return moment
    trace, square = moment.trace(), moment.square().sum()
    apart = (rows + 1 - 2 / n) * (square - trace.square() / n)  # 0 where C is a multiple of the identity already
    rho = torch.where(apart > 0, ((1 - 2 / n) * square + trace.square()) / apart, 1.0).clamp(0, 1)
    return (1 - rho) * moment + torch.diag((rho * trace / n).expand(n))


class InputWatch:
    """The second moments of what layers take in while their model trains, from now until it is closed.

    Forward passes in evaluation do not count, nor do those of what is compiled, where hooks that come later are not
    seen (`hpclr.lowrank.compiling.not_compiled`). Memory: as `input_moments`.

    Args:
        sites: dense or factored weights, as `hpclr.lowrank.select` finds them.
        inside: of weights that are factored, what Σ takes in, Vᵀx, in the place of x: n is then its size.
    """

    def __init__(self, sites: Sequence[WeightSite], *, inside: bool = False) -> None:
        self._inside = inside
        self._sums = {site.name: _Sum() for site in sites}
        self._open = ExitStack()
        for site in sites:
            self._open.enter_context(_seen(site, self._sums[site.name], in_training=True, inside=inside))

    @contextmanager
    def counting(self, counts: bool) -> Iterator[None]:
        """In the block passes count, or not."""
        for one in self._sums.values():
            one.paused = not counts
        try:
            yield
        finally:
            for one in self._sums.values():
                one.paused = False

    def close(self) -> None:
        """Watches no longer."""
        self._open.close()

    def take(self, site: WeightSite) -> Tensor:
        """Σ x xᵀ, and below it the number of rows x, n times: (n + 1)×n, float64, where the layer is.

        Those of several processes can be added. Zeros if the layer has taken nothing in. Can be taken once.
        """
        found, n = self._sums.pop(site.name), site.core().shape[1] if self._inside else site.shape[1]
        total = torch.zeros(n + 1, n, dtype=torch.float64, device=site.parameter.device)
        if found.total is not None:
            total[:n], total[n] = found.total, found.rows
        return total


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Look:
    """A forward pre-hook that adds up what a site takes in; in copies of the model, saved or not, it does nothing."""

    def __init__(self, site: WeightSite, found: _Sum, in_training: bool, inside: bool) -> None:
        self._site, self._found, self._in_training, self._inside = site, found, in_training, inside

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        counts = module is self._site.module and (module.training or not self._in_training)
        if counts and not torch.is_inference_mode_enabled():
            for rows in _rows(self._site, args, kwargs):
                self._found.add(_inside(self._site, rows) if self._inside and self._site.is_lowrank else rows)

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return _blind, ()


def _blind() -> object:
    return _look_away


def _look_away(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """What a copy of a hook is."""


@contextmanager
def _seen(site: WeightSite, found: _Sum, *, in_training: bool = False, inside: bool = False) -> Iterator[None]:
    """Adds up what a site's weight, or its Σ, is multiplied with; if asked, by passes of training alone."""
    look = _Look(site, found, in_training, inside)
    hook = site.module.register_forward_pre_hook(cast(Any, look), with_kwargs=True)
    try:
        with _called(site.owner):
            yield
    finally:
        hook.remove()


@torch.no_grad()
def _inside(site: WeightSite, rows: Tensor) -> Tensor:
    """Vᵀ x of rows x (r×n): r×k."""
    v, rows = site.factors.vh.mT, rows.detach()
    dtype = torch.promote_types(rows.dtype, v.dtype)
    return rows.to(dtype) @ v.to(dtype)


@contextmanager
def _called(owner: nn.Module | None) -> Iterator[None]:
    """torch's attention reads the weight of its output projection; a class of ours calls it."""
    if owner is None or isinstance(owner, LowRankModule):
        yield
        return
    owner.__class__ = cast(Any, lowrank_class(type(owner), KINDS))
    try:
        yield
    finally:
        release(owner)


def _rows(site: WeightSite, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The rows (r×n) of one call's input."""
    module = site.module
    if isinstance(module, SpatialWeight):
        return
    if isinstance(module, nn.MultiheadAttention):
        inputs: list[Any] = [kwargs.get(name, *args[i : i + 1]) for i, name in enumerate(_ARGUMENTS)]
        wanted = [inputs[i] for i in _ATTENTION[site.slot.weight]]
        unique = list({id(x): x for x in wanted}.values())
        yield from (x.flatten(0, -2) for x in (unique if len(unique) == 1 else wanted))
        return
    x = args[0] if args else next(iter(kwargs.values()))
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        yield from patches(module, x)
    else:
        yield x.reshape(-1, x.shape[-1])


def patches(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Iterator[Tensor]:
    """What the matrix of a convolution, out × (in/groups · kernel), is multiplied with.

    Args:
        layer: a convolution, whatever its groups, stride, padding and dilation.
        x: its input, (N, in, *size) or (in, *size).

    Yields:
        (images · positions · groups) × (in/groups · kernel), some images at a time.
    """
    kernel = layer.kernel_size
    x = x.unsqueeze(0) if x.ndim == len(kernel) + 1 else x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    windows = _windows(layer, x)
    size = max(1, _BLOCK // (8 * windows[0].numel())) if len(windows) else 1
    yield from (part.reshape(-1, layer.in_channels // layer.groups * prod(kernel)) for part in windows.split(size))


def _windows(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """A view (N, *positions, in, *kernel) of a padded input (N, in, *size)."""
    d = len(layer.kernel_size)
    for dim, (length, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        x = x.unfold(dim, dilation * (length - 1) + 1, stride)[..., ::dilation]
    return x.permute(0, *range(2, 2 + d), 1, *range(2 + d, 2 + 2 * d))
