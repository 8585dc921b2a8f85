"""A checkpoint's model at lower ranks than it was trained at: `hpclr evaluate` and `hpclr export --rank-fraction`."""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hpclr.checkpoint import Loaded
from hpclr.config import RunFile
from hpclr.config.schema import Nested
from hpclr.errors import UsageError
from hpclr.lowrank import Summary, load_state_dict, summarize
from hpclr.lowrank.activations import input_moments
from hpclr.lowrank.elastic import cut, elastic_sites, order_directions, renew_statistics
from hpclr.lowrank.interchange import factored_weights
from hpclr.training.assembly import drawn
from hpclr.training.evaluation import Subject, load_run, malformed_named, require_trust, subject_of
from hpclr.training.onnx_export import empty_model, origin
from hpclr.training.scores import Score
from hpclr.training.stored_weights import StoredWeights, stored_weights


class AtRank(NamedTuple):
    """A model cut to a share of full rank."""

    fraction: float
    score: Score
    sizes: Summary  # its operations are those of a batch of `samples`
    samples: int

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for programs."""
        return {"fraction": self.fraction, "score": self.score.values, "sizes": self.sizes.as_dict()} | {
            "flops_samples": self.samples
        }


class Curve(NamedTuple):
    """A checkpoint's model at several ranks."""

    checkpoint: Path
    points: list[AtRank]
    note: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for programs."""
        points = [point.as_dict() for point in self.points]
        return {"checkpoint": str(self.checkpoint), "note": self.note, "points": points}


def evaluate_at_ranks(
    checkpoint: Path,
    fractions: Sequence[float],
    *,
    calibrate: int | None = None,
    split: str = "test",
    data: Path | None = None,
    best: bool = False,
    trust: bool = False,
    untrusted: bool = False,
) -> Curve:
    """Scores a checkpoint's model cut to several shares of full rank.

    Args:
        checkpoint: a file or a run directory, of a dense or a factored model.
        fractions: shares of the smaller side of each layer, rounded up.
        calibrate: put directions into the order of what they do to outputs on so many training samples, and take
            running statistics on these; None: into the order of singular values. Those of a nested model stay in the
            order in which training has put them.
        split: train, valid or test.
        data: another data file than the run's.
        best: of a run directory, the best checkpoint on validation instead of the newest.
        trust: whether a model that the checkpoint names as `target:` may be imported.
        untrusted: as `hpclr.training.evaluation.load_checkpoint`.

    Raises:
        UsageError: as there, and for a model without layers that could be cut.
    """
    loaded, run = load_run(checkpoint, best=best, untrusted=untrusted)
    subject = subject_of(loaded, run, split=split, data=data, trust=trust)
    stored = stored_weights(loaded.tree, loaded.path)
    elastic = _Elastic(subject.model, run, loaded, stored, _samples(run, subject, calibrate))
    example = subject.loader.batch(0, 0).x.to(subject.precision.device)
    points = []
    for fraction in fractions:
        model = elastic.at(fraction)
        points.append(AtRank(fraction, subject.score(model), summarize(model, example=example), len(example)))
    return Curve(loaded.path, points, elastic.note)


def cut_weights(
    loaded: Loaded,
    stored: StoredWeights,
    fraction: float,
    *,
    calibrate: int | None = None,
    data: Path | None = None,
    trust: bool = False,
) -> StoredWeights:
    """The weights of a checkpoint cut to a share of full rank, for `hpclr export`; arguments as `evaluate_at_ranks`.

    Raises:
        UsageError: as there.
    """
    if calibrate is None:
        with malformed_named(loaded.path):
            run, samples = origin(loaded)
        require_trust(run, loaded.path, trust)
        elastic = _Elastic(empty_model(run, samples)[0], run, loaded, stored, None)
    else:
        with malformed_named(loaded.path):
            run, _ = origin(loaded)
        subject = subject_of(loaded, run, split="train", data=data, trust=trust)
        elastic = _Elastic(subject.model, run, loaded, stored, _samples(run, subject, calibrate))
    model = elastic.at(fraction).cpu()
    return stored._replace(state=model.state_dict(), layers=factored_weights(model), merged=False)


class _Samples(NamedTuple):
    """Training samples to calibrate with."""

    batches: Callable[[], Iterator[Tensor]]
    subject: Subject

    def through(self, model: nn.Module) -> Callable[[Tensor], object]:
        """How a batch goes through a model."""

        @torch.no_grad()
        def forward(x: Tensor) -> object:
            with self.subject.precision.context():
                return model(x.to(self.subject.precision.device))

        return forward


def _samples(run: RunFile, subject: Subject, count: int | None) -> _Samples | None:
    if count is None:
        return None
    return _Samples(lambda: drawn(run, subject.dataset, count, subject.precision.dtype), subject)


class _Elastic:
    """A model with its directions in order, to be cut again and again.

    Args:
        model: as the checkpoint names it, without its weights.
        run: the run file.
        loaded: the checkpoint.
        stored: its weights.
        samples: to calibrate with, if that is wanted.

    Attributes:
        note: what people should know of the order; empty if nothing.
    """

    def __init__(
        self, model: nn.Module, run: RunFile, loaded: Loaded, stored: StoredWeights, samples: _Samples | None
    ) -> None:
        self._model, self._samples, self.note = model, samples, ""
        try:
            load_state_dict(model, stored.state)
            sites = elastic_sites(model.eval())
            if isinstance(run.method, Nested) and stored.layers:
                return  # in order for the whole model, which is better than for each layer by itself
            moments = None
            if samples is not None:
                moments = input_moments(model, sites, samples.batches(), forward=samples.through(model))
            self.note = _note(order_directions(sites, moments))
        except (ValueError, RuntimeError) as error:  # code behind a `target:` may have changed
            raise UsageError(f"{loaded.path}: its model cannot be cut to a lower rank: {error}") from error

    def at(self, fraction: float) -> nn.Module:
        """A copy of the model, cut; its running statistics are those of the samples to calibrate with."""
        model = copy.deepcopy(self._model)
        whole = {site.name: site.rank for site in elastic_sites(model)}
        if cut(model, fraction) != whole and self._samples is not None:
            renew_statistics(model, self._samples.batches(), self._samples.through(model))
        return model


def _note(without: Sequence[str]) -> str:
    if not without:
        return ""
    named = ", ".join(without[:3]) + (" …" if len(without) > 3 else "")
    return f"in the order of singular values for want of a second moment: {named}"
