"""`model.init: svd`: starting weights from a sample of the training data.

The built-in mlp starts as the best linear map of the targets (`hpclr.lowrank.linear_start`). Other models, and an mlp
with weights of its own, have a start of this kind only where a method makes factors of their weights before the first
step: those are then the best ones of their rank for the inputs that each layer gets, not the best for any inputs.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpclr.config import RunFile
from hpclr.config.schema import FactorsInit, FixedRank, Mlp, Nested, SvdInit, SvdTraining
from hpclr.data import Batch, BatchLoader
from hpclr.errors import UsageError, usage_errors
from hpclr.lowrank import WeightSite, select
from hpclr.lowrank.activations import input_moments
from hpclr.lowrank.linear_start import carried_rank, start_linear
from hpclr.lowrank.regression import LinearFit, Moments, fit_linear, nearest_in
from hpclr.lowrank.svd_layers import CHANNEL
from hpclr.methods.two_factors import share_of_side
from hpclr.models import MLP
from hpclr.parallel.group import Group

LARGEST = 16384  # inputs and outputs together: the square of that in float64 takes 2 GiB
_CHOICES = ("include", "exclude", "max_aspect", "keep_first", "keep_last")
_STEEPEST = 2.0**12  # factor on the outputs of a linear map, where the classes can be told apart without error


def init_of(run: RunFile) -> SvdInit | FactorsInit:
    """What `model.init` asks for, with all its values."""
    if isinstance(run.model, Mlp):
        return run.model.init if isinstance(run.model.init, SvdInit) else SvdInit()
    return run.model.init if isinstance(run.model.init, FactorsInit) else FactorsInit()


def start_together(run: RunFile, model: nn.Module, loader: BatchLoader, group: Group) -> str:
    """Sets the starting weights on the first process and gives them to all; returns what was done, in words.

    Args:
        run: has `model.init`.
        model: with its initial weights, the same on all processes.
        loader: whole batches of the training split, not augmented.
        group: the processes, all of which call this.

    Raises:
        UsageError: on all processes, for a run in which it has no meaning, or data that cannot be used.
    """
    told = group.on_first(lambda: start(run, model, sample_of(run, loader)))
    parameters = list(model.parameters())
    if group.size > 1:
        _, received = group.broadcast(None, [parameter.detach() for parameter in parameters])
        with torch.no_grad():
            for parameter, value in zip(parameters, received, strict=True):
                parameter.copy_(value)
    return told


def sample_of(run: RunFile, loader: BatchLoader) -> "Sample":
    """The samples with which the first epoch begins."""
    return Sample(loader, init_of(run).samples)


class Sample:
    """The first samples of an epoch; can be gone through again and again.

    Args:
        loader: whole batches.
        size: how many samples; at most all are taken.
    """

    def __init__(self, loader: BatchLoader, size: int) -> None:
        self.loader, self.size = loader, min(size, loader.size)

    def __iter__(self) -> Iterator[Batch]:
        for index in range(-(-self.size // self.loader.batch_size)):
            yield next(self.loader.batch(0, index).split(self.size - index * self.loader.batch_size))


@torch.no_grad()
def start(run: RunFile, model: nn.Module, sample: Sample) -> str:
    """Sets the starting weights; returns what was done, in words.

    Raises:
        UsageError: for a run in which it has no meaning, or data that cannot be used.
    """
    init = init_of(run)
    with usage_errors("method"):
        ranks = _ranks_at_start(run, model)
    with usage_errors("model.init: svd"):
        if isinstance(init, SvdInit) and isinstance(model, MLP) and run.model.weights is None:
            return _as_linear_map(model, init, sample, ranks)
        _check_meaning(run, ranks)
        return _as_best_factors(model, sample, ranks)


def _check_meaning(run: RunFile, ranks: Mapping[WeightSite, int]) -> None:
    if ranks:
        return
    name = getattr(run.model, "name", getattr(run.model, "target", ""))
    why = (
        "it would replace the weights of model.weights; take one of the two out"
        if isinstance(name, str) and name == "mlp"
        else f"of {name}, whose layers are no stack from samples to targets, it can only make the factors with which a "
        "method begins, and this method begins with none; take model.init out, or use the model mlp, or a method that "
        "begins with factors of a fixed rank: fixed_rank, or nested with delay 0"
    )
    raise UsageError(f"model.init: svd has no meaning here: {why}")


def _ranks_at_start(run: RunFile, model: nn.Module) -> dict[WeightSite, int]:
    """The weights that will be factors before the first step, and their ranks."""
    method = run.method
    if isinstance(method, FixedRank | SvdTraining) and method.init == "random":
        raise UsageError(
            "method.init: random replaces the weights that model.init: svd would make; take one of them out"
        )
    if isinstance(method, FixedRank):
        share = method.rank
    elif isinstance(method, Nested) and method.delay == 0:
        share = max(method.fractions)
    else:
        return {}
    selection = select(model, kinds=CHANNEL, **{key: getattr(method, key) for key in _CHOICES})
    return {site: share_of_side(share, site.shape) for site in selection.eligible}


# --- the best linear map ---------------------------------------------------------------------------------------------


def _as_linear_map(model: MLP, init: SvdInit, sample: Sample, ranks: Mapping[WeightSite, int]) -> str:
    layers = [*(layer for layer in model.layers if isinstance(layer, nn.Linear)), model.head]
    limits = {layers.index(site.module): rank for site, rank in ranks.items() if isinstance(site.module, nn.Linear)}
    fit = regression(sample, layers[-1].out_features, init.ridge)
    rank = carried_rank(layers, model.activation, fit, limits)
    factor = _best_factor(fit, rank, sample) if rank and _is_labelled(sample) else 1.0
    start_linear(layers, model.activation, fit.scaled(factor), scale=init.scale, ranks=limits)
    return (
        f"starts as the best linear map of rank {rank} of {sample.size} samples, which explains "
        f"{fit.explained(rank):.1%} of the variance of the targets ({fit.explained():.1%} at rank {fit.rank})"
    )


def regression(sample: Sample, outputs: int, ridge: float) -> LinearFit:
    """The linear maps from flattened samples to targets.

    Args:
        sample: labelled samples, or windows and the rows that follow.
        outputs: how many numbers a target has; classes.
        ridge: as `hpclr.lowrank.regression.fit_linear`.

    Raises:
        UsageError: if there are more inputs and outputs than the regression takes.
    """
    moments = Moments()
    for batch in sample:
        x = batch.x.flatten(1)
        if x.shape[1] + outputs > LARGEST:
            raise UsageError(
                f"model.init: svd: a linear regression of {outputs} outputs on {x.shape[1]} inputs is too large; it "
                f"takes up to {LARGEST} of both together. Take model.init out, or make the samples smaller"
            )
        moments.add(x, targets(batch, outputs))
    return fit_linear(moments, ridge)


def targets(batch: Batch, outputs: int) -> Tensor:
    """What a linear map is to give (N, outputs): 1 for a sample's class and 0 for others, or the rows to predict."""
    return batch.y.flatten(1) if batch.y.is_floating_point() else F.one_hot(batch.y, outputs)


def _is_labelled(sample: Sample) -> bool:
    return not next(iter(sample)).y.is_floating_point()


def _best_factor(fit: LinearFit, rank: int, sample: Sample) -> float:
    """The factor on the outputs of a map with which, as logits, they have the least cross-entropy; by bisection."""
    weight, bias = fit.leading(rank)
    logits = torch.cat([batch.x.flatten(1).double() @ weight.T + bias for batch in sample])
    labels = torch.cat([batch.y for batch in sample])
    of_labels = logits.gather(1, labels[:, None]).mean()

    def slope(factor: float) -> float:
        return float(((factor * logits).softmax(1) * logits).sum(1).mean() - of_labels)

    low, high = 0.0, 1.0
    while slope(high) < 0 and high < _STEEPEST:
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return high


# --- the best factors ------------------------------------------------------------------------------------------------


def _as_best_factors(model: nn.Module, sample: Sample, ranks: Mapping[WeightSite, int]) -> str:
    place = next(model.parameters()).device
    moments = input_moments(model, list(ranks), (batch.x.to(place) for batch in sample))
    unseen = [site.name for site in ranks if site.name not in moments]
    for site, rank in ranks.items():
        if site.name in moments:
            _replace(site, nearest_in(site.core(), moments[site.name], rank))
    rest = f"; no sample reaches {', '.join(unseen)}" if unseen else ""
    return f"factors of {len(moments)} layers start as the best ones for the inputs of {sample.size} samples{rest}"


def _replace(site: WeightSite, matrix: Tensor) -> None:
    weight = site.parameter.detach()
    whole = weight.clone(memory_format=torch.contiguous_format)
    site.to_matrix(whole).copy_(matrix)
    weight.copy_(whole)
