"""What the checks of a method take: operations, memory on the device, bases remembered in host memory."""

from collections.abc import Sequence
from dataclasses import dataclass

from hpclr.config.schema import Oialr, Section
from hpclr.planning.forms import Layer, Ranks

DOUBLE, HALF = 8, 2  # bytes of a number


@dataclass(frozen=True)
class CheckPace:
    """How fast layers are examined.

    Attributes:
        rate: operations a second, as counted by `operations`.
        each: seconds that the smallest layer takes.
    """

    rate: float
    each: float

    def seconds(self, layers: Sequence[Layer], ranks: Ranks) -> float:
        """Of a check that finds the model with these ranks, by one process."""
        return self.each * len(layers) + check_operations(layers, ranks) / self.rate


@dataclass(frozen=True)
class CheckRange:
    """Between which checks are expected.

    Attributes:
        slow: at worst.
        fast: at best.
        measured: whether they are measured, on this machine.
    """

    slow: CheckPace
    fast: CheckPace
    measured: bool = False


def operations(m: int, n: int) -> float:
    """Of the examination of a matrix: its Gram matrix, that one's eigenvectors, and two products with them.

    LAPACK's divide and conquer takes about 9n³ for the eigenvectors of a symmetric matrix (Golub and Van Loan, "Matrix
    Computations", 4th edition, 8.3), in float64, at a third of the rate of products: here they count thrice.
    """
    long, short = max(m, n), min(m, n)
    return 6.0 * long * short**2 + 27.0 * short**3


def check_operations(layers: Sequence[Layer], ranks: Ranks) -> float:
    """Of a check that finds the model with these ranks."""
    sizes = ((ranks[layer.name],) * 2 if layer.name in ranks else layer.shape for layer in layers)
    return sum(operations(m, n) for m, n in sizes)


def examiners(section: Section, processes: int) -> int:
    """How many processes share the examination of the layers: all, or the first one alone."""
    return processes if isinstance(section, Oialr) and section.svd != "rank0" else 1


def check_bytes(layers: Sequence[Layer], weight_size: int) -> int:
    """The most that the examination and the conversion of a layer hold beside the model: those of the largest one.

    In float64 the weight and its product with the eigenvectors; the Gram matrix, its eigenvectors, and as much again
    for the solver; then a factor, or what a moment becomes on the way.
    """
    return max((_examined(*layer.shape, weight_size) for layer in layers), default=0)


def _examined(m: int, n: int, weight_size: int) -> int:
    return DOUBLE * (2 * m * n + 4 * min(m, n) ** 2) + weight_size * m * n


def watched_bytes(section: Section, ranks: Ranks, layers: Sequence[Layer]) -> int:
    """The second moments of what layers take in, from the step before a check that judges by outputs until that check.

    n×n in float64 of a dense layer, k×k of one that OIALR holds as factors. Of OIALR as if a check covered all layers.
    """
    if getattr(section, "order", "size") != "output":
        return 0
    if isinstance(section, Oialr):  # which cuts nothing as it converts, unless it waits until that pays
        waits = section.convert == "when_it_pays"
        return DOUBLE * sum(ranks.get(layer.name, layer.shape[1]) ** 2 for layer in layers if ranks or waits)
    return 0 if ranks else DOUBLE * sum(layer.shape[1] ** 2 for layer in layers)


def remembered_bytes(section: Section, layers: Sequence[Layer], weight_size: int) -> int:
    """Of the bases of dense layers that OIALR remembers in host memory between checks, of all processes together."""
    if not isinstance(section, Oialr) or section.delay == 0:
        return 0
    size = DOUBLE if weight_size == DOUBLE else HALF
    return sum(size * layer.shape[0] * layer.shape[1] for layer in layers)
