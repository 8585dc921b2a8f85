"""Singular values of the low-rank layers in a run's newest checkpoint. The only module of the page that needs torch."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpclr.errors import HpclrError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """Of a layer.

    Attributes:
        name: its name.
        full: the rank that it could have.
        values: singular values relative to the largest, which is first.
    """

    name: str
    full: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class Spectra:
    """Of a checkpoint.

    Attributes:
        layers: in the order of the model; none if nothing is low-rank.
        step: of the checkpoint; None if there is none that can be read.
        why: why there are none, in words.
    """

    layers: tuple[Spectrum, ...] = ()
    step: int | None = None
    why: str = ""


def spectra_of(run: Path) -> Spectra:
    """Reads the newest checkpoint of a run; what keeps it from being read is said in `why`."""
    try:
        from hpclr.training.evaluation import load_run, malformed_named
        from hpclr.training.state import position_of, tensors

        loaded, _ = load_run(run)
        with malformed_named(loaded.path):
            layers = tuple(_layers(tensors(loaded.tree["model"])))
            step = position_of(loaded.tree).step
    except (HpclrError, OSError, ImportError) as error:
        return Spectra(why=str(error))
    return Spectra(layers, step, "" if layers else f"The checkpoint of step {step:,} holds no low-rank layer.")


def _layers(weights: "dict[str, Tensor]") -> Iterator[Spectrum]:
    from hpclr.lowrank.factors import FactorizationError
    from hpclr.lowrank.spectra import core_of, singular_values
    from hpclr.training.inspection import factored_layers

    for name, factors in factored_layers(weights):
        with suppress(FactorizationError):  # it is not finite
            values = singular_values(core_of(*factors)).tolist()
            if values and values[0] > 0:
                full = min(len(factors.u), factors.vh.shape[1])
                yield Spectrum(name, full, tuple(value / values[0] for value in values))
