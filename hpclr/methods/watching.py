"""What goes into the layers in the one step before their directions are judged by what they do to outputs."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from torch import Tensor

from hpclr.lowrank.activations import InputWatch, shrunk
from hpclr.lowrank.compiling import not_compiled
from hpclr.lowrank.factors import LowRankWarning
from hpclr.lowrank.sites import WeightSite
from hpclr.methods.placement import Placement


class Inputs:
    """The second moments C = E[x xᵀ] of what layers take in, over all rows of all processes, `shrunk` if these are few.

    Args:
        placement: the processes, all of which watch the same layers in the same steps.
        inside: of weights that are factored, C is of what their Σ takes in: k×k.
    """

    def __init__(self, placement: Placement, *, inside: bool) -> None:
        self._placement, self._inside = placement, inside
        self._watch: InputWatch | None = None
        self._watched: list[WeightSite] = []

    def watch(self, sites: Iterable[WeightSite]) -> None:
        """Looks at these layers from now on, and forgets what it has seen: a step that a scaler skipped is repeated."""
        self.drop()
        self._watched = list(sites)
        self._watch = InputWatch(self._watched, inside=self._inside)

    @contextmanager
    def passes(self, *, counts: bool = True) -> Iterator[None]:
        """To be put around the passes of a step: while it looks, what is compiled runs as it is written.

        Args:
            counts: whether what goes through the model belongs to the batch; a stand-in for samples does not.
        """
        watch = self._watch
        eagerly, looking = (nullcontext(), nullcontext()) if watch is None else (not_compiled(), watch.counting(counts))
        with eagerly, looking:
            yield

    def drop(self) -> None:
        """Looks no longer, and forgets what it has seen."""
        if self._watch is not None:
            self._watch.close()
        self._watch, self._watched = None, []

    def means(self) -> dict[str, Tensor]:
        """Layer name → C (n×n) in float64, of layers that have taken something in; collective, and looks no longer."""
        watch, watched = self._watch, self._watched
        self.drop()
        if watch is None:
            return {}
        totals = ((site.name, self._placement.mean(watch.take(site))) for site in watched)
        return {name: self._mean(total) for name, total in totals if total[:-1].any()}

    def _mean(self, total: Tensor) -> Tensor:
        rows = float(total[-1, 0])
        return shrunk(total[:-1] / rows, self._placement.processes * rows)


def warn_of_unseen(layers: Sequence[str], consequence: str) -> None:
    """Whoever trains in a way in which nothing is seen should know."""
    named = ", ".join(layers[:3]) + (" …" if len(layers) > 3 else "")
    warnings.warn(
        f"{len(layers)} layers ({named}) took nothing in, or zeros alone, while the model trained in the step before "
        f"they were to be judged by their outputs: {consequence}. That takes step() after each optimiser step, with "
        "the model in training mode; and the passes of a compiled model in `with method.probing():`. Else set "
        "order='size'.",
        LowRankWarning,
        stacklevel=5,
    )
