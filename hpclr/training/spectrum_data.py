"""`hpclr spectrum --data`: what the layers of a model make of samples, and what a linear map would."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from hpclr.data import Batch, Dataset, Loader, open_dataset
from hpclr.errors import UsageError
from hpclr.lowrank import WeightSite
from hpclr.lowrank.activations import input_moments
from hpclr.lowrank.linear_start import UNITS
from hpclr.lowrank.regression import LinearFit, Moments, fit_linear
from hpclr.training.informed import LARGEST, Sample, targets
from hpclr.training.precision import Precision

_AT_ONCE = 256  # samples


class Asked(NamedTuple):
    """What a user wants the weights judged by.

    Attributes:
        data: a prepared file; None: nothing but the weights.
        samples: how many of its training samples.
        trust: whether a model that a checkpoint names as `target:` may be imported.
    """

    data: Path | None = None
    samples: int = 2048
    trust: bool = False


@dataclass(frozen=True)
class LinearView:
    """The targets as linear maps of the inputs of a layer.

    Attributes:
        name: of the layer, or "the samples".
        inputs: n.
        outputs: m: classes, or the numbers to predict.
        rank: how many directions stand out of the noise; None with too few samples to tell.
        most: how many could.
        explained: share of the variance of the targets that a map of this rank explains, or of the most.
    """

    name: str
    inputs: int
    outputs: int
    rank: int | None
    most: int
    explained: float

    @property
    def units(self) -> Mapping[str, int]:
        """Activation → the width of a hidden layer that carries a map of this rank."""
        return {} if self.rank is None else {name: units * self.rank for name, units in UNITS.items()}


class Judged(NamedTuple):
    """What data says of a model.

    Attributes:
        moments: layer → second moment of its inputs; without layers that no sample reaches.
        views: of the samples, and of the layers that have one row a sample.
    """

    moments: Mapping[str, Tensor]
    views: Sequence[LinearView]


def judge(source: str, model: nn.Module, sites: Sequence[WeightSite], sample: Sample, precision: Precision) -> Judged:
    """Sends samples through a model, once.

    Args:
        source: what the user called the model.
        model: on the device of `precision`.
        sites: its weights.
        sample: of a training split.
        precision: the arithmetic.

    Raises:
        UsageError: if the model does not take the samples.
    """
    regressions = _Regressions(sample.loader.dataset)

    def forward(batch: Batch) -> None:
        regressions.begin(batch)
        try:
            with precision.context():
                model(batch.x)
        except Exception as error:  # whatever the user's module raises
            raise UsageError(
                f"{source} does not take samples of shape {tuple(batch.x.shape[1:])}, as --data has them: "
                f"{type(error).__name__}: {error}"
            ) from error

    batches = (batch.to(precision.device) for batch in sample)
    with ExitStack() as stack:
        for site in sites:
            stack.callback(site.module.register_forward_pre_hook(regressions.hook(site.name)).remove)
        moments = input_moments(model, sites, batches, forward=forward)
    return Judged(moments, list(regressions.views()))


def labelled_sample(source: str, asked: Asked) -> Sample:
    """Samples for a model that nothing is known of.

    Raises:
        UsageError: if the file is not of labelled samples.
    """
    assert asked.data is not None
    dataset = open_dataset([asked.data])
    if dataset.task != "classification":
        raise UsageError(
            f"{asked.data} is for {dataset.task}, of which {source} does not say how long its samples are; name a run "
            "file, whose section data says so (its data.path is replaced)"
        )
    size = min(_AT_ONCE, dataset.sizes["train"])
    return Sample(Loader(dataset, "train", size, 0, shuffle=True, in_memory=False), asked.samples)


class _Regressions:
    """The moments of targets with the inputs of layers; of text, whose targets are tokens, none."""

    def __init__(self, dataset: Dataset) -> None:
        self._is_text, self._classes = dataset.task == "language", len(dataset.classes)
        self._found: dict[str, Moments] = {}
        self._y: Tensor | None = None

    def begin(self, batch: Batch) -> None:
        """Takes the targets of the batch that comes next."""
        if not self._is_text:
            self._y = targets(batch, self._classes)
            self._add("the samples", batch.x.flatten(1))

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """Looks at what goes into a layer."""

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].ndim == 2:
                self._add(name, args[0])

        return look

    def _add(self, name: str, x: Tensor) -> None:
        if self._y is not None and len(x) == len(self._y) and x.shape[1] + self._y.shape[1] <= LARGEST:
            self._found.setdefault(name, Moments()).add(x, self._y)

    def views(self) -> Iterator[LinearView]:
        """What has been found, in the order in which it was seen."""
        for name, moments in self._found.items():
            yield _view(name, fit_linear(moments))


def _view(name: str, fit: LinearFit) -> LinearView:
    outputs, inputs = fit.weight.shape
    rank = None if fit.edge is None else fit.proposed_rank
    return LinearView(name, inputs, outputs, rank, fit.rank, fit.explained(rank))
