"""Long series for the few columns of a picture: nothing that stands out is lost."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from operator import itemgetter
from statistics import fmean

Point = tuple[float, float]
_value = itemgetter(1)


def thinned(points: Sequence[Point], columns: int) -> list[Point]:
    """The first, lowest, highest and last point of each of so many columns of equal width, in their order.

    Args:
        points: in the order of x.
        columns: of the picture; of fewer than four points a column none is lost.
    """
    if len(points) <= 4 * columns:
        return list(points)
    return [point for part in _columns(points, columns) for point in _extremes(part)]


def averaged(points: Sequence[Point], columns: int) -> list[Point]:
    """The mean of each of so many columns, at the mean x of its points."""
    return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in _columns(points, columns)]


def _columns(points: Sequence[Point], columns: int) -> Iterator[Sequence[Point]]:
    """The points of each column that has any."""
    if not points:
        return
    low, high = points[0][0], points[-1][0]
    begin = 0
    for column in range(1, columns + 1):
        edge = low + (high - low) * column / columns
        end = len(points) if column == columns else bisect_left(points, edge, lo=begin, key=itemgetter(0))
        if end > begin:
            yield points[begin:end]
        begin = end


def _extremes(part: Sequence[Point]) -> list[Point]:
    lowest, highest = min(part, key=_value), max(part, key=_value)
    places = {0, len(part) - 1, part.index(lowest), part.index(highest)}
    return [part[place] for place in sorted(places)]
