"""What a check of OIALR finds in one layer: how still its basis is, its rank to be, the factors it is to get."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor

from hpclr.lowrank import MarchenkoPastur, RankRule, WeightSite
from hpclr.lowrank.factors import polar, working_dtype
from hpclr.lowrank.product import pays
from hpclr.lowrank.ranks import with_noise
from hpclr.lowrank.regression import order_by_output
from hpclr.lowrank.spectra import measured_in
from hpclr.methods.auto import signal_in
from hpclr.methods.placement import Outcome, Placement
from hpclr.methods.stability import StabilityTracker


@dataclass
class Examiner:
    """Examines layers, each by whichever process; changes nothing but what the tracker remembers.

    Attributes:
        placement: decomposes.
        tracker: of stability.
        rule: how many directions are kept.
        by_output: whether directions are judged by what they do to outputs; else by their singular values.
        edge: of the noise, from which on a direction counts under `auto`; None without.
        when_stable: whether a layer is converted as soon as its basis has settled.
        when_it_pays: whether a layer is converted only if its factors are no larger and no slower.
        max_cut: the largest share of a rank that one check may remove.
        min_rank: the least rank, as a share of the smaller side.
        moments: layer name → C of what went into it, for the present check.
        watched: layer name → the rank that it has or, as long as it is dense, would have.
        signals: layer name → how many directions stood out of the noise, of dense weights under `auto`.
        noise: layer name → standard deviation of an entry's noise, as it was while the weight was dense.
    """

    placement: Placement
    tracker: StabilityTracker
    rule: RankRule
    by_output: bool
    edge: MarchenkoPastur | None
    when_stable: bool
    when_it_pays: bool
    max_cut: Fraction
    min_rank: Fraction
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    watched: dict[str, int] = field(default_factory=dict)
    signals: dict[str, int] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)

    def first_basis(self, site: WeightSite, weight: Tensor) -> Tensor:
        """What the first check compares with."""
        if self.edge is not None and not site.is_lowrank:
            return signal_in(self.placement.decompose(weight, dense=True), self.edge).polar
        return self.placement.measure(weight, None, dense=not site.is_lowrank).polar

    def examine(self, site: WeightSite, j: int, covered: bool) -> Outcome:
        """What check j finds.

        Args:
            site: a dense weight W, or one with factors, of which Σ is examined.
            j: the index of the check; below 0 it only measures.
            covered: whether it is the layer's turn to be cut.

        Raises:
            FactorizationError: if it has no decomposition.
        """
        if site.is_lowrank:
            return self._of_outputs(site, covered) if self.by_output else self._of_sigma(site, covered)
        if self.edge is not None:
            return self._of_signal(site, j, self.edge)
        return self._of_weight_by_output(site, j, covered) if self.by_output else self._of_weight(site, j, covered)

    def record(self, site: WeightSite, outcome: Outcome) -> None:
        """Takes note of an outcome, on all processes; before the layer changes."""
        self.watched[site.name] = outcome.rank
        if outcome.noise is not None:
            self.noise[site.name] = outcome.noise
        if outcome.signal is not None:
            self.signals[site.name] = outcome.signal
        if outcome.stability is not None:
            self.tracker.record(site.name, outcome.stability, outcome.still)

    def _of_weight(self, site: WeightSite, j: int, covered: bool) -> Outcome:
        weight, due = site.core(), j >= 0
        # the factors of a weight tell all else too, if it is known beforehand that they will be needed
        basis = self.placement.decompose(weight, dense=True) if due and not self.when_it_pays else None
        found = measured_in(basis, self.rule) if basis else self.placement.measure(weight, self.rule, dense=True)
        stability = self.tracker.measure(site.name, found.polar)
        settled = self.when_stable and self.tracker.settles(site.name, stability)
        rank = self._limited(site, found.rank)
        keep = self._converted_rank(site, rank, due=due, covered=covered, settled=settled)
        if keep is not None:
            basis = (basis or self.placement.decompose(weight, dense=True)).leading(keep)
        # only the whole spectrum of a dense weight tells the noise in it
        return Outcome(rank, stability, basis, found.noise)

    def _of_weight_by_output(self, site: WeightSite, j: int, covered: bool) -> Outcome:
        stability = self.tracker.measure(site.name, self.placement.measure(site.core(), None, dense=True).polar)
        settled = self.when_stable and self.tracker.settles(site.name, stability)
        return self._of_outputs(site, covered, stability, due=j >= 0, settled=settled)

    def _of_signal(self, site: WeightSite, j: int, edge: MarchenkoPastur) -> Outcome:
        """W under `auto`: whether what stands out of the noise in it has settled, and what outputs need of it if so."""
        signal = signal_in(self.placement.decompose(site.core(), dense=True), edge)
        stability = self.tracker.measure(site.name, signal.polar)
        still = signal.is_still(stability, self.signals.get(site.name, min(site.shape)))
        settled = self.tracker.settles(site.name, stability, still)
        due = j >= 0 and signal.rank > 0
        found = self._of_outputs(site, due, stability, due=due, settled=settled)
        return found._replace(still=still, signal=signal.rank)

    def _of_sigma(self, site: WeightSite, covered: bool) -> Outcome:
        sigma = site.core()
        if not covered:
            return Outcome(site.rank, self._stability_of_sigma(site), None)
        basis = self.placement.decompose(sigma, dense=False)
        stability = self.tracker.measure(site.name, polar(basis.to(working_dtype(sigma.dtype))))
        rule = with_noise(self.rule, self.noise.get(site.name))
        rank = self._limited(site, rule(basis.s, site.shape))
        keep = self._cut(site, rank)
        return Outcome(rank, stability, None if keep is None else basis.leading(keep))

    def _of_outputs(
        self,
        site: WeightSite,
        covered: bool,
        stability: float | None = None,
        *,
        due: bool = True,
        settled: bool = False,
    ) -> Outcome:
        """What W or Σ is cut to by what its directions do to outputs; that of a layer without inputs is not."""
        core, dense, moment = site.core(), not site.is_lowrank, self.moments.get(site.name)
        stability = stability if dense else self._stability_of_sigma(site)
        order = None if moment is None else order_by_output(core, moment)
        unknown = self.watched[site.name] if dense else site.rank
        rank = unknown if order is None else self._limited(site, self.rule(order.s, site.shape))
        if dense:
            keep = self._converted_rank(site, rank, due=due, covered=covered, settled=settled)
        else:
            keep = self._cut(site, rank) if covered else None
        whole = keep == min(core.shape)
        if keep is None or (order is None and not (dense and whole)):
            return Outcome(rank, stability, None)
        basis = self.placement.decompose(core, dense=dense) if whole or order is None else order.cut(core, keep)
        return Outcome(rank, stability, basis.to(working_dtype(core.dtype)) if dense else basis)

    def _stability_of_sigma(self, site: WeightSite) -> float | None:
        return self.tracker.measure(site.name, self.placement.measure(site.core(), None, dense=False).polar)

    def _limited(self, site: WeightSite, rank: int | None) -> int:
        """The rank that the rule keeps, not below the floor."""
        least = max(1, ceil(self.min_rank * min(site.shape)))
        return min(site.rank, max(least, rank or 0))

    def _cut(self, site: WeightSite, rank: int) -> int | None:
        """The rank to which a converted layer is re-factorised; None leaves its basis as it is."""
        rank = max(rank, ceil((1 - self.max_cut) * site.rank))
        low_precision = torch.finfo(site.parameter.dtype).bits < 32
        # without a cut the rotation changes nothing but rounding, of which a 16-bit basis can bear little
        return None if low_precision and rank == site.rank else rank

    def _converted_rank(self, site: WeightSite, rank: int, *, due: bool, covered: bool, settled: bool) -> int | None:
        """The rank at which a dense layer is converted now; None leaves it dense."""
        if not self.when_it_pays:
            return site.rank if due or settled else None
        if not (covered or settled):
            return None
        return rank if pays(*site.shape, rank, groups=site.groups, positions=site.positions) else None
