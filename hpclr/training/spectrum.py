"""`hpclr spectrum`: the singular values of every weight, and what each rank rule would keep of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpclr.lowrank import RankRule, rank_rule
from hpclr.lowrank.factors import FactorizationError
from hpclr.lowrank.noise import noise_edge, noise_spectrum
from hpclr.lowrank.ranks import label_of, noise_level
from hpclr.lowrank.spectra import effective_rank
from hpclr.training.spectrum_data import LinearView
from hpclr.training.spectrum_sources import Subject, Weight

DEFAULT_RULES = (
    rank_rule(0.1),
    rank_rule({"rule": "energy", "share": 0.9}),
    rank_rule({"rule": "sum_proportion", "share": 0.9}),
    rank_rule({"rule": "stable_rank"}),
    rank_rule({"rule": "marchenko_pastur"}),
    rank_rule({"rule": "gavish_donoho"}),
)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Kept:
    """What a rank rule keeps of a weight.

    Attributes:
        rank: k, as the rule says; a method does not go below its `min_rank`, nor below 1.
        energy: share of ‖W‖²_F.
    """

    rank: int
    energy: float


@dataclass(frozen=True)
class LayerSpectrum:
    """One weight.

    Attributes:
        name: of its layer.
        shape: (m, n) as a matrix.
        factored: whether it is held as factors.
        values: its singular values, descending, float64; of a factored weight as many as it has kept.
        noise: standard deviation of an entry's noise, estimated from the median; 0.0 where nothing is known of it.
        kept: rule, as `label_of` names it → what it keeps.
    """

    name: str
    shape: tuple[int, int]
    factored: bool
    values: Tensor
    noise: float
    kept: Mapping[str, Kept]

    @property
    def largest(self) -> float:
        """σ₁."""
        return float(self.values[0])

    @property
    def edge(self) -> float:
        """The largest singular value that noise alone would have (Marchenko and Pastur's edge)."""
        return self.noise * noise_edge(self.shape)

    def bulk(self, points: int = 48) -> list[float]:
        """What singular values noise alone would have, at even places, descending; none where it is not known."""
        return [self.noise * value for value in noise_spectrum(self.shape, points)] if self.noise else []

    @property
    def ranks(self) -> dict[str, int]:
        """Rule → what it keeps."""
        return {rule: kept.rank for rule, kept in self.kept.items()}

    @property
    def stable_rank(self) -> float:
        """‖W‖²_F / σ₁²."""
        return float((self.values / self.largest).square().sum()) if self.largest else 0.0

    @property
    def effective_rank(self) -> float:
        """The exponential of the entropy of the singular values."""
        return effective_rank(self.values)


@dataclass(frozen=True)
class Total:
    """What a rank rule keeps of all weights together.

    Attributes:
        stored: parameters of U, Σ and Vᵀ, as a share of the dense weights'.
        trained: those of Σ alone, likewise.
        energy: share of Σ ‖W‖²_F, each weight counted alike.
    """

    stored: float
    trained: float
    energy: float


@dataclass(frozen=True)
class Spectra:
    """All weights of a model.

    Attributes:
        source: what the user called it.
        layers: in the model's order.
        left_alone: layers without a low-rank form, or that stay dense → why.
        seen: with data, the same of W C^½, of the second moment C of a layer's inputs: s² are shares of the energy of
            its outputs; of the layers that data reaches.
        views: with data, what linear maps make of it.
    """

    source: str
    layers: Sequence[LayerSpectrum]
    left_alone: Mapping[str, str]
    seen: Sequence[LayerSpectrum] = ()
    views: Sequence[LinearView] = ()

    @property
    def with_data(self) -> bool:
        """Whether data was given, and reached anything."""
        return bool(self.seen or self.views)

    @property
    def rules(self) -> list[str]:
        """The rules by their labels."""
        return list(self.layers[0].kept) if self.layers else []

    def total(self, rule: str) -> Total:
        """What a rule, named by its label, keeps of all layers together."""
        return total_of(self.layers, rule)


def total_of(layers: Sequence[LayerSpectrum], rule: str) -> Total:
    """What a rule, named by its label, keeps of these layers together."""
    dense = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    ranks = [layer.kept[rule].rank for layer in layers]
    stored = sum(k * (sum(layer.shape) + k) for k, layer in zip(ranks, layers, strict=True))
    energy = sum(layer.kept[rule].energy for layer in layers) / len(layers)
    return Total(stored / dense, sum(k * k for k in ranks) / dense, energy)


@torch.no_grad()
def analyse(subject: Subject, rules: Sequence[RankRule], progress: Progress) -> Spectra:
    """Takes the singular values of one weight after the other.

    Args:
        subject: the model.
        rules: what to judge by; none: the subject's own one and `DEFAULT_RULES`.
        progress: told after each weight how many operations are done, and of how many.
    """
    chosen = {label_of(rule): rule for rule in rules or (*subject.rules, *DEFAULT_RULES)}
    layers, seen, left_alone, done = [], [], dict(subject.left_alone), 0
    total = sum(weight.cost for weight in subject.weights)
    for weight in subject.weights:
        try:
            layers.append(_judged(weight, weight.values(), chosen))
            if weight.seen is not None:
                seen.append(_judged(weight, weight.seen(), chosen))
        except FactorizationError as error:
            left_alone[weight.name] = str(error)
        done += weight.cost
        progress(done, total)
    return Spectra(subject.source, layers, left_alone, seen, subject.views)


def _judged(weight: Weight, values: Tensor, rules: Mapping[str, RankRule]) -> LayerSpectrum:
    energies = (values / (float(values[0]) or 1.0)).square().cumsum(0)
    kept = {}
    for label, rule in rules.items():
        rank = rule(values, weight.shape)
        kept[label] = Kept(rank, float(energies[rank - 1] / energies[-1]) if rank else 0.0)
    return LayerSpectrum(weight.name, weight.shape, weight.factored, values, noise_level(values, weight.shape), kept)
