"""scikit-learn's digits: 1,797 pictures of 8 × 8 pixels, values 0 to 16, ten classes."""

from collections.abc import Iterator

import numpy as np

from hpclr.data.hashing import Stream, key
from hpclr.data.layout import Array
from hpclr.data.order import permute
from hpclr.data.source import Block, Part, Source, labelled
from hpclr.errors import UsageError

_TEST_SHARE = 0.2


def read() -> Source:
    """The digits; the same fifth of them is the test split whatever the seed, so that results compare.

    Raises:
        UsageError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    images, labels = load_digits(return_X_y=True)
    x, y = images.astype(np.uint8).reshape(-1, 1, 8, 8), labels.astype(np.int64)
    order = permute(key(Stream.SPLIT), np.arange(len(y)), len(y))
    tests = round(_TEST_SHARE * len(y))
    parts = {"train": _part(x, y, np.sort(order[tests:])), "test": _part(x, y, np.sort(order[:tests]))}
    return Source("classification", [str(digit) for digit in range(10)], x.shape[1:], "uint8", parts)


def _part(x: Array, y: Array, rows: Array) -> Part:
    def blocks() -> Iterator[Block]:
        yield labelled(x[rows], y[rows], "sklearn.datasets.load_digits", 0)

    return Part(len(rows), blocks)
